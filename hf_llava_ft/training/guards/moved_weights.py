"""That exactly those weights move which are said to train: looked at in the first steps of every run.

Of each parameter a checksum is kept, so a change of a single weight is seen. A frozen parameter that moved ends the
run. A trainable one has to move in the first step that would move it, which is not always the first of all: a gradient
may be zero (LoRA's A while B is zero, the projector in a batch of text), the learning rate may be (in warm-up), fp16
may have skipped the step, and a step may be smaller than the rounding of a bfloat16 weight. So hooks on the gradients
say which parameters should move.

What may surprise: under FSDP, and with optimizers whose steps are not of the size of the learning rate, only the
frozen parameters are held to what was said.
"""

from typing import Any

import torch
import torch.distributed
from transformers import TrainerCallback

from hf_llava_ft.training.fsdp import uses_fsdp

# By then each parameter that any gradient reaches has had one; what has not may be what the data does not use.
MAX_STEPS = 10
_MAX_NAMED = 5
_CHUNK = 2**22  # elements looked at together
# Adam moves a weight by about the learning rate, and by less where a gradient is as small as its epsilon of 1e-8, or
# as the noise that stands for zero: keys have a bias that the softmax takes out again.
_OPTIMIZERS = ("adamw", "paged_adamw", "lion", "paged_lion")
_SHARE_OF_A_STEP = 0.1
_LEAST_GRADIENT = 1e-7
_LEAST_SHARE_OF_THE_LARGEST = 1e-4


class WrongWeightsMoved(RuntimeError):
    """What trains is not what was said to train."""


class MovedWeights(TrainerCallback):
    """
    Checks in the first steps that exactly the trainable parameters move; a callback of the Trainer.

    It reads all weights once before the first step and once after each until all that train have moved, for at most
    `MAX_STEPS` steps; it keeps eight bytes for each parameter.

    Raises:
        WrongWeightsMoved: in all processes, with names of parameters.
    """

    def __init__(self):
        self._hooks: list[Any] = []
        self._steps_left = 0

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        named = dict(model.named_parameters())
        self._names, self._parameters = list(named), list(named.values())
        self._trains = torch.tensor([parameter.requires_grad for parameter in self._parameters])
        self._before = checksums(self._parameters)
        self._has_moved = torch.zeros(len(named), dtype=torch.bool)
        self._optimizer, self._steps_left = optimizer, MAX_STEPS
        self._group_of = {id(each): group for group in optimizer.param_groups for each in group["params"]}
        self._forget_gradients()
        if not str(getattr(args.optim, "value", args.optim)).startswith(_OPTIMIZERS) or uses_fsdp(args):
            return
        for index, parameter in enumerate(self._parameters):
            if parameter.requires_grad and not hasattr(parameter, "full_tensor"):
                see = lambda gradient, index=index: self._see(index, gradient)  # noqa: E731
                self._hooks.append(parameter.register_hook(see))

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        if not self._steps_left:
            return
        strongest, largest = self._gradients()
        self._forget_gradients()
        if getattr(optimizer, "step_was_skipped", False):  # all processes skip together
            return
        now = checksums(self._parameters)
        moved = torch.tensor([before != after for before, after in zip(self._before, now, strict=True)])
        is_known = torch.tensor([each is not None for each in now])
        found = torch.stack((moved.float(), is_known.float(), strongest, largest.expand(len(moved))))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            found = found.to(args.device)
            torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
            found = found.cpu()
        moved, is_known, (strongest, largest) = found[0].bool(), found[1].bool(), found[2:]
        least = torch.clamp(largest * _LEAST_SHARE_OF_THE_LARGEST, min=_LEAST_GRADIENT * self._loss_scale())
        should_move = (strongest >= least) & largest.isfinite() & is_known
        self._has_moved |= moved
        self._steps_left -= 1
        self._refuse("moved, although they are frozen", moved & ~self._trains, state.global_step)
        self._refuse("train and did not move", should_move & ~self._has_moved, state.global_step)
        if not self._steps_left or bool(self._has_moved[self._trains].all()):
            self._stop()

    def on_train_end(self, args, state, control, **kwargs):
        self._stop()

    def _refuse(self, what: str, which: torch.Tensor, step: int) -> None:
        indices = which.nonzero().flatten().tolist()
        if not indices:
            return
        self._stop()
        names = ", ".join(self._names[index] for index in indices[:_MAX_NAMED])
        more = f" and {len(indices) - _MAX_NAMED} more" if len(indices) > _MAX_NAMED else ""
        raise WrongWeightsMoved(
            f"in step {step} weights {what}: {names}{more}. The run ends here, because its result would not be what "
            f"the table above says: a callback, an optimizer of your own or a version of a library may be the cause."
        )

    def _stop(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._steps_left = [], 0
        self._parameters, self._optimizer, self._group_of = [], None, {}

    def _forget_gradients(self) -> None:
        self._strongest: dict[int, torch.Tensor] = {}
        self._largest: dict[int, torch.Tensor] = {}

    def _see(self, index: int, gradient: torch.Tensor) -> None:
        """Keeps the largest gradient of a parameter, and the largest one that a step would move a weight by."""
        parameter, rate = self._parameters[index], self._rate(index)
        if parameter.shape != gradient.shape:
            return
        largest = strongest = torch.zeros((), device=gradient.device)
        weights, gradients = parameter.detach().reshape(-1), gradient.detach().reshape(-1)
        for weight, slope in zip(weights.split(_CHUNK), gradients.split(_CHUNK), strict=True):
            size = slope.abs().float()
            stepped = weight - (_SHARE_OF_A_STEP * rate * slope.sign()).to(weight.dtype)
            largest = torch.maximum(largest, size.max())
            strongest = torch.maximum(strongest, torch.where(stepped != weight, size, 0.0).max())
        self._largest[index] = torch.maximum(self._largest.get(index, largest), largest)
        self._strongest[index] = torch.maximum(self._strongest.get(index, strongest), strongest)

    def _gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`float[N]`, the strongest gradient of each parameter, and `float[]`, the largest of all."""
        strongest = torch.zeros(len(self._parameters))
        if not self._largest:
            return strongest, torch.zeros(())
        device = next(iter(self._largest.values())).device
        indices = torch.tensor(list(self._strongest))
        strongest[indices] = torch.stack([each.to(device) for each in self._strongest.values()]).cpu()
        largest = torch.stack([each.to(device) for each in self._largest.values()]).max().cpu()
        # Not a number where something overflowed: it says nothing then.
        return strongest.nan_to_num(0.0, posinf=0.0), largest.nan_to_num(torch.inf)

    def _rate(self, index: int) -> float:
        """The learning rate of a parameter in the coming step; the least of all where it is in no group, as under
        DeepSpeed, whose groups hold tensors of its own."""
        own = self._group_of.get(id(self._parameters[index]))
        return min((float(group["lr"]) for group in ([own] if own else self._optimizer.param_groups)), default=0.0)

    def _loss_scale(self) -> float:
        """What fp16 has multiplied the gradients by."""
        scaler = getattr(self._optimizer, "scaler", None)
        if scaler is not None:
            return float(scaler.get_scale())
        return float(getattr(getattr(self._optimizer, "optimizer", None), "loss_scale", 1.0))


def checksums(parameters: list[torch.nn.Parameter]) -> list[int | None]:
    """
    One number for each parameter, another one if any of its weights is another; of what this process holds of it. None
    where that is not in memory.
    """
    sums = [_checksum(held_here(parameter)) for parameter in parameters]
    found: dict[int, int] = {}
    for device in {each.device for each in sums if each is not None}:
        there = [index for index, each in enumerate(sums) if each is not None and each.device == device]
        values = torch.stack([sums[index] for index in there]).tolist()  # type: ignore[misc]
        found.update(zip(there, values, strict=True))
    return [found.get(index) for index in range(len(sums))]


def held_here(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """The part of a parameter that is here under ZeRO-3 and FSDP2, else all of it."""
    part: Any = getattr(parameter, "ds_tensor", None)
    if part is not None:
        return part if part.status.name == "AVAILABLE" else None  # not where it is kept on a disk
    if hasattr(parameter, "to_local"):
        return parameter.to_local()
    return None if parameter.device.type == "meta" else parameter


def _checksum(weights: torch.Tensor | None) -> torch.Tensor | None:
    """`int64[]`, the sum of the bits, eight bytes at a time, modulo 2^64."""
    if weights is None:
        return None
    flat = weights.detach().reshape(-1)
    whole = flat.numel() * flat.element_size() // 8 * 8 // flat.element_size()
    if flat.storage_offset() * flat.element_size() % 8:
        whole = 0
    total = flat[:whole].view(torch.int64).sum()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    return total + flat[whole:].view(bits).sum(dtype=torch.int64)
