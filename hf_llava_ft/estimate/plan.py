"""The estimate of one run: states and micro-batch together, and the run that fits on a card."""

import dataclasses
from typing import Any

import torch

from hf_llava_ft.errors import UserError
from hf_llava_ft.estimate.memory import DEFAULT_BUCKET, DEFAULT_LIVE, Engine, StateBytes, divided, state_bytes
from hf_llava_ft.estimate.pictures import Picture, picture_of, worst_picture
from hf_llava_ft.estimate.trace import Batch, MicroBatch, Precision, build_model, trace_micro_batch
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.training.speed.feature_sizes import bytes_of_a_crop, stored_dtype
from hf_llava_ft.training.tuning import TrainedPart, trained_parts

GIB = 2**30
# Of a card, for the CUDA context, cuBLAS and what the allocator cannot use: assumed, not measured.
SET_ASIDE = 1.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """
    Args:
        engine (`Engine`): what divides the states.
        devices (`int`): that train together.
        accumulation (`int`): micro-batches of an optimiser step.
        bucket, live (`int`): see `divided`.
    """

    engine: Engine
    devices: int
    accumulation: int
    gradient_checkpointing: bool
    batch: Batch
    bucket: int = DEFAULT_BUCKET
    live: int = DEFAULT_LIVE


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on one device, and what trains; `worst` is the picture that could take most tokens, `kept` the bytes on
    disk of what a frozen tower makes of a picture."""

    plan: Plan
    picture: Picture
    worst: Picture
    parts: list[TrainedPart]
    states: StateBytes
    micro_batch: MicroBatch
    kept: int

    @property
    def memory(self) -> dict[str, float]:
        """Bytes by part; `temporary` is what comes on top of all that is held at the worst moment."""
        states, micro = self.states, self.micro_batch
        return {
            "weights": states.weights,
            "gradients": states.gradients,
            "optimizer states": states.optimizer,
            "engine buffers": states.buffers,
            "activations": micro.held - micro.logits,
            "logits and loss": micro.logits,
            "temporary": micro.peak - micro.held,
        }

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    def fits(self, card: float) -> bool:
        """Whether it fits on a card of so many GiB."""
        return self.total <= (card - SET_ASIDE) * GIB

    def seconds_a_step(self, tflops: float, utilization: float) -> float:
        """Of an optimiser step, with all its micro-batches."""
        return self.micro_batch.operations * self.plan.accumulation / (tflops * 1e12 * utilization)


class Estimator:
    """Answers for one model and its tuning, and keeps what it has traced."""

    def __init__(self, config: Any, tuning: TuningArguments, dtype: torch.dtype, autocast: bool, attention, optim):
        self.config, self.tuning, self.attention, self.optim = config, tuning, attention, optim
        self.dtype, self.autocast = dtype, autocast
        self._states: dict[Precision, tuple[list[TrainedPart], StateBytes]] = {}
        self._micro_batches: dict[tuple[Precision, Batch, bool, bool], MicroBatch] = {}

    def estimate(self, plan: Plan) -> Estimate:
        under_zero = plan.engine.startswith("zero")
        whole = torch.bfloat16 if self.autocast else torch.float32
        precision = Precision(
            self.dtype, autocast=self.autocast and not under_zero, whole_model=whole if under_zero else None
        )
        parts, states = self._states_in(precision)
        states = divided(
            states,
            sum(part.num_trainable for part in parts),
            plan.engine,
            plan.devices,
            element=whole.itemsize,
            bucket=plan.bucket,
            live=plan.live,
        )
        picture = picture_of(self.config, plan.batch.picture_size)
        stored = stored_dtype(self.config, self.dtype, "bf16" if self.autocast else None)  # fp16 takes as much
        kept = picture.crops * bytes_of_a_crop(self.config, stored)
        micro_batch = self._micro_batch(precision, plan)
        return Estimate(plan, picture, worst_picture(self.config), parts, states, micro_batch, kept)

    def _states_in(self, precision: Precision) -> tuple[list[TrainedPart], StateBytes]:
        if precision not in self._states:
            model = build_model(self.config, self.tuning, precision, self.attention)
            self._states[precision] = trained_parts(model), state_bytes(model, self.tuning, self.optim)
        return self._states[precision]

    def _micro_batch(self, precision: Precision, plan: Plan) -> MicroBatch:
        whole_logits = plan.engine.startswith("zero3")  # which shares the head out
        key = precision, plan.batch, plan.gradient_checkpointing, whole_logits
        if key not in self._micro_batches:
            self._micro_batches[key] = trace_micro_batch(
                self.config,
                self.tuning,
                precision,
                plan.batch,
                gradient_checkpointing=plan.gradient_checkpointing,
                attention=self.attention,
                whole_logits=whole_logits,
            )
        return self._micro_batches[key]

    def fit(self, plan: Plan, card: float, global_batch: int) -> Estimate:
        """The largest micro-batch on a card of so many GiB, without gradient checkpointing if there is one."""
        share, rest = divmod(global_batch, plan.devices)
        if rest or share == 0:
            raise UserError(f"--global_batch {global_batch} is no multiple of {plan.devices} devices.")
        sizes = [size for size in range(share, 0, -1) if share % size == 0]
        smallest = 0.0
        for checkpointing in (False, True):
            one, two = (
                self.estimate(_with_batch(plan, size, share, checkpointing)).total for size in (1, min(2, share))
            )
            smallest = one
            for size in sizes:
                if one + (two - one) * (size - 1) <= (card - SET_ASIDE) * GIB:
                    found = self.estimate(_with_batch(plan, size, share, checkpointing))
                    if found.fits(card):
                        return found
        raise UserError(
            f"--fit {card:g}: a single row needs {smallest / GIB:.1f} GiB with gradient checkpointing: use "
            f"{self._less_memory(plan.engine)}."
        )

    def _less_memory(self, engine: Engine) -> str:
        """What needs less memory than this kind of training in this engine."""
        ways = ["shorter rows"]
        if not self.tuning.is_lora:
            ways.append("--train_type lora")
        elif self.tuning.bits == 16:
            ways.append("--train_type qlora")
        if self.tuning.bits == 16 and not engine.startswith("zero3"):
            ways.append("--engine zero3 on more devices")
        if self.tuning.bits == 16 and engine != "zero3_offload":
            ways.append("--engine zero3_offload")
        return f"{', '.join(ways[:-1])} or {ways[-1]}" if len(ways) > 1 else ways[0]


def _with_batch(plan: Plan, size: int, share: int, checkpointing: bool) -> Plan:
    return dataclasses.replace(
        plan,
        batch=dataclasses.replace(plan.batch, size=size),
        accumulation=max(1, share // size),
        gradient_checkpointing=checkpointing,
    )
