#!/usr/bin/env bash
# transformers 5.23.0 with PEFT 0.21.2: `enable_adapters` does not undo `disable_adapters`.
# `disable_adapters` switches off LoRA and the modules that were trained whole (`modules_to_save`); `enable_adapters`
# switches on LoRA alone. What was trained whole, a head or a projector, stays off, and nothing is said.
# Seen: "after enabling again the logits differ by 4.55; after enabling the wrappers too by 0".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 peft==0.21.2
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

import torch
from peft import LoraConfig
from peft.utils import ModulesToSaveWrapper
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
model = LlamaForCausalLM(config).eval()
model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
ids = torch.tensor([[1, 2, 3]])
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if ".default." in name:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    tuned = model(ids).logits
    model.disable_adapters()
    model.enable_adapters()
    again = (model(ids).logits - tuned).abs().max().item()
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.enable_adapters(True)
    whole = (model(ids).logits - tuned).abs().max().item()
print(f"after enabling again the logits differ by {again:.2f}; after enabling the wrappers too by {whole:g}")
sys.exit(0 if again > 1 and whole == 0 else 1)
PROGRAM
