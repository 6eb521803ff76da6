"""Learning rates of their own for projector and tower."""

import torch
from torch import nn

from hf_llava_ft.modeling.part_names_llava import PROJECTOR, VISION_TOWER, part_of
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments


def own_rates(args: LlavaTrainingArguments) -> dict[str, float | None]:
    """Peak rate by part; `None` for one that has that of the rest."""
    return {PROJECTOR: args.mm_projector_lr, VISION_TOWER: args.mm_vision_tower_lr}


def give_own_rates(optimizer: torch.optim.Optimizer, model: nn.Module, args: LlavaTrainingArguments) -> None:
    """Moves what trains in projector and tower into groups of the rates that `args` has for them."""
    for part, rate in own_rates(args).items():
        if rate is not None:
            of_part = {parameter for name, parameter in model.named_parameters() if part_of(name) == part}
            _split_off(optimizer, of_part, rate)


def _split_off(optimizer: torch.optim.Optimizer, parameters: set[nn.Parameter], learning_rate: float) -> None:
    """Moves `parameters` out of the groups of `optimizer` into groups of the same settings and another learning
    rate."""
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if parameter in parameters]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if parameter not in parameters]
            settings = {name: value for name, value in group.items() if name != "params"}
            optimizer.add_param_group({**settings, "params": moved, "lr": learning_rate})
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
