"""The weights in somebody's folder: compared with its configuration before memory is taken for them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_safetensors_metadata, is_offline_mode
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from safetensors import safe_open
from transformers.modeling_utils import set_zero3_state

from hf_llava_ft.checkpoints.checked.folder import INDEXES, UNREADABLE, reason_of, shards_named_by
from hf_llava_ft.checkpoints.files import local_file, refuse_what_is_no_file
from hf_llava_ft.errors import UserError
from hf_llava_ft.library_differences import HTTPError
from hf_llava_ft.modeling.configuration_llava import LlavaConfig
from hf_llava_ft.modeling.modeling_llava import LlavaForCausalLM
from hf_llava_ft.modeling.part_names_llava import LANGUAGE_MODEL, VISION_TOWER
from hf_llava_ft.modeling.weight_names_llava import name_in_memory

_FILES = ("model.safetensors", "pytorch_model.bin")
_TIED = ("lm_head.weight",)
_BESIDE_A_TOWER = ("text_model.", "text_projection.", "visual_projection.", "logit_")  # in a whole CLIP
_COMPUTED = ("inv_freq", "position_ids")  # buffers that older transformers saved


def check_weights(path: str, config: LlavaConfig, revision: str | None = None) -> None:
    """
    Compares the shapes that follow from `config` with those in the headers of the files of weights.

    Raises:
        UserError: if they are others, with the tensor and both shapes; or if a file is damaged or holds code.
    """
    shapes = _shapes(path, revision)
    if not shapes or getattr(config, "quantization_config", None):
        return
    for part, name in ((config.text_config, LANGUAGE_MODEL), (config.vision_config, VISION_TOWER)):
        found = [int(match[1]) for each in shapes if (match := re.search(rf"\b{name}\..*?layers\.(\d+)\.", each))]
        most = part.num_hidden_layers
        if found and most > max(found) + 1:
            raise UserError(
                f"{path}: config.json says {most} layers of the {name}, and the files of weights hold "
                f"{max(found) + 1}: it is damaged, or was not saved whole."
            )
    expected = _expected(path, lambda: LlavaForCausalLM(config))
    _refuse_other_shapes(path, shapes, expected)
    strange = [name for name in shapes if name not in expected and not name.endswith(_COMPUTED)]
    if strange and not any(name in shapes for name in expected if name.startswith(f"model.{LANGUAGE_MODEL}.")):
        raise UserError(
            f"{path}: config.json is of a {config.text_config.model_type}, and the files hold weights that it has no "
            f"place for, {min(strange)} among them."
        )


def check_part_weights(path: str, config: Any, kind: Any, revision: str | None = None) -> None:
    """
    As [`check_weights`], of a vision tower or a language model by itself, which has all its weights.

    Args:
        config: of the part, in transformers' own form.
        kind: the Auto class that makes it.
    """
    shapes = {_of_part(name): shape for name, shape in _shapes(path, revision).items()}
    if not shapes or getattr(config, "quantization_config", None):
        return
    found = [int(match[1]) for each in shapes if (match := re.match(r"(?:encoder\.)?layers\.(\d+)\.", each))]
    if found and config.num_hidden_layers > max(found) + 1:
        raise UserError(
            f"{path}: config.json says {config.num_hidden_layers} layers, and the files of weights hold "
            f"{max(found) + 1}: it is damaged, or was not saved whole."
        )
    made = _expected(path, lambda: kind.from_config(config, trust_remote_code=False))
    expected = {_of_part(name): shape for name, shape in made.items()}
    _refuse_other_shapes(path, shapes, expected)
    strange = [name for name in shapes if name not in expected and not name.startswith(_BESIDE_A_TOWER)]
    lacking = sorted(name for name in expected if name not in shapes and not name.endswith((*_COMPUTED, *_TIED)))
    # transformers puts several of a file into one, of experts say: then the names of both are others.
    if lacking and all(name.endswith((*_COMPUTED, *_TIED)) for name in strange):
        raise UserError(
            f"{path}: its files lack {len(lacking)} of the weights, {lacking[0]} among them: it is damaged, or was "
            f"not saved whole."
        )


def _of_part(name: str) -> str:
    """The name of a weight within its part, in a file or in memory, whichever release wrote it."""
    for prefix in ("model.", f"{LANGUAGE_MODEL}.", f"{VISION_TOWER}.", "vision_model."):
        name = name.removeprefix(prefix)
    return name


def _expected(path: str, make: Callable[[], torch.nn.Module]) -> dict[str, list[int]]:
    try:
        # As if it were divided among processes already: under ZeRO-3 it would be, and there is nothing to divide.
        with torch.device("meta"), set_zero3_state():
            return {name: list(each.shape) for name, each in make().state_dict().items()}
    except UNREADABLE as error:
        raise UserError(f"{path}: no model can be made by its config.json: {reason_of(error)}") from error


def _refuse_other_shapes(path: str, shapes: dict[str, list[int]], expected: dict[str, list[int]]) -> None:
    for name, shape in shapes.items():
        if name in expected and expected[name] != shape:
            raise UserError(
                f"{path}: the weight {name} has the shape {shape} in the file, and by config.json it has "
                f"{expected[name]}."
            )


def _shapes(path: str, revision: str | None) -> dict[str, list[int]]:
    """Shapes by name in memory; nothing for pickles that are not here."""
    found = _shapes_here(path, revision) or _shapes_on_the_hub(path, revision)
    return {
        name_in_memory(name).replace("vision_tower.vision_model.", "vision_tower."): each
        for name, each in found.items()
    }


def _shapes_on_the_hub(path: str, revision: str | None) -> dict[str, list[int]]:
    """Of safetensors, by their headers alone: before the first download."""
    if Path(path).exists() or is_offline_mode():
        return {}
    try:
        files = get_safetensors_metadata(path, revision=revision).files_metadata.values()
    except (NotASafetensorsRepoError, SafetensorsParsingError, HTTPError, OSError, ValueError):
        return {}  # said by who loads it
    return {name: list(each.shape) for file in files for name, each in file.tensors.items()}


def _shapes_here(path: str, revision: str | None) -> dict[str, list[int]]:
    names = [name for name in _FILES[:1] if local_file(path, name, revision) is not None]
    for index in INDEXES[: 1 if names else 2]:
        if not names and local_file(path, index, revision) is not None:
            names = shards_named_by(path, index, revision)
    if not names:
        names = [name for name in _FILES[1:] if local_file(path, name, revision) is not None]
    found: dict[str, list[int]] = {}
    for name in names:
        file = local_file(path, name, revision)
        if file is None:
            if Path(path).is_dir():
                raise UserError(f"{path}: its index names {name}, which is not there: copy it there.")
            return {}
        found |= _shapes_in(file)
    return found


def _shapes_in(file: Path) -> dict[str, list[int]]:
    refuse_what_is_no_file(file)
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                return {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
        try:
            loaded = torch.load(file, map_location="meta", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return {}  # of a PyTorch before 1.6: read when it is loaded
    except UNREADABLE as error:
        raise UserError(f"{file} is no readable file of weights: {reason_of(error)}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{file} is no readable file of weights: it holds something else than tensors.")
    return {name: list(each.shape) for name, each in loaded.items() if isinstance(each, torch.Tensor)}


def refuse_no_numbers(model: torch.nn.Module, path: str) -> None:
    """
    Raises:
        UserError: if weights of the model are NaN or infinite.
    """
    for name, parameter in model.named_parameters():
        weights = getattr(parameter, "ds_tensor", parameter).detach()  # under ZeRO-3 the part that is here
        if weights.device.type == "meta" or not weights.is_floating_point() or not weights.numel():
            continue
        # A sum is one pass without a copy; it may overflow where every number is finite.
        if not torch.isfinite(weights.sum(dtype=torch.float32)) and not torch.isfinite(weights).all():
            raise UserError(
                f"{path} holds NaN or infinite numbers in {name}: it is damaged, or its training went wrong; use an "
                f"earlier checkpoint (generate, chat and train take it with --allow_nan)."
            )
