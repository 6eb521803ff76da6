"""What trains: LoRA on the language model and the whole projector, in one PEFT adapter.

The adapter is self-contained (the projector is in `modules_to_save`), and its names are those of the native module
tree, so that PEFT alone loads it, onto our model or onto transformers' own.
"""

import re
from collections import defaultdict
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from hf_llava_ft.arguments import TuningArguments
from hf_llava_ft.modeling.modeling_llava import LlavaForCausalLM

LANGUAGE_MODEL, PROJECTOR, VISION_TOWER, LM_HEAD = "language_model", "multi_modal_projector", "vision_tower", "lm_head"
PARTS = (VISION_TOWER, PROJECTOR, LANGUAGE_MODEL, LM_HEAD)


def part_of(parameter_name: str) -> str:
    """Which of `PARTS` a parameter belongs to, from its name in the model or in a PEFT model around it."""
    return next((part for part in PARTS if f".{part}." in f".{parameter_name}"), "other")


def lora_target_pattern(model: LlavaForCausalLM) -> str:
    """
    A regular expression that matches every linear layer of the language model and nothing of tower, projector and
    head.

    Bare names such as `q_proj` would also match CLIP. Source of the set: haotian-liu/LLaVA, `find_all_linear_names`.
    """
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.get_submodule(f"model.{LANGUAGE_MODEL}").named_modules()
        if isinstance(module, nn.Linear)
    }
    return rf"model\.{LANGUAGE_MODEL}\..*\.({'|'.join(sorted(map(re.escape, names)))})"


def with_lora(
    model: LlavaForCausalLM, arguments: TuningArguments, base: str, revision: str | None = None
) -> PeftModel:
    """
    Wraps `model` for LoRA training.

    Args:
        base (`str`): the folder or Hub id the adapter will name as its base.
    """
    config = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=lora_target_pattern(model),
        modules_to_save=[PROJECTOR],
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        revision=revision,
    )
    model.config.use_cache = False
    model.config.text_config.use_cache = False
    peft_model = get_peft_model(model, config)
    peft_model.peft_config["default"].base_model_name_or_path = base  # get_peft_model takes it from the loaded model
    return peft_model


@dataclass(frozen=True)
class TrainedPart:
    """One line of the table printed before the first step; numbers are counts of parameters."""

    part: str
    num_trainable: int
    num_total: int
    dtype: str


def trained_parts(model: nn.Module) -> list[TrainedPart]:
    """What trains, part by part, in the order of `PARTS`."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    dtypes: dict[str, set[torch.dtype]] = defaultdict(set)
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue  # PEFT's untouched copy of what is in modules_to_save
        part = part_of(name)
        counts[part][0] += parameter.numel() * parameter.requires_grad
        counts[part][1] += parameter.numel()
        dtypes[part].add(parameter.dtype)
    return [
        TrainedPart(
            part,
            counts[part][0],
            counts[part][1],
            dtype=", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes[part])),
        )
        for part in (*PARTS, "other")
        if part in counts
    ]
