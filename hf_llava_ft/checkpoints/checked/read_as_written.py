"""What transformers does to a folder without a word when it loads it: said, or refused."""

import logging
from collections import Counter
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig

from hf_llava_ft.checkpoints.files import find_file, first_line, read_json
from hf_llava_ft.errors import UserError

logger = logging.getLogger(__name__)

_GENERATION = "generation_config.json"
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}  # of a float, as safetensors calls it


def check_generation_config(path: str, revision: str | None = None) -> None:
    """
    transformers takes settings of generation that it can't read for none, so that a model would no longer stop where
    it did.

    Raises:
        UserError: if `path` has a generation_config.json that says nothing.
    """
    settings = read_json(path, _GENERATION, revision)
    if settings is None:
        return
    try:
        GenerationConfig.from_dict(settings)
    except Exception as error:  # whatever a value of a wrong type runs into
        raise UserError(f"{path}: {_GENERATION} cannot be read: {first_line(error)}.") from error


def say_what_loading_rounds(path: str, revision: str | None, dtype: torch.dtype) -> None:
    """A folder of which some weights are float32 and the others in 16 bits is loaded in the one dtype that config.json
    names, which rounds the first: that is logged. Of safetensors alone."""
    found = _float_dtypes(path, revision)
    rounded = sum(count for name, count in found.items() if _BITS[name] > torch.finfo(dtype).bits)
    if len(found) > 1 and rounded:
        logger.warning(
            f"{path} is in more than one dtype: {rounded} of its {sum(found.values())} weights are read in "
            f"{str(dtype).removeprefix('torch.')}, as the others are, and rounded by that; --dtype float32 keeps them."
        )


def is_in_few_bits(path: str, revision: str | None = None) -> bool:
    """Whether the weights at `path` are quantised."""
    config: dict[str, Any] = read_json(path, "config.json", revision) or {}
    return bool(config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config"))


def _float_dtypes(path: str, revision: str | None) -> Counter[str]:
    """How many weights there are of each float dtype; nothing of the weights is read."""
    index = read_json(path, "model.safetensors.index.json", revision)
    names = ["model.safetensors"] if index is None else sorted(set(index.get("weight_map", {}).values()))
    found: Counter[str] = Counter()
    for file in filter(None, (find_file(path, name, revision) for name in names)):
        try:
            with safe_open(file, framework="pt") as tensors:
                found.update(tensors.get_slice(name).get_dtype() for name in tensors.keys())
        except (OSError, SafetensorError):  # said by who loads it
            continue
    return Counter({name: count for name, count in found.items() if name in _BITS})
