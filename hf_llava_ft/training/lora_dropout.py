"""Dropout of LoRA's inputs on a CPU, in less time, and a quarter of the memory for its gradient.

There `torch.nn.Dropout` takes longer to draw its mask than a small model takes to multiply with A: one number of its
generator for each element, into floats that the gradient keeps. Here a generator of 64 bits draws four elements at a
time, and a byte an element is kept. The generator is seeded by one number of PyTorch's own, so that what is resumed or
computed again under gradient checkpointing sees the mask that it saw.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

_BITS = 16  # of an element: p is rounded to a multiple of 1/65,536


class LoraDropout(nn.Dropout):
    """`torch.nn.Dropout` with other random numbers on a CPU; on other devices, in evaluation and where it is compiled
    the same in all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at_once = x.device.type == "cpu" and x.is_floating_point() and not torch.compiler.is_compiling()
        if not (at_once and self.training and 0 < self.p < 1) or self.inplace:
            return super().forward(x)
        dropped: torch.Tensor = _Dropped.apply(x, self.p)  # type: ignore[no-untyped-call]
        return dropped


def kept_elements(shape: torch.Size, p: float) -> torch.Tensor:
    """`uint8` of `shape`: 1 with probability 1 - p, to the nearest 1/65,536; else 0."""
    seed = torch.randint(2**62, ())
    if type(seed) is not torch.Tensor:  # without values: memory is estimated, nothing computed
        return torch.empty(shape, dtype=torch.uint8)
    draws = np.random.SFC64(int(seed)).random_raw(-(-shape.numel() // 4)).view(np.uint16)[: shape.numel()]
    return torch.from_numpy((draws >= round(p * 2**_BITS)).view(np.uint8)).view(shape)


class _Dropped(torch.autograd.Function):
    """Keeps a byte an element for its gradient, where PyTorch on a CPU keeps an element."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float) -> torch.Tensor:
        kept = kept_elements(x.shape, p)
        ctx.save_for_backward(kept)
        ctx.p = p
        return _times(kept, x, p)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (kept,) = ctx.saved_tensors
        return _times(kept, gradients[0], ctx.p), None


def _times(kept: torch.Tensor, x: torch.Tensor, p: float) -> torch.Tensor:
    # In place: memory that is new to the process takes longer to be had than to be filled.
    return kept.to(x.dtype).mul_(x).mul_(1 / (1 - p))
