"""Bytes of the states of training: weights, gradients and optimiser, and how the engines divide them."""

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from hf_llava_ft.estimate.trace import quantized_weights
from hf_llava_ft.settings.arguments import TuningArguments

Engine = Literal["single", "ddp", "zero2", "zero2_offload", "zero3", "zero3_offload"]
# Elements that DeepSpeed's settings allow in a buffer where nothing is said: its own defaults.
DEFAULT_BUCKET = 500_000_000
DEFAULT_LIVE = 1_000_000_000
_SCALE_BLOCK, _NESTED_BLOCK = 64, 256  # weights that share a scale, and scales that share one (bitsandbytes)
_STATE_BYTES_OF_8_BITS = 2 + 2 * 4 / 256  # two states of a byte, and a float32 for 256 of each
_STATE_8_BITS_FROM = 4096  # smaller tensors keep states of float32


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one device, or in its share of the host's memory for what is offloaded."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "host")


def quantized_bytes(weight: torch.Tensor, tuning: TuningArguments) -> float:
    """Bytes of a linear layer's weight in the few bits that `tuning` asks for, with its scales."""
    count = weight.numel()
    if tuning.bits == 8:
        return count + 4 * weight.shape[0]  # a float32 for each row
    codes = 16 * 4  # the sixteen numbers that four bits stand for
    scales = -(-count // _SCALE_BLOCK)
    if not tuning.double_quant:
        return -(-count // 2) + 4 * scales + codes
    # A byte a scale, a float32 for 256 of them, their mean, and the 256 numbers that a byte stands for.
    return -(-count // 2) + scales + 4 * -(-scales // _NESTED_BLOCK) + 4 + 256 * 4 + codes


def state_bytes(model: Any, tuning: TuningArguments, optim: str = "adamw_torch_fused") -> StateBytes:
    """
    The states on a single device, of a model from `build_model`, or a real one.

    Raises:
        ValueError: for an optimiser other than AdamW.
    """
    if not optim.startswith(("adamw_torch", "adamw_bnb_8bit", "adamw_8bit", "adamw_apex", "paged_adamw")):
        raise ValueError(f"--optim {optim}: only the states of AdamW are known; estimate with adamw_torch.")
    few_bits = {id(weight) for _, weight in quantized_weights(model)} if tuning.bits < 16 else set()
    weights = sum(
        quantized_bytes(each, tuning) if id(each) in few_bits else each.nbytes for each in model.parameters()
    )
    weights += sum(each.nbytes for each in model.buffers())
    trained = [each for each in model.parameters() if each.requires_grad]
    if "8bit" in optim:
        optimizer = sum(
            each.numel() * (_STATE_BYTES_OF_8_BITS if each.numel() >= _STATE_8_BITS_FROM else 8) for each in trained
        )
    else:
        # Both means have the dtype of the weight; each parameter has a step of 4 bytes beside them.
        optimizer = sum(2 * each.nbytes + 4 for each in trained)
    return StateBytes(weights, sum(each.nbytes for each in trained), optimizer)


def divided(
    states: StateBytes,
    trained: int,
    engine: Engine,
    devices: int,
    *,
    element: int = 2,
    bucket: int = DEFAULT_BUCKET,
    live: int = DEFAULT_LIVE,
) -> StateBytes:
    """
    What of `states` one of `devices` holds.

    DeepSpeed keeps a float32 copy of what trains beside AdamW's two states, 12 bytes a weight, and divides them; from
    ZeRO-2 on the gradients, in ZeRO-3 the weights. Small weights that ZeRO-3 does not divide are not counted apart.

    Args:
        states ([`StateBytes`]): of a single device, with the weights in what DeepSpeed turns them into.
        trained (`int`): weights that train.
        element (`int`): bytes of a weight in that dtype.
        bucket (`int`): elements of a buffer in which gradients are sent; two are in use.
        live (`int`): elements of ZeRO-3's weights that may be whole at a time.
    """
    if engine == "single":
        return states
    if engine == "ddp":
        # The buckets hold a copy of all gradients.
        return StateBytes(states.weights, states.gradients, states.optimizer, states.gradients)
    gradients, optimizer = trained * element / devices, 12 * trained / devices
    weights, host = states.weights, 0.0
    buffers: float = 2 * element * min(bucket, trained)
    if engine.startswith("zero3"):
        buffers += min(live * element, weights)
        weights /= devices
    if engine.endswith("offload"):
        host += optimizer
        optimizer = 0.0
        gradients_on_host = 4 * trained / devices
        host += gradients_on_host
        gradients = 0.0
        if engine == "zero3_offload":
            host += weights
            weights = 0.0
    return StateBytes(weights, gradients, optimizer, buffers, host)
