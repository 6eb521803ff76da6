"""A model to be asked: on its device, in its dtype or in few bits."""

from typing import Any

import torch

from hf_llava_ft.checkpoints.few_bits import few_bits_config
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.errors import UserError
from hf_llava_ft.settings.machine import has_bf16_gpu

DTYPES = ("auto", "float32", "bfloat16", "float16")


def answering_device(device: str | None = None) -> torch.device:
    """
    The device of that name, or by default the best there is.

    Raises:
        UserError: if this machine has none of that name.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if _has_mps() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"--device {device} is no device: use cpu, cuda, cuda:1 or mps.") from error
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(_has_mps())}.get(found.type, 0)
    if (found.index or 0) >= count:
        has = f"PyTorch sees {torch.cuda.device_count()} NVIDIA or AMD GPUs" + " and Apple's" * _has_mps()
        raise UserError(f"--device {device}: there is no such device here, where {has}: use cpu, or leave it out.")
    return found


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def load_for_answering(
    path: str,
    *,
    base: str | None = None,
    revision: str | None = None,
    attn_implementation: str = "sdpa",
    dtype: str = "auto",
    bits: int | None = None,
    device: str | None = None,
    processor: Any = None,
    allow_nan: bool = False,
) -> tuple[Any, Any]:
    """
    Model and processor of `path`: an adapter, a merged, native or original checkpoint.

    Args:
        dtype (`str`): of the weights; `auto` as they are saved.
        bits (`int`, *optional*): 4 or 8 for the weights of the language model, through bitsandbytes.
        device (`str`, *optional*): by default the best there is.
        processor (*optional*): that of `path`, where it is loaded already.

    Raises:
        UserError: if there is no LLaVA at `path`, or not what it needs.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is no dtype of weights: use {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")
    place = answering_device(device)
    options: dict[str, Any] = {}
    if bits is not None:
        options["quantization_config"] = few_bits_config(bits, _compute_dtype(dtype, place))
        if place.type != "cpu":  # bitsandbytes quantises while the weights move there
            options["device_map"] = {"": place}
    if processor is None:
        processor = load_processor(path, revision, base=base)
    model: Any = load_model(
        path,
        processor,
        base=base,
        revision=revision,
        attn_implementation=attn_implementation,
        dtype=dtype,
        allow_nan=allow_nan,
        **options,
    )
    return (model if bits is not None else model.to(place)).eval(), processor


def _compute_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """What weights in few bits are multiplied in."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if has_bf16_gpu() else torch.float16
