"""A finished model in one dtype, the one that it came in and that its config.json names.

What trains does so in float32 (`masters.py`), also on a base in 16 bits. Written so, the folder would be in two
dtypes, of which config.json can name one: whoever loads it rounds the rest without being told. So it is rounded here,
and said. Checkpoints keep what trains as it is.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CONFIG_NAME


@dataclass(frozen=True)
class Rounded:
    """
    Args:
        num_weights (`int`): tensors that were rounded.
        dtype (`torch.dtype`): to which.
        share (`float`): the rounding, relative to the weights, both as root of the sum of squares.
    """

    num_weights: int
    dtype: torch.dtype
    share: float

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.num_weights} weights that trained in float32 are saved in {name}, as the rest of the model is: "
            f"that rounds them by {self.share:.2g} of their size. Checkpoints keep them whole; with --dtype float32 "
            f"the model does."
        )


def in_one_dtype(
    state_dict: dict[str, torch.Tensor], dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], Rounded | None]:
    """
    `state_dict` with all floats in `dtype`, and what that rounded. Tensors that are one, as tied embeddings, stay one;
    those in `dtype` are not copied.
    """
    cast: dict[tuple, torch.Tensor] = {}
    written, off, size, num_weights = {}, 0.0, 0.0, 0
    for name, tensor in state_dict.items():
        if not tensor.is_floating_point() or tensor.dtype == dtype:
            written[name] = tensor
            continue
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device)
        if place not in cast:
            cast[place] = tensor.detach().to(dtype)
            if torch.finfo(dtype).eps > torch.finfo(tensor.dtype).eps:
                num_weights += 1
                off += (tensor.detach() - cast[place].to(tensor.dtype)).double().square().sum().item()
                size += tensor.detach().double().square().sum().item()
        written[name] = cast[place]
    return written, Rounded(num_weights, dtype, (off / size) ** 0.5 if size else 0.0) if num_weights else None


def name_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Has config.json of a saved model name `dtype`; transformers wrote that of the first weight in memory."""
    path, name = folder / CONFIG_NAME, str(dtype).removeprefix("torch.")
    if not path.is_file():
        return  # another process writes
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("dtype", "torch_dtype"):
        if config.get(key) is not None and config[key] != name:
            config[key] = name
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
