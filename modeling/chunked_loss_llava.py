"""Head and loss a few rows at a time, so that the logits of a step never exist at once.

The gradient of each piece is computed together with its loss, while its logits are there, and kept: that of the hidden
states, and of what trains in the head. Backward multiplies them by what comes in. No piece is computed twice, and with
a frozen head nothing is kept that would not be kept anyway.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

# In float32, of which cross-entropy and its gradient hold a few.
CHUNK_BYTES = 2**27


def rows_of_chunk(num_rows: int, num_logits: int) -> int | None:
    """How many of S rows with V logits each to compute at a time; None where they are few enough for once."""
    rows = max(1, CHUNK_BYTES // (4 * num_logits))
    return None if num_rows <= 2 * rows else rows


def can_chunk(head: nn.Module, hidden_states: torch.Tensor) -> bool:
    """
    Whether the gradient may be taken before backward: not of a head that is shared out among processes, nor in
    float16, whose small gradients are saved by a scale that backward begins with.
    """
    # `full_tensor` is the mark of FSDP2, `ds_id` that of ZeRO-3; FSDP's first version puts views there.
    is_shared_out = any(
        not each.is_leaf or hasattr(each, "full_tensor") or hasattr(each, "ds_id") for each in head.parameters()
    )
    device_type = hidden_states.device.type
    in_float16 = hidden_states.dtype == torch.float16 or (
        torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.float16
    )
    return torch.is_grad_enabled() and not is_shared_out and not in_float16 and not torch.compiler.is_compiling()


def chunked_loss(
    head: nn.Module,
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    loss_function: Callable[..., torch.Tensor],
    num_items_in_batch: int | torch.Tensor | None,
    rows: int,
) -> torch.Tensor:
    """
    The loss of `hidden_states` `float[S, D]` and `targets` `int64[S]`, none of them ignored, `rows` at a time.

    Args:
        head: called as a module, so that an adapter in it takes part.
        loss_function: takes `logits`, `targets` and a number that the sum of the losses is divided by.
        num_items_in_batch (*optional*): that number; S by default, which is the mean.
    """
    divisor = len(targets) if num_items_in_batch is None else num_items_in_batch

    def loss_of(piece: torch.Tensor, start: int) -> torch.Tensor:
        return loss_function(head(piece), targets[start : start + rows], divisor)

    trained = [each for each in head.parameters() if each.requires_grad]
    return _ChunkedLoss.apply(loss_of, rows, hidden_states, *trained)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss_of: Callable, rows: int, hidden_states: torch.Tensor, *trained: torch.Tensor):
        total: torch.Tensor | None = None
        of_hidden = torch.empty_like(hidden_states) if ctx.needs_input_grad[2] else None
        of_trained: list[torch.Tensor] = []
        for start in range(0, len(hidden_states), rows):
            with torch.enable_grad():
                piece = hidden_states[start : start + rows].detach().requires_grad_(of_hidden is not None)
                loss = loss_of(piece, start)
                wanted = [*([] if of_hidden is None else [piece]), *trained]
                found = list(torch.autograd.grad(loss, wanted)) if wanted else []
            if of_hidden is not None:
                of_hidden[start : start + rows] = found.pop(0)
            if not of_trained:
                of_trained = found
            else:
                for whole, part in zip(of_trained, found, strict=True):
                    whole += part
            total = loss.detach() if total is None else total + loss.detach()
        ctx.save_for_backward(*([] if of_hidden is None else [of_hidden]), *of_trained)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor):
        found = [each * gradient.to(each.dtype) for each in ctx.saved_tensors]
        return (None, None, *(found if ctx.needs_input_grad[2] else [None, *found]))
