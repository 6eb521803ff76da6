"""One rank of a training run, in a process that `tests/ranks.py` forks from one which has imported all this."""

import importlib
import os
import sys
from importlib.util import find_spec

# Read when DeepSpeed is imported, and by its kernels.
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"

import bitsandbytes  # noqa: F401
import torch

import hf_llava_ft.evaluate
import hf_llava_ft.train  # noqa: F401

if find_spec("deepspeed") is not None:
    import deepspeed  # noqa: F401


def run_rank(argv: list[str], environment: dict[str, str], log: str, before: tuple[str, ...], module: str) -> None:
    """
    `python -m MODULE`, with what is printed in the file `log`.

    Args:
        before (`tuple[str]`): each a `module:function` to call first.
    """
    os.environ.update(environment)
    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(file, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    for each in before:
        where, _, function = each.partition(":")
        getattr(importlib.import_module(where), function)()
    importlib.import_module(module).main(argv)
