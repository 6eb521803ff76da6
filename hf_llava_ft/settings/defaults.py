"""What a run does where nobody said it: by what trains and by the number of rows. docs/settings.md has the reasons.

Learning rates follow from the train type alone. LoRA's rank, epochs, rows per step and warm-up follow from the rows,
which are known when the data is open, and no earlier. Whoever says one of a pair says both: with a learning rate of
the user's own the projector has it too, and with a batch size of the user's own nothing is accumulated.

Sources: haotian-liu/LLaVA, `scripts/v1_5/`, for rates, and for all of a set of its size (665,298 rows); LLaVA-NeXT,
`scripts/train/`, for the tower's rate; arXiv 2106.09685 and 2305.14314 for LoRA of small sets.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_llava_ft.settings.arguments import ModelArguments, TuningArguments
    from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments


DEFAULT = "default"  # the origin of what nobody said


@dataclass(frozen=True)
class Rates:
    """Peak learning rates; None is that of the rest."""

    learning_rate: float
    mm_projector_lr: float | None = None
    mm_vision_tower_lr: float | None = None


RATES: dict[str, Rates] = {
    "lora": Rates(2e-4, mm_projector_lr=2e-5),
    "qlora": Rates(2e-4, mm_projector_lr=2e-5),
    "projector": Rates(1e-3),
    "freeze_vision": Rates(2e-5),
    "full": Rates(2e-5, mm_vision_tower_lr=2e-6),
}


@dataclass(frozen=True)
class BySize:
    """
    Args:
        most_rows (`float`): the largest set that this is for.
        lora_r (`int`): LoRA's rank.
        num_epochs (`int`): how often each row is seen.
        rows_per_step (`int`): of all devices, over accumulation.
    """

    most_rows: float
    lora_r: int
    num_epochs: int
    rows_per_step: int


# The last line is LLaVA-1.5's own, and holds where rows are not counted.
BY_SIZE = (
    BySize(100, lora_r=8, num_epochs=10, rows_per_step=4),
    BySize(1_000, lora_r=16, num_epochs=5, rows_per_step=8),
    BySize(10_000, lora_r=32, num_epochs=3, rows_per_step=16),
    BySize(100_000, lora_r=64, num_epochs=2, rows_per_step=32),
    BySize(math.inf, lora_r=128, num_epochs=1, rows_per_step=128),
)
ROWS_PER_STEP_OF_STAGE_1 = 256  # instead of the last line's
ALPHA_OF_RSLORA = 16  # its scale, alpha / sqrt(r), is made not to need an alpha that grows with the rank
MOST_ROWS_PER_DEVICE = 8  # transformers' own default; the rest of a step is accumulated
WARMUP_SHARE = 0.03
# The first step of a warm-up has the rate 0. A run of fewer steps than this does not give one away.
FEWEST_STEPS_TO_WARM_UP = 100
# Of a pack, where nobody said it: as much as eight long rows, or fewer where a step is to have fewer rows.
MOST_TOKENS_PER_PACK = 8192

OF_RATES = ("learning_rate", "mm_projector_lr", "mm_vision_tower_lr")
OF_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
# What `LlavaTrainingArguments` leaves to what trains, and what it holds until that is known.
UNTIL_KNOWN: dict[str, Any] = {
    "learning_rate": 2e-4,
    "mm_projector_lr": None,
    "mm_vision_tower_lr": None,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "warmup_steps": WARMUP_SHARE,
    "max_tokens_per_batch": None,
}


def groups_by_default(sampler_order: str, sampling_strategy: Any) -> bool:
    """Whether rows are grouped by modality and length where nobody said it: unless they are in another order."""
    return sampler_order == "default" and getattr(sampling_strategy, "value", sampling_strategy) == "random"


def by_size(num_rows: int | None) -> BySize:
    """The line for a set of `num_rows`; None where they are not counted."""
    return next(line for line in BY_SIZE if (math.inf if num_rows is None else num_rows) <= line.most_rows)


def is_by_what_trains(origin: str) -> bool:
    """Whether a setting of this origin follows from what trains."""
    return origin.partition(",")[0].removeprefix(f"{DEFAULT} of ") in RATES


def is_new_projector(vision_tower: str | None, pretrain_mm_mlp_adapter: str | None) -> bool:
    """Whether the projector has learned nothing yet, so that it is not to be spared."""
    return vision_tower is not None and pretrain_mm_mlp_adapter is None


def rates_of(train_type: str, said: Mapping[str, Any], is_new_projector: bool = False) -> dict[str, float | None]:
    """The rates that nobody said.

    Args:
        said (`Mapping`): rates by name; None is what was not said.
        is_new_projector (`bool`): the projector begins with random weights.
    """
    if said.get("learning_rate") is not None:
        return {}  # which holds for all that has none of its own
    found = {name: getattr(RATES[train_type], name) for name in OF_RATES}
    if is_new_projector:
        found["mm_projector_lr"] = None
    return {name: rate for name, rate in found.items() if said.get(name) is None}


def alpha_of(lora_r: int, use_rslora: bool) -> int:
    """LoRA's alpha: twice the rank, as LLaVA has it, so that the scale does not change with the rank."""
    return ALPHA_OF_RSLORA if use_rslora else 2 * lora_r


def rows_per_step(train_type: str, num_rows: int | None) -> int:
    """Of all devices, over accumulation."""
    line = by_size(num_rows)
    return ROWS_PER_STEP_OF_STAGE_1 if train_type == "projector" and line is BY_SIZE[-1] else line.rows_per_step


def packs_of(
    train_type: str, lengths: Sequence[int], num_devices: int, said: Mapping[str, Any]
) -> tuple[dict[str, int], float]:
    """
    Of a pack's tokens and a step's packs what nobody said, so that a step has about as many rows as without packing;
    and how many it has on average.

    Args:
        lengths (`Sequence[int]`): tokens of each row.
        num_devices (`int`): that train together.
    """
    rows, mean = rows_per_step(train_type, len(lengths)), sum(lengths) / len(lengths)
    found: dict[str, int] = {}
    budget, accumulation = said["max_tokens_per_batch"], said["gradient_accumulation_steps"]
    if budget is None:
        share = max(1, rows // (num_devices * (accumulation or 1)))
        budget = found["max_tokens_per_batch"] = max(min(math.ceil(share * mean), MOST_TOKENS_PER_PACK), max(lengths))
    rows_per_pack = max(1.0, min(budget / mean, len(lengths) / num_devices))
    if accumulation is None:
        accumulation = found["gradient_accumulation_steps"] = max(1, round(rows / (num_devices * rows_per_pack)))
    return found, rows_per_pack * accumulation * num_devices


def batch_of(train_type: str, num_rows: int | None, num_devices: int, said: Mapping[str, Any]) -> dict[str, int]:
    """Of rows per device and accumulation what nobody said, for `num_devices` that train together."""
    size, accumulation = (said.get(name) for name in OF_BATCH)
    if size is not None:
        return {} if accumulation is not None else {"gradient_accumulation_steps": 1}
    rows = rows_per_step(train_type, num_rows)
    size = min(MOST_ROWS_PER_DEVICE, max(1, rows // (num_devices * (accumulation or 1))))
    found = {"per_device_train_batch_size": size}
    if accumulation is None:
        found["gradient_accumulation_steps"] = max(1, round(rows / (num_devices * size)))
    return found


def warmup_of(num_steps: int | None) -> float:
    """Warm-up as a share of the steps; none in a short run."""
    return WARMUP_SHARE if num_steps is None or num_steps >= FEWEST_STEPS_TO_WARM_UP else 0.0


def tuning_with_defaults(
    tuning: "TuningArguments", num_rows: int | None = None, before: Mapping[str, Any] | None = None
) -> "TuningArguments":
    """
    `tuning` with LoRA's rank and alpha, where it has none.

    Args:
        num_rows (`int`, *optional*): that are trained on.
        before (`Mapping`, *optional*): what a run had that goes on.
    """
    if not tuning.is_lora or None not in (tuning.lora_r, tuning.lora_alpha):
        return tuning
    settled, before = copy.copy(tuning), before or {}
    if settled.lora_r is None:
        settled.lora_r = before.get("lora_r") or by_size(num_rows).lora_r
    if settled.lora_alpha is None:
        settled.lora_alpha = before.get("lora_alpha") or alpha_of(settled.lora_r, tuning.use_rslora)
    return settled


def training_with_defaults(
    args: "LlavaTrainingArguments",
    train_type: str,
    num_rows: int | None = None,
    *,
    before: Mapping[str, Any] | None = None,
    is_new_projector: bool = False,
    lengths: Sequence[int] | None = None,
) -> "LlavaTrainingArguments":
    """
    `args` with what nobody said chosen; the same object where nothing was left open.

    Args:
        train_type (`str`): of `TuningArguments`.
        num_rows (`int`, *optional*): that are trained on.
        before (`Mapping`, *optional*): what a run had that goes on; it keeps its own.
        is_new_projector (`bool`): see [`rates_of`].
        lengths (`Sequence[int]`, *optional*): tokens of each row, for a run with packing.
    """
    if not args.unsaid:
        return args
    settled, num_devices = copy.copy(args), args.world_size * max(1, args.n_gpu)
    kept = {name: before[name] for name in args.unsaid if before is not None and name in before}
    said = {name: None if name in args.unsaid else getattr(args, name) for name in UNTIL_KNOWN} | kept
    chosen: dict[str, Any] = rates_of(train_type, said, is_new_projector)
    num_per_step: float | None = None
    if not args.packing:
        chosen |= batch_of(train_type, num_rows, num_devices, said)
    elif lengths is not None and len(lengths):
        found, num_per_step = packs_of(train_type, [int(each) for each in lengths], num_devices, said)
        chosen |= found
    if said["num_train_epochs"] is None:
        chosen["num_train_epochs"] = float(by_size(num_rows).num_epochs)
    for name, value in (chosen | kept).items():
        setattr(settled, name, value)
    if said["warmup_steps"] is None:
        settled.warmup_steps = warmup_of(_num_steps(settled, num_rows, num_devices, num_per_step))
    settled.unsaid = frozenset()
    return settled


def _num_steps(
    args: "LlavaTrainingArguments", num_rows: int | None, num_devices: int, rows_per_step: float | None
) -> int | None:
    if args.max_steps > 0:
        return args.max_steps
    if num_rows is None:
        return None
    if rows_per_step is None:
        rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * num_devices
    return math.ceil(math.ceil(num_rows / rows_per_step) * args.num_train_epochs)


def settled_arguments(
    model: "ModelArguments",
    tuning: "TuningArguments",
    args: "LlavaTrainingArguments",
    num_rows: int | None,
    before: Mapping[str, Any] | None = None,
    lengths: Sequence[int] | None = None,
) -> tuple["TuningArguments", "LlavaTrainingArguments", str | None]:
    """
    `tuning` and `args` of a run with all that nobody said, and a sentence on it, None if everything was said.

    Args:
        num_rows (`int`, *optional*): that are trained on.
        before (`Mapping`, *optional*): what the run had that goes on.
        lengths (`Sequence[int]`, *optional*): tokens of each row, for a run with packing.
    """
    is_new = is_new_projector(model.vision_tower, model.pretrain_mm_mlp_adapter)
    tuned = tuning_with_defaults(tuning, num_rows, before)
    trained = training_with_defaults(
        args, tuned.train_type, num_rows, before=before, is_new_projector=is_new, lengths=lengths
    )
    chosen = {name: getattr(trained, name) for name in UNTIL_KNOWN if name in args.unsaid}
    if args.max_steps > 0:
        chosen.pop("num_train_epochs", None)
    chosen |= {name: getattr(tuned, name) for name in ("lora_r", "lora_alpha") if getattr(tuning, name) is None}
    flags = " ".join(f"--{name} {value:g}" for name, value in chosen.items() if value is not None)
    if not flags:
        return tuned, trained, None
    rows = "" if num_rows is None else f" and {num_rows:,} rows"
    by = f"by --train_type {tuned.train_type}{rows}" if before is None else "as the run had it before"
    return tuned, trained, f"Not given, and chosen {by} (docs/settings.md): {flags}"
