"""The weights in somebody's folder: compared with its configuration before memory is taken for them."""

import re
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.modeling_utils import set_zero3_state

from hf_llava_ft.checkpoints.checked.folder import INDEXES, UNREADABLE, reason_of, shards_named_by
from hf_llava_ft.checkpoints.files import local_file, refuse_what_is_no_file
from hf_llava_ft.errors import UserError
from hf_llava_ft.modeling.configuration_llava import LlavaConfig
from hf_llava_ft.modeling.modeling_llava import LlavaForCausalLM
from hf_llava_ft.modeling.part_names_llava import LANGUAGE_MODEL, VISION_TOWER
from hf_llava_ft.modeling.weight_names_llava import name_in_memory

_FILES = ("model.safetensors", "pytorch_model.bin")
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
    try:
        # As if it were divided among processes already: under ZeRO-3 it would be, and there is nothing to divide.
        with torch.device("meta"), set_zero3_state():
            expected = {name: list(each.shape) for name, each in LlavaForCausalLM(config).state_dict().items()}
    except UNREADABLE as error:
        raise UserError(f"{path}: no model can be made by its config.json: {reason_of(error)}") from error
    for name, shape in shapes.items():
        if name in expected and expected[name] != shape:
            raise UserError(
                f"{path}: the weight {name} has the shape {shape} in the file, and by config.json it has "
                f"{expected[name]}."
            )
    strange = [name for name in shapes if name not in expected and not name.endswith(_COMPUTED)]
    if strange and not any(name in shapes for name in expected if name.startswith(f"model.{LANGUAGE_MODEL}.")):
        raise UserError(
            f"{path}: config.json is of a {config.text_config.model_type}, and the files hold weights that it has no "
            f"place for, {min(strange)} among them."
        )


def _shapes(path: str, revision: str | None) -> dict[str, list[int]]:
    """Shapes by name in memory; nothing for what is not here."""
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
    return {
        name_in_memory(name).replace("vision_tower.vision_model.", "vision_tower."): each
        for name, each in found.items()
    }


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
