"""What trains: LoRA on the language model and the whole projector, in one PEFT adapter; or whole parts of the model.

The adapter is self-contained (the projector is in `modules_to_save`), and its names are those of the native module
tree, so that PEFT alone loads it, onto our model or onto transformers' own.

A part of the tower behind the hidden state that the projector reads never gets a gradient, CLIP's last layer among
them. It stays frozen in every mode, so that what is said to train is what moves.
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
OTHER = "other"  # what hangs in no part, such as LLaVA-1.6's image_newline


def part_of(parameter_name: str) -> str:
    """Which of `PARTS` a parameter belongs to, from its name in the model or in a PEFT model around it."""
    return next((part for part in PARTS if f".{part}." in f".{parameter_name}"), OTHER)


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
    _with_float32_projector(peft_model)
    return peft_model


def _with_float32_projector(model: nn.Module) -> None:
    """Steps of 2e-5 vanish in the rounding of bfloat16 weights. PEFT keeps LoRA in float32 for that, not this part."""
    for name, parameter in model.named_parameters():
        if (
            part_of(name) == PROJECTOR
            and parameter.requires_grad
            and parameter.dtype in (torch.bfloat16, torch.float16)
        ):
            parameter.data = parameter.data.float()


# The original's words for these: `tune_mm_mlp_adapter` (stage 1), neither that nor `lora_enable` (stage 2). It never
# trains the tower.
WHOLE_PARTS = {
    "projector": (PROJECTOR,),
    "freeze_vision": (PROJECTOR, LANGUAGE_MODEL, LM_HEAD, OTHER),
    "full": (*PARTS, OTHER),
}


def with_tuning(
    model: LlavaForCausalLM, arguments: TuningArguments, base: str, revision: str | None = None
) -> LlavaForCausalLM | PeftModel:
    """`model` with exactly those weights trainable that `arguments.train_type` names; for LoRA see [`with_lora`]."""
    if arguments.train_type == "lora":
        return with_lora(model, arguments, base, revision)
    return with_whole_parts(model, WHOLE_PARTS[arguments.train_type])


def with_whole_parts(model: LlavaForCausalLM, parts: tuple[str, ...]) -> LlavaForCausalLM:
    """Freezes what is not in `parts`, and of the tower what the projector never sees."""
    idle = idle_tower_modules(model)
    # Tied embeddings are one parameter, which trains if either of its two names does.
    trained = {
        parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if part_of(name) in parts and not any(name.startswith(f"{module}.") for module in idle)
    }
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trained)
    if parts == WHOLE_PARTS["projector"]:
        _with_float32_projector(model)
    return model


def idle_tower_modules(model: LlavaForCausalLM) -> list[str]:
    """Names of the tower's modules that no image feature depends on: the layers behind the last hidden state that the
    projector reads, the normalisation behind all layers, and SigLIP's pooling head."""
    config = model.config
    num_layers = config.vision_config.num_hidden_layers
    chosen = config.vision_feature_layer
    # Hidden state 0 is the embedding, hidden state k what layer k - 1 gives.
    last = max(k if k >= 0 else num_layers + 1 + k for k in (chosen if isinstance(chosen, list) else [chosen]))
    names = [name for name, _ in model.get_submodule(f"model.{VISION_TOWER}").named_modules()]
    layers = {name: re.fullmatch(r"(?:vision_model\.)?encoder\.layers\.(\d+)", name) for name in names}
    idle = [name for name, layer in layers.items() if layer and int(layer[1]) >= last]
    idle += [name for name in names if name.removeprefix("vision_model.") in ("post_layernorm", "head")]
    return [f"model.{VISION_TOWER}.{name}" for name in idle]


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
        for part in (*PARTS, OTHER)
        if part in counts
    ]
