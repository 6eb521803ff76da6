"""Whether flags that describe a LLaVA are true of the one that training starts from."""

import json
import re
from pathlib import Path

from transformers import AutoConfig

from hf_llava_ft.checkpoints.checked.folder import UNREADABLE, check_settings
from hf_llava_ft.errors import UserError
from hf_llava_ft.modeling.configuration_llava import LlavaConfig
from hf_llava_ft.settings.arguments import ModelArguments

# What the original calls them, by transformers' name.
_FEATURES = {"default": "patch", "full": "cls_patch"}


def check_agreement(model_args: ModelArguments, config: LlavaConfig) -> None:
    """What is said of a LLaVA that exists has to be so: the original would write it into the result all the same."""
    has_class_token = config.vision_config.model_type == "clip_vision_model"
    features = _FEATURES if has_class_token else {}
    pinpoints = model_args.image_grid_pinpoints
    is_next = config.image_aspect_ratio == "anyres"
    facts = {
        "mm_projector_type": (model_args.mm_projector_type, config.projector_type),
        "mm_vision_select_layer": (model_args.mm_vision_select_layer, config.vision_feature_layer),
        "mm_vision_select_feature": (
            model_args.mm_vision_select_feature,
            features.get(config.vision_feature_select_strategy, model_args.mm_vision_select_feature),
        ),
        # Known of the original's folders; in others the chat template has it.
        "mm_use_im_start_end": (
            model_args.mm_use_im_start_end,
            config.uses_image_start_end if config.original_config else model_args.mm_use_im_start_end,
        ),
        "mm_patch_merge_type": (model_args.mm_patch_merge_type, config.patch_merge_type if is_next else "flat"),
        "image_grid_pinpoints": (
            None if pinpoints is None else _pinpoints(pinpoints, config.vision_config.image_size),
            config.image_grid_pinpoints if is_next else None,
        ),
    }
    if model_args.anyres_max is not None and is_next:
        _check_tiles(model_args.model_name_or_path, model_args.anyres_max, config)
    for name, (said, fact) in facts.items():
        if said is not None and said != fact and name not in model_args.assumed:
            raise UserError(
                f"--{name} {getattr(model_args, name)}: in {model_args.model_name_or_path} it is {fact}, which no "
                f"flag can change: leave it out."
            )
    if model_args.vision_tower is not None and _is_another_tower(model_args.vision_tower, config):
        raise UserError(
            f"--vision_tower {model_args.vision_tower}: {model_args.model_name_or_path} has another one, which no "
            f"flag can change: leave it out."
        )


def _pinpoints(text: str, edge: int) -> list[list[int]]:
    """`[[height, width], ...]` of the original's `"[(width, height), ...]"`, or of LLaVA-NeXT's `"(1x1),...,(3x2)"`:
    all grids from so many columns and rows to so many, of tiles of `edge` pixels."""
    if grid := re.fullmatch(r"\((\d+)x(\d+)\)(?:.*\((\d+)x(\d+)\))?", text.strip()):
        first, last = grid.groups()[:2], (grid[3] or grid[1], grid[4] or grid[2])
        columns, rows = (range(int(low), int(high) + 1) for low, high in zip(first, last, strict=True))
        return [[row * edge, column * edge] for column in columns for row in rows]
    try:
        return [[height, width] for width, height in json.loads(text.replace("(", "[").replace(")", "]"))]
    except (ValueError, TypeError) as error:
        raise UserError(
            f"--image_grid_pinpoints {text} is not a list of sizes such as [(336, 672), (672, 336)], nor a range of "
            f"grids such as (1x1),...,(2x2)."
        ) from error


def _check_tiles(name: str, most: int, config: LlavaConfig) -> None:
    """LLaVA-NeXT shrinks the features of a picture that has more tiles than its `anyres_max`; nothing here does."""
    edge = config.vision_config.image_size
    tiles = max(height // edge * (width // edge) for height, width in config.image_grid_pinpoints or [(edge, edge)])
    if tiles > most:
        raise UserError(
            f"--image_aspect_ratio anyres_max_{most}: pictures of {name} have up to {tiles} tiles, whose features "
            f"LLaVA-NeXT would shrink to {most} and this package does not: train it with LLaVA-NeXT's own code, or "
            f"use a model of fewer tiles, such as a LLaVA-1.6."
        )


def _is_another_tower(name: str, config: LlavaConfig) -> bool:
    own_name = config.vision_tower_name
    if own_name and Path(own_name).name == Path(name).name:
        return False
    check_settings(name)
    try:
        tower = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except UNREADABLE:
        return bool(own_name)  # nothing to compare but names
    tower, own = getattr(tower, "vision_config", tower), config.vision_config
    compared = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    return any(getattr(tower, each, None) != getattr(own, each) for each in compared)
