#!/usr/bin/env bash
# bitsandbytes 0.50.2 on a CPU with AVX512-BF16: a 4-bit layer that was evaluated once gives its input no gradient when it
# trains again, so that in a QLoRA run with an evaluation on the way what lies before such a layer stops learning.
# Seen: "gradient before the evaluation: True; after it: False", with a warning by PyTorch that no autograd kernel is
# registered for bitsandbytes::gemv_4bit. On a processor without AVX512-BF16 it says so, and exits with 3.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet bitsandbytes==0.50.2
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit

if not has_avx512bf16():
    print("this processor has no AVX512-BF16")
    sys.exit(3)
layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")


def has_gradient():
    layer.train()
    inputs = torch.ones(4, 64, requires_grad=True)
    layer(inputs).sum().backward()
    return inputs.grad is not None and bool(inputs.grad.any())


before = has_gradient()
with torch.no_grad():
    layer.eval()(torch.ones(4, 64))
after = has_gradient()
print(f"gradient before the evaluation: {before}; after it: {after}")
sys.exit(0 if before and not after else 1)
PROGRAM
