"""The weights of a folder compared with those that the native class expects on disk: the same names, the same shapes.

A server loads by name, and a name it does not know is at best an error and at worst a part left at random values.
"""

import re
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from hf_llava_ft.errors import UserError

# From the names of transformers' modules to those of llava-hf on disk. transformers 5.17 still has `vision_model.`.
_ON_DISK = (
    (r"^model\.vision_tower\.(?:vision_model\.)?", "vision_tower.vision_model."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.image_newline$", "image_newline"),
    (r"^lm_head\.", "language_model.lm_head."),
)


def written_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in the safetensors files of `folder`, by name; reads headers only."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return shapes


def expected_shapes(config) -> dict[str, tuple[int, ...]]:
    """What transformers' own model of `config` holds, under the names of llava-hf."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    expected = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in _ON_DISK:
            name = re.sub(pattern, replacement, name)
        expected[name] = tuple(tensor.shape)
    if config.tie_word_embeddings:
        expected.pop("language_model.lm_head.weight", None)
    return expected


def check_names(folder: Path, config) -> int:
    """
    The number of tensors in `folder`, a native LLaVA of `config`.

    Raises:
        UserError: if one is missing, too many, or of another shape.
    """
    written, expected = written_shapes(folder), expected_shapes(config)
    if config.tie_word_embeddings:
        written.pop("language_model.lm_head.weight", None)
    for name in sorted(written.keys() | expected.keys()):
        if written.get(name) != expected.get(name):
            raise UserError(
                f"the exported weights are not those of a native LLaVA: {name} is {_said(written.get(name))} in the "
                f"files and {_said(expected.get(name))} in the model."
            )
    return len(written)


def _said(shape: tuple[int, ...] | None) -> str:
    return "not" if shape is None else "x".join(map(str, shape)) or "a number"
