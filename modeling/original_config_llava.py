"""The flat configuration of haotian-liu/LLaVA and our nested one, both ways.

The original hangs LLaVA's settings (`mm_*`) into the configuration of the language model and names the vision tower
without describing it. What it wrote is kept whole, so that a model which came in this form goes out in it unchanged.
"""

import json
import re
from typing import Any

from transformers import AutoConfig

from .older_readers_llava import rope_for_older_readers

# The original's model types, and the language model each of them holds.
TEXT_MODEL_TYPES = {
    "llava_llama": "llama",
    "llava": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
    "llava_qwen2": "qwen2",
}
_MODEL_TYPES = {"llama": "llava_llama", "mistral": "llava_mistral", "qwen2": "llava_qwen"}
_ARCHITECTURES = {
    "llava_llama": "LlavaLlamaForCausalLM",
    "llava_mistral": "LlavaMistralForCausalLM",
    "llava_qwen": "LlavaQwenForCausalLM",
}

# Fields that speak of LLaVA; all the others belong to the language model.
_LLAVA_FIELD = re.compile(
    r"(mm_|tune_mm_|freeze_mm_|use_mm_|unfreeze_mm_|image_|tokenizer_|s2|pretrain_mm_)|(model_type|architectures|auto_map"
    r"|_name_or_path|transformers_version)$"
)


def is_original(config: dict[str, Any]) -> bool:
    """Whether a config.json is one of the original: flat, with the fields of LLaVA in it."""
    return "text_config" not in config and any(name.startswith("mm_") for name in config)


def nested_from_original(flat: dict[str, Any], model_type: str) -> dict[str, Any]:
    """
    The nested form of a flat configuration.

    The tower's own configuration is not in the file: it is read from `mm_vision_tower`, a folder or a Hub id.

    Args:
        model_type (`str`): of the nested configuration.

    Raises:
        ValueError: if the language model is none of `TEXT_MODEL_TYPES`, or the tower cannot be found.
    """
    kind = flat.get("model_type")
    if kind not in TEXT_MODEL_TYPES:
        mpt = " MPT has no LLaVA-1.5 and no maintained code; use a LLaMA, Mistral or Qwen2 checkpoint." * (
            "mpt" in str(kind)
        )
        raise ValueError(
            f"model_type {kind!r} is not an original LLaVA this package reads; it reads "
            f"{', '.join(TEXT_MODEL_TYPES)}.{mpt}"
        )
    tower_name = str(flat.get("mm_vision_tower") or flat.get("vision_tower"))
    try:
        tower_config = AutoConfig.from_pretrained(tower_name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the vision tower {tower_name!r} that config.json names in mm_vision_tower was not found; make it "
            f"reachable from the current folder or set mm_vision_tower to its folder or Hub id."
        ) from error
    vision_config = getattr(tower_config, "vision_config", tower_config)
    vision_config._name_or_path = ""  # a local path of this machine has no place in a saved file
    has_class_token = vision_config.model_type == "clip_vision_model"
    drops_class_token = flat.get("mm_vision_select_feature", "patch") == "patch" and has_class_token
    num_patches = (vision_config.image_size // vision_config.patch_size) ** 2

    text_config = {name: value for name, value in flat.items() if not _LLAVA_FIELD.match(name)}
    text_config["model_type"] = TEXT_MODEL_TYPES[kind]
    nested = {
        "model_type": model_type,
        "text_config": text_config,
        "vision_config": vision_config.to_dict(),
        "projector_type": flat.get("mm_projector_type") or "linear",
        "vision_feature_layer": flat.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "default" if drops_class_token else "full",
        **_image_settings(flat),
        "vision_tower_name": tower_name,
        "image_seq_length": num_patches + (1 if has_class_token and not drops_class_token else 0),
        # The original marks an image by -200, an id no tokenizer has. Here it is the first id after the embedding,
        # which is also the one a tokenizer without spare tokens gives `<image>`; the model never looks it up.
        "image_token_index": flat["vocab_size"],
        "tie_word_embeddings": flat.get("tie_word_embeddings", False),
        # transformers 5.17 adds the commit it was read at, which is none of the file.
        "original_config": {name: value for name, value in flat.items() if name != "_commit_hash"},
    }
    for name in ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"):
        if flat.get(name) is not None:
            nested[name] = flat[name]
    return nested


def _image_settings(flat: dict[str, Any]) -> dict[str, Any]:
    """How pictures become squares, in our terms; transposes the pinpoints, which are `(width, height)` there."""
    aspect_ratio = flat.get("image_aspect_ratio") or "square"
    if aspect_ratio not in ("square", "pad", "anyres"):
        raise ValueError(f"image_aspect_ratio {aspect_ratio!r} is none of 'square', 'pad' and 'anyres'.")
    merge_type = flat.get("mm_patch_merge_type") or "flat"
    if merge_type not in ("flat", "spatial", "spatial_unpad"):
        raise ValueError(f"mm_patch_merge_type {merge_type!r} is none of 'flat', 'spatial' and 'spatial_unpad'.")
    settings = {"image_aspect_ratio": aspect_ratio, "patch_merge_type": merge_type}
    pinpoints = flat.get("image_grid_pinpoints")
    if aspect_ratio == "anyres" and pinpoints is not None:
        if isinstance(pinpoints, str):  # as the command line of the original gives it: "[(336, 672), (672, 336)]"
            pinpoints = json.loads(pinpoints.replace("(", "[").replace(")", "]"))
        settings["image_grid_pinpoints"] = [[height, width] for width, height in pinpoints]
    return settings


def original_from_nested(config) -> dict[str, Any]:
    """
    The flat configuration of a `LlavaConfig`: the one it was read from, with what has changed since, or a new one.

    Raises:
        ValueError: if the original has no class for the language model, or the tower has no name to be found by.
    """
    text_config, vision_config = config.text_config, config.vision_config
    if config.original_config is not None:
        flat = dict(config.original_config)
    else:
        if text_config.model_type not in _MODEL_TYPES:
            raise ValueError(
                f"the original LLaVA has no language model of type {text_config.model_type!r}, only "
                f"{', '.join(_MODEL_TYPES)}: keep the format llava-hf."
            )
        if not config.vision_tower_name:
            raise ValueError(
                "the original format names the vision tower instead of describing it, and this model's has no name: "
                "give its name or folder as vision_tower_name, or as --vision_tower of llava-ft convert."
            )
        flat = {name: value for name, value in text_config.to_dict().items() if not name.startswith("_")}
        kind = _MODEL_TYPES[text_config.model_type]
        flat |= {"model_type": kind, "architectures": [_ARCHITECTURES[kind]], "use_mm_proj": True}
        rope = rope_for_older_readers(text_config.rope_parameters)
        scaling = rope.get("rope_scaling")
        if scaling and scaling.keys() == {"type", "rope_type", "factor"}:
            scaling = {name: scaling[name] for name in ("type", "factor")}  # transformers 4.37 takes these two alone
        flat |= {"rope_theta": 10000.0} | rope | {"rope_scaling": scaling}
        for name in ("rope_parameters", "layer_types", "dtype"):  # names of transformers 5
            flat.pop(name, None)
        layers = config.vision_feature_layer
        flat |= {
            "mm_projector_type": config.projector_type,
            "mm_hidden_size": vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers)),
            "mm_vision_select_layer": layers,
            "mm_vision_select_feature": "patch",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "mm_patch_merge_type": config.patch_merge_type,
        }
        if config.image_grid_pinpoints is not None:
            flat["image_grid_pinpoints"] = [[width, height] for height, width in config.image_grid_pinpoints]
        has_class_token = vision_config.model_type == "clip_vision_model"
        if has_class_token and config.vision_feature_select_strategy == "full":
            flat["mm_vision_select_feature"] = "cls_patch"
    flat["mm_vision_tower"] = config.vision_tower_name
    flat["vocab_size"] = text_config.vocab_size
    if {config.image_aspect_ratio, flat.get("image_aspect_ratio")} - {None, "square"}:
        flat["image_aspect_ratio"] = config.image_aspect_ratio or "square"
    if config.dtype is not None:
        flat["torch_dtype"] = str(config.dtype).removeprefix("torch.")
    return flat
