"""PyTorch's FSDP under transformers' Trainer: that it runs where it was asked for, which layers are shared out by
themselves, and whole weights in what is saved.

accelerate and the Trainer leave these to their user. Among CPU processes, DDP runs instead and nothing is said. The
layers are by default of all classes that a part of the model may consist of, CLIP's text encoder among them, and one
that is not there is an error. With `SHARDED_STATE_DICT`, which spares the first process's memory, nothing is saved
that `from_pretrained` reads.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import TrainingArguments

from hf_llava_ft.errors import UserError


def uses_fsdp(args: TrainingArguments) -> bool:
    """Whether FSDP was asked for, by `args` or by `accelerate launch`, which tells it through the environment."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def check_fsdp(args: TrainingArguments, is_running: bool) -> None:
    """
    Args:
        is_running (`bool`): whether the Trainer shares the model out.

    Raises:
        UserError: if that was asked for and is not done.
    """
    if is_running or not uses_fsdp(args):
        return
    raise UserError(
        "FSDP was asked for (--fsdp, or a file of accelerate) and would not run here, because accelerate has it for "
        "several GPUs only: leave it out, or share the model out with --deepspeed examples/deepspeed/zero3.json."
    )


def share_out_by_layers(plugin: Any, model: nn.Module) -> None:
    """
    Names the layers that are gathered one at a time: those of language model and tower that `model` has.

    Args:
        plugin (`accelerate.FullyShardedDataParallelPlugin`): layers that it names already stay as they are.
        model (`nn.Module`): a transformers model, or a PEFT model around one.
    """
    if plugin.transformer_cls_names_to_wrap is None:
        there = {type(module).__name__ for module in model.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(there & set(getattr(model, "_no_split_modules", None) or ()))


@contextmanager
def whole_state_dict(plugin: Any) -> Iterator[None]:
    """Within it, the Trainer saves all weights of a model that is shared out, gathered in the first process."""
    from torch.distributed.fsdp import StateDictType  # not in every build of PyTorch

    kind, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = kind
