"""An adapter merged into its base, and how much of what it learned the dtype of the result rounds away.

A bfloat16 weight has 8 significant bits. Where an adapter changes it by a hundredth, the last bit of the sum is a good
part of the change, and no rank or rate of learning mends that. So each matrix is merged in a wider dtype and rounded
once, and what that took is added up.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from hf_llava_ft.modeling.adapters_llava import PEFT_PREFIX

_TRAINED_WHOLE, _UNTOUCHED = ".modules_to_save.default.", ".original_module."
# Below it, nobody needs to be told of a wider dtype.
_MUCH = 1e-3
# Sums are made piece by piece: whole ones would be new memory of the size of each matrix, which takes longer to be had
# than to be filled.
_AT_ONCE = 2**18


@dataclass(frozen=True)
class Rounding:
    """
    What became of the changes that an adapter makes.

    Args:
        dtype (`torch.dtype`): of the merged weights.
        learned (`float`): the norm of all changes together: square root of the sum of their squares.
        lost (`float`): that of what was rounded away.
        num_weights (`int`): how many tensors were changed.
    """

    dtype: torch.dtype
    learned: float
    lost: float
    num_weights: int

    @property
    def lost_share(self) -> float:
        return self.lost / self.learned if self.learned else 0.0

    @property
    def sentence(self) -> str:
        name, few = str(self.dtype).removeprefix("torch."), f"in {self.num_weights} weights"
        if self.lost_share < _MUCH:
            return f"Of what was learned, {name} keeps all but {self.lost_share:.1e} ({few})."
        return (
            f"Of what was learned, rounding to {name} loses {100 * self.lost_share:.3g} % (norm of what is lost over "
            f"that of the change, {few}): --dtype float32 keeps it, in a folder of twice the size."
        )


def merged(model: PeftModel, saved: Mapping[str, torch.Tensor] | None = None) -> tuple[Any, Rounding]:
    """
    The base with the adapter in it, and what rounding took. `model` is used up.

    Args:
        saved (*optional*): weights of the adapter's file by their names in memory, of which those that were trained
            whole may have been rounded when they were put into `model`.
    """
    sums = _Sums()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                _merge_layer(layer, sums)
        _count_whole_modules(model, saved or {}, sums)
    base: Any = model.get_base_model()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        whole: Any = model.merge_and_unload()  # what is left: modules that were trained whole
    return whole, Rounding(base.dtype, math.sqrt(sums.learned), math.sqrt(sums.lost), sums.number)


class _Sums:
    """Sums of squares."""

    def __init__(self) -> None:
        self.learned = self.lost = 0.0
        self.number = 0

    def add(self, learned: torch.Tensor, lost: torch.Tensor) -> None:
        self.learned += float(torch.linalg.vector_norm(learned, dtype=torch.float64).square())
        self.lost += float(torch.linalg.vector_norm(lost, dtype=torch.float64).square())


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


def _merge_layer(layer: Any, sums: _Sums) -> None:
    weight = getattr(layer.get_base_layer(), "weight", None)
    if weight is None or not weight.is_floating_point():
        return  # PEFT merges it by itself
    before = weight.data
    # Where what is added does not depend on the weights, PEFT adds it to nothing, and the sum is ours.
    is_plain = isinstance(layer, LoraLayer) and not layer.lora_variant
    if is_plain:
        weight.data = torch.zeros_like(before, dtype=torch.promote_types(before.dtype, torch.float32))
    else:
        weight.data = before.to(_wide(before.dtype), copy=True)
    layer.merge()
    # Asked for again: PEFT may have put another tensor there.
    weight = layer.get_base_layer().weight
    found, weight.data = weight.data, before
    # Into the memory of the base, mapped from its file: a page that is written to becomes ours, and the file's is let
    # go. In new memory, base and result would both be held.
    for old, new in zip(_pieces(before), _pieces(found), strict=True):
        exact = new + old.to(_wide(before.dtype)) if is_plain else new
        learned = new if is_plain else exact - old
        rounded = exact.to(before.dtype)
        sums.add(learned, exact - rounded)
        old.copy_(rounded)
    sums.number += 1


def _pieces(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows that are written to in place, a few at a time."""
    return weight.split(max(1, _AT_ONCE * len(weight) // max(1, weight.numel()))) if weight.dim() else (weight,)


def _count_whole_modules(model: PeftModel, saved: Mapping[str, torch.Tensor], sums: _Sums) -> None:
    # By all their names: the untouched weight may be one that is tied, and known by the name of another place.
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters():
        if _TRAINED_WHOLE not in name:
            continue
        before = named[name.replace(_TRAINED_WHOLE, _UNTOUCHED)].data
        exact = saved.get(name.removeprefix(PEFT_PREFIX).replace(_TRAINED_WHOLE, "."), parameter.data)
        wide = _wide(before.dtype)
        exact = exact.to(device=before.device, dtype=wide)
        sums.add(exact - before.to(wide), exact - parameter.data.to(before.dtype))
        sums.number += 1
