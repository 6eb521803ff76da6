"""Weights that train are float32 in memory, whatever the checkpoint is in.

float16 has no room for Adam's epsilon and what is near it, and a step of 2e-5 vanishes in the rounding of a bfloat16
weight. So what trains is turned to float32 and computed in 16 bits by autocast, where --bf16 or --fp16 say so; what
is frozen stays as it is. The result is written in the dtype that the model came in (`one_dtype.py`).

What may surprise: a whole part is turned where only some of its layers train, because one layer reads another's
output. DeepSpeed keeps float32 copies of its own beside weights that it turns to the 16 bits it computes in, so
nothing is turned under it then; where it is told of none, it computes in the dtype of the weights, without a scale.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import nn

from hf_llava_ft.modeling.part_names_llava import LANGUAGE_MODEL, LM_HEAD, OTHER, part_of

HALF = (torch.float16, torch.bfloat16)
# Of models whose first weight may no longer tell in what they came.
_CAME_IN: WeakKeyDictionary[nn.Module, torch.dtype | None] = WeakKeyDictionary()


def with_float32_masters(model: Any) -> Any:
    """
    `model`, with what trains in float32; in place, and once is enough.

    Of a part in which weights of the model itself train, all are, since a layer that is frozen reads what the one
    before it gives; LoRA's own are float32 already, beside a frozen part as it was.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    remember_dtype(base)
    named = [(n, p) for n, p in model.named_parameters() if p.dtype in HALF and ".original_module." not in n]
    parts = {part_of(name) for name, parameter in named if parameter.requires_grad}
    if parts & {LANGUAGE_MODEL, LM_HEAD}:
        parts |= {LANGUAGE_MODEL, LM_HEAD, OTHER}  # the head reads what the model before it gives
    for name, parameter in named:
        if part_of(name) in parts:
            parameter.data = parameter.data.float()
    return model


def keeps_own_masters(args: Any) -> bool:
    """Whether the engine keeps float32 copies of what trains."""
    return args.deepspeed_plugin is not None and (args.bf16 or args.fp16)


def remember_dtype(base: Any) -> None:
    """The dtype that a model came in, for its result; what is called first counts."""
    is_divided = any(hasattr(each, "ds_tensor") for each in base.parameters())
    # ZeRO-3 turns weights to what it computes in while they are loaded.
    came_in = getattr(getattr(base, "config", None), "dtype", None) if is_divided else getattr(base, "dtype", None)
    _CAME_IN.setdefault(base, came_in)


def without_float16_on_cpu(model: Any, args: Any) -> None:
    """PyTorch's autocast of a CPU takes no float16 beside bfloat16; a GPU's does. In place."""
    if args.device.type == "cpu" and args.bf16:
        for parameter in model.parameters():
            if parameter.dtype == torch.float16:
                parameter.data = parameter.data.float()


def dtype_of_result(model: Any) -> torch.dtype:
    """That of a finished model: the one in which it came."""
    return _CAME_IN.get(model) or model.dtype


def said_precision(model: nn.Module, args: Any) -> str:
    """What is held and computed in what, in a line."""
    dtypes: dict[bool, set[str]] = {True: set(), False: set()}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            dtypes[parameter.requires_grad].add(str(parameter.dtype).removeprefix("torch."))
    trained, frozen = (" and ".join(sorted(dtypes[each])) for each in (True, False))
    if args.bf16 or args.fp16:
        computed = f"computed in {'bfloat16' if args.bf16 else 'float16'}"
    else:
        computed = "computed in the dtype of the weights"
    if keeps_own_masters(args):
        return f"Precision: {computed}; DeepSpeed keeps what trains in float32."
    rest = f", the rest in {frozen}" if frozen and frozen != trained else ""
    return f"Precision: what trains is held in {trained}{rest}; {computed}."
