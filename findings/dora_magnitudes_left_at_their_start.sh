#!/usr/bin/env bash
# transformers 5.24.0 with PEFT 0.21.2: an adapter trained with DoRA that is opened through `load_adapter` of a model keeps
# the magnitudes it began with; those in the file are left out. `PeftModel.from_pretrained` of the same folder is exact.
# Seen: "the logits differ from PEFT's by 0.19; the magnitudes were loaded: False".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 peft==0.21.2
"$folder/venv/bin/python" - "$folder" <<'PROGRAM'
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
torch.manual_seed(0)
LlamaForCausalLM(config).save_pretrained(f"{sys.argv[1]}/base")
base = [LlamaForCausalLM.from_pretrained(f"{sys.argv[1]}/base") for _ in range(3)]
trained = get_peft_model(base[0], LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True))
with torch.no_grad():
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            parameter.add_(torch.rand_like(parameter) * 0.5)
trained.save_pretrained(f"{sys.argv[1]}/adapter")
by_peft = PeftModel.from_pretrained(base[1], f"{sys.argv[1]}/adapter").eval()
by_transformers = base[2]
by_transformers.load_adapter(f"{sys.argv[1]}/adapter")


def magnitudes(model):
    return [parameter for name, parameter in model.named_parameters() if "magnitude" in name]


ids = torch.tensor([[1, 2, 3]])
with torch.no_grad():
    difference = (by_peft(ids).logits - by_transformers.eval()(ids).logits).abs().max().item()
loaded = all(map(torch.equal, magnitudes(by_peft), magnitudes(by_transformers)))
print(f"the logits differ from PEFT's by {difference:.2f}; the magnitudes were loaded: {loaded}")
sys.exit(0 if difference > 0.01 and not loaded else 1)
PROGRAM
