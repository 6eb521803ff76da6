"""An adapter kept apart for vLLM, which serves many of them over one base, if they hold nothing but LoRA of the
language model.

vLLM refuses `modules_to_save`, among which our projector is, and leaves LoRA of the tower out unless it is told
otherwise. So everything but the LoRA of the language model is merged into the base.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file

from hf_llava_ft.errors import UserError

BASE, ADAPTER = "base", "adapter"


def split_adapter(model: PeftModel, folder: Path) -> tuple[Any, int, list[str]]:
    """
    Writes the LoRA of the language model to `folder`, and merges the rest of the adapter into the base.

    Returns:
        The base, a `LlavaForCausalLM`; the largest rank in the adapter; and the parts that were merged, by name.

    Raises:
        UserError: if there is nothing to keep apart, or vLLM can't apply it.
    """
    config: Any = copy.deepcopy(model.peft_config["default"])
    if config.peft_type != "LORA" or config.use_dora:
        raise UserError(
            "vLLM serves plain LoRA and this adapter is of another kind: export it without --keep_adapter."
        )
    weights = get_peft_model_state_dict(model)
    kept = {name: tensor.clone().contiguous() for name, tensor in weights.items() if _is_served(name)}
    if not kept:
        raise UserError("the adapter has no LoRA in the language model to keep: export it without --keep_adapter.")
    merged = sorted({_part(name) for name in weights.keys() - kept.keys()})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if _is_served(name) and ".lora_B." in name:
                parameter.zero_()  # so that merging leaves the weight as it is
    base = model.merge_and_unload()

    modules = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in kept}
    config.target_modules, config.exclude_modules, config.modules_to_save = modules, None, None
    config.layers_to_transform = config.layers_pattern = None
    config.base_model_name_or_path, config.revision, config.inference_mode = BASE, None, True
    folder.mkdir()
    save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    rank = max(tensor.shape[0] for name, tensor in kept.items() if ".lora_A." in name)
    return base, rank, merged


def _is_served(name: str) -> bool:
    return ".language_model." in name and (".lora_A." in name or ".lora_B." in name)


def _part(name: str) -> str:
    """Of what a weight is part, in words."""
    parts = {"multi_modal_projector": "projector", "vision_tower": "vision tower", "lm_head": "head"}
    return next((word for part, word in parts.items() if part in name), "language model")
