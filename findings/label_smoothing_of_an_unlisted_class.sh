#!/usr/bin/env bash
# transformers 5.24.0: `label_smoothing_factor` trains a causal language model to repeat its current token, if the name of
# its class is not on a list. The Trainer shifts labels for class names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES (and a few
# more) and for no others; a subclass of LlamaForCausalLM under another name gets the unshifted loss, without a word.
# Seen: "listed name: the Trainer's loss is the shifted one; other name: it is the unshifted one".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 accelerate==1.15.0
"$folder/venv/bin/python" - "$folder" <<'PROGRAM'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


class MyLlama(LlamaForCausalLM):
    pass


config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
ids = torch.randint(1, 50, (2, 12), generator=torch.Generator().manual_seed(0))
arguments = TrainingArguments(output_dir=sys.argv[1], label_smoothing_factor=0.1, use_cpu=True, report_to="none")


def losses(model_class):
    torch.manual_seed(0)
    model = model_class(config).eval()
    trainer = Trainer(model, arguments)
    with torch.no_grad():
        by_trainer = trainer.compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
        logits = model(input_ids=ids).logits
    smoothed = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    shifted = smoothed(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    unshifted = smoothed(logits.flatten(0, 1), ids.flatten())
    return (by_trainer - shifted).abs() < 1e-5, (by_trainer - unshifted).abs() < 1e-5


listed, other = losses(LlamaForCausalLM), losses(MyLlama)
as_seen = listed == (True, False) and other == (False, True)
words = {(True, False): "the shifted one", (False, True): "the unshifted one"}
listed, other = (words.get(tuple(bool(x) for x in each), "neither") for each in (listed, other))
print(f"listed name: the Trainer's loss is {listed}; other name: it is {other}")
sys.exit(0 if as_seen else 1)
PROGRAM
