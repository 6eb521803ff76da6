"""The settings in somebody's folder, looked at before a library reads them: kinds, numbers, contradictions.

Of a repository on the Hub, what is in the cache is looked at.
"""

import math
import re
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from hf_llava_ft.checkpoints.files import local_file, read_json
from hf_llava_ft.errors import UserError
from hf_llava_ft.modeling.configuration_llava import LlavaConfig
from hf_llava_ft.releases import is_of_a_changed_library, newer_than_tried

# The most that a model may have of each; far beyond the largest there are.
_COUNTS = {
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**14,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "vocab_size": 2**23,
    "max_position_embeddings": 2**31,
    "image_size": 2**14,
    "patch_size": 2**10,
    "num_channels": 2**6,
}
_MAY_BE_NULL = ("num_key_value_heads", "head_dim")
_NUMBERS = ("rms_norm_eps", "layer_norm_eps", "rope_theta", "attention_dropout", "initializer_range")
_SETTINGS = (
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.json", "adapter_config.json"),
)
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_LARGEST_PICTURE = 2**14

# What libraries raise for a folder that is damaged or contradicts itself.
UNREADABLE = (
    *(OSError, ValueError, RuntimeError, KeyError, EOFError, TypeError, AttributeError, IndexError, ArithmeticError),
    *(AssertionError, SafetensorError, UnpicklingError, StrictDataclassError),
)


def reason_of(error: BaseException) -> str:
    """
    What a library says of a folder, in one line.

    Raises:
        BaseException: `error`, if a release newer than we know may have made it.
    """
    if is_of_a_changed_library(error) and newer_than_tried():
        raise error
    text = " ".join(str(error).split()).rstrip(".:")
    if "weights_only" in text or "Unsupported global" in text:
        return "its file of weights holds code, which is not run: ask whoever made it for safetensors."
    if isinstance(error, RecursionError):
        return "its settings are nested too deeply."
    if isinstance(error, KeyError):
        return f"there is no {text}."
    kind = "" if isinstance(error, (OSError, ValueError, SafetensorError)) else f" ({type(error).__name__})"
    return f"{text[:300] or type(error).__name__}{kind}."


def check_settings(path: str, revision: str | None = None) -> None:
    """
    Raises:
        UserError: if one of the files of settings that are here holds no JSON object, or an index of weights names a
            file outside of the folder.
    """
    for name in _SETTINGS:
        if local_file(path, name, revision) is not None:
            content = read_json(path, name, revision) or {}
            if name in ("config.json", "adapter_config.json"):
                _check_numbers(path, name, content)
            if name in ("processor_config.json", "preprocessor_config.json"):
                _check_pictures(path, name, content)
    for name in INDEXES:
        if local_file(path, name, revision) is not None:
            shards_named_by(path, name, revision)


def _check_numbers(path: str, file: str, config: dict[str, Any]) -> None:
    for name in ("text_config", "vision_config"):
        if name in config and not isinstance(config[name], dict):
            raise UserError(f"{path}: {name} in {file} is {_shown(config[name])}, and has to be an object.")
    for section in ("", "text_config", "vision_config"):
        values = config.get(section, {}) if section else config
        where = f"{section}." if section else ""
        for name, largest in _COUNTS.items():
            if name in values and not (values[name] is None and name in _MAY_BE_NULL):
                _check_count(path, f"{where}{name} in {file}", values[name], largest)
        _check_heads(path, section or file, values)
        for name in _NUMBERS:
            value = values.get(name)
            if value is not None and not (_is_number(value) and math.isfinite(value)):
                raise UserError(f"{path}: {where}{name} in {file} is {_shown(value)}, and has to be a number.")
        for name in ("rope_parameters", "rope_scaling"):
            if values.get(name) is not None and not isinstance(values[name], dict):
                raise UserError(f"{path}: {where}{name} in {file} is {_shown(values[name])}, and has to be an object.")
        for name in ("dtype", "torch_dtype"):
            value = values.get(name)
            if value is not None and not isinstance(getattr(torch, str(value), None), torch.dtype):
                raise UserError(
                    f"{path}: {where}{name} in {file} is {_shown(value)}, and has to be float32, bfloat16 or float16."
                )
    for name in ("r", "lora_alpha"):
        if file == "adapter_config.json" and name in config and not _is_number(config[name]):
            raise UserError(f"{path}: {name} in {file} is {_shown(config[name])}, and has to be a number.")
    if file == "adapter_config.json":
        if "r" in config:
            _check_count(path, f"r in {file}", config["r"], 2**14)
        base = config.get("base_model_name_or_path")
        if base is not None and not isinstance(base, str):
            raise UserError(f"{path}: base_model_name_or_path in {file} is {_shown(base)}, and has to be a text.")


def _check_heads(path: str, section: str, values: dict[str, Any]) -> None:
    heads, width, groups = (values.get(name) for name in ("num_attention_heads", "hidden_size", _MAY_BE_NULL[0]))
    if heads and width and not values.get("head_dim") and width % heads:
        raise UserError(
            f"{path}: num_attention_heads of {section} is {heads}, which does not divide the hidden_size {width}."
        )
    if heads and groups and heads % groups:
        raise UserError(
            f"{path}: num_key_value_heads of {section} is {groups}, which does not divide num_attention_heads {heads}."
        )


def _check_count(path: str, what: str, value: Any, largest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        raise UserError(f"{path}: {what} is {_shown(value)}, and has to be a whole number from 1 to {largest:,}.")


def _check_pictures(path: str, file: str, settings: dict[str, Any]) -> None:
    inner = settings.get("image_processor", {})
    if not isinstance(inner, dict):
        raise UserError(f"{path}: image_processor in {file} is {_shown(inner)}, and has to be an object.")
    for values in (settings, inner):
        for name in ("size", "crop_size"):
            value = values.get(name)
            if value is None:
                continue
            edges = list(value.values()) if isinstance(value, dict) else [value]
            for edge in edges:
                if edge is not None:
                    _check_count(path, f"{name} in {file}", edge, _LARGEST_PICTURE)
        for name in ("image_mean", "image_std"):
            value = values.get(name)
            each = value if isinstance(value, list) else [value]
            numbers = all(_is_number(one) and math.isfinite(one) for one in each)  # type: ignore[arg-type]
            if value is not None and not numbers:
                raise UserError(f"{path}: {name} in {file} is {_shown(value)}, and has to be three numbers.")
        if values.get("patch_size") is not None:
            _check_count(path, f"patch_size in {file}", values["patch_size"], _COUNTS["patch_size"])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def check_config(path: str, config: LlavaConfig) -> None:
    """
    Raises:
        UserError: if the numbers of a configuration do not go with each other.
    """
    _check_heads(path, "text_config", vars(config.text_config))
    _check_heads(path, "vision_config", vars(config.vision_config))
    vision: Any = config.vision_config
    if vision.patch_size > vision.image_size:
        raise UserError(
            f"{path}: vision_config.patch_size in config.json is {vision.patch_size}, and a picture has "
            f"{vision.image_size} pixels."
        )
    chosen, most = config.vision_feature_layer, vision.num_hidden_layers
    for layer in chosen if isinstance(chosen, (list, tuple)) else [chosen]:
        if isinstance(layer, bool) or not isinstance(layer, int) or not -(most + 1) <= layer <= most:
            raise UserError(
                f"{path}: vision_feature_layer in config.json is {_shown(chosen)}, and the tower has hidden states "
                f"{-(most + 1)} to {most}."
            )
    if config.vision_feature_select_strategy not in ("default", "full"):
        raise UserError(
            f"{path}: vision_feature_select_strategy in config.json is "
            f"{_shown(config.vision_feature_select_strategy)}, and has to be default or full."
        )


def shards_named_by(path: str, index: str, revision: str | None) -> list[str]:
    places = (read_json(path, index, revision) or {}).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{path}: {index} has no weight_map from weights to files.")
    for name in places.values():
        if name in ("", ".", "..") or re.search(r"[/\\:]", name):
            raise UserError(f"{path}: {index} names {_shown(name)}, which is no file in this folder: it is not read.")
    return sorted(set(places.values()))
