"""How many floating point operations are carried out, also by those that PyTorch's counter does not know."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker


class FlopCounter(FlopCounterMode):
    """Counts the whole, and not module by module: the tracker of modules does not allow `torch.autograd.grad` of a
    leaf, which the loss of a few rows at a time calls."""

    def __init__(self):
        super().__init__(display=False, custom_mapping=_unknown_operations())
        self.mod_tracker = _Untracked()


class _Untracked(ModuleTracker):
    def __enter__(self):
        return self

    def __exit__(self, *of_an_error):
        return None


def _unknown_operations() -> dict[Any, Any]:
    """
    Of the fused attention that fake tensors take, and of the product that a LoRA layer adds in place, which PyTorch's
    counter does not know.

    Causal attention computes half of the products; the backward pass has two for one of the forward pass. A mask says
    causal here too: the rows have no padding, and transformers, to which fake tensors look like a trace, writes out
    the mask that it leaves to the kernel otherwise.
    """

    def products(query: Any, key: Any, value: Any, is_causal: bool) -> float:
        batch, heads, num_queries, width = query
        total = 2 * batch * heads * num_queries * key[-2] * (width + value[-1])
        return total / 2 if is_causal else total

    def forward(query, key, value, dropout_p=0.0, is_causal=False, *args, attn_mask=None, **kwargs):
        return products(query, key, value, is_causal or attn_mask is not None)

    def backward(
        grad_out, query, key, value, out, logsumexp, dropout_p=0.0, is_causal=False, *args, attn_mask=None, **kwargs
    ):
        return 2 * products(query, key, value, is_causal or attn_mask is not None)

    def added_product(added, left, right, *args, **kwargs):
        return 2 * left[0] * left[1] * right[1]

    aten = torch.ops.aten
    return {
        aten.addmm_: added_product,
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
