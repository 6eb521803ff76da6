#!/usr/bin/env bash
# transformers 5.24.0: under gradient checkpointing a frozen vision tower of LLaVA is computed twice in every step.
# `enable_input_require_grads`, which the Trainer and PEFT call for LoRA with checkpointing, makes the output of the patch
# embedding require gradients as well, so each layer of the tower is checkpointed and computed again in the backward pass,
# although none of its weights trains. Under `torch.no_grad()`, which is all that such a tower needs, each runs once.
# Seen: "a frozen tower of 3 layers: 6 layers computed in a step; under no_grad 3; the same gradients: True".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.24.0
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

vision = CLIPVisionConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4
)
text = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
torch.manual_seed(0)
model = LlavaForConditionalGeneration(
    LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=49,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
)
tower = model.model.vision_tower.requires_grad_(False)
ids = torch.tensor([[1, 49, 49, 49, 49, 2, 3]])
batch = {"input_ids": ids, "labels": ids.masked_fill(ids == 49, -100), "pixel_values": torch.randn(1, 3, 8, 8)}

computed = []
layers = [module for module in tower.modules() if type(module).__name__ == "CLIPEncoderLayer"]
for layer in layers:
    layer.self_attn.register_forward_hook(lambda *_: computed.append(1))


def step():
    """How many layers of the tower were computed, and the gradients of what trains."""
    computed.clear()
    model.zero_grad()
    model(**batch).loss.backward()
    return len(computed), [weight.grad.clone() for weight in model.parameters() if weight.requires_grad]


model.train()
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
model.enable_input_require_grads()
both, gradients = step()
with_gradients = tower.forward
tower.forward = torch.no_grad()(with_gradients)
once, again = step()
same = all(map(torch.equal, gradients, again))
print(
    f"a frozen tower of {len(layers)} layers: {both} layers computed in a step; under no_grad {once}; "
    f"the same gradients: {same}"
)
sys.exit(0 if (len(layers), both, once, same) == (3, 6, 3, True) else 1)
PROGRAM
