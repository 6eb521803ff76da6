"""The ranges of numeric settings. A value outside would end a run somewhere inside a library, or train something else
than intended."""

import math
from dataclasses import dataclass
from typing import Any

from hf_llava_ft.errors import UserError


@dataclass(frozen=True)
class _Range:
    """Numbers from `low` (without it, if `is_open`) up to, but without, `high`; and those of `others`."""

    low: float
    in_words: str
    is_open: bool = False
    high: float = math.inf
    others: tuple[float, ...] = ()

    def __contains__(self, value: float) -> bool:
        # False for NaN too.
        is_inside = (value > self.low if self.is_open else value >= self.low) and value < self.high
        return is_inside or value in self.others


_COUNT = _Range(1, "1 or more")
_NOT_NEGATIVE = _Range(0, "0 or more")
_SHARE = _Range(0, "0 or more and less than 1", high=1)
_SEED = _Range(0, "0 to 4294967295", high=2**32)  # what NumPy takes

_RANGES = {
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": _NOT_NEGATIVE,
    "anyres_max": _COUNT,
    "data_seed": _SEED,
    "dataloader_num_workers": _NOT_NEGATIVE,
    "eval_max_new_tokens": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "learning_rate": _NOT_NEGATIVE,
    "lora_alpha": _Range(0, "more than 0", is_open=True),
    "lora_dropout": _SHARE,
    "lora_r": _COUNT,
    "max_grad_norm": _NOT_NEGATIVE,
    "max_tokens_per_batch": _COUNT,
    "max_steps": _Range(1, "1 or more, or -1 for --num_train_epochs", others=(-1,)),
    "mm_projector_lr": _NOT_NEGATIVE,
    "mm_vision_tower_lr": _NOT_NEGATIVE,
    "model_max_length": _COUNT,
    "num_eval_answers": _NOT_NEGATIVE,
    "num_train_epochs": _Range(0, "more than 0", is_open=True),
    "per_device_eval_batch_size": _COUNT,
    "per_device_train_batch_size": _COUNT,
    "preview": _NOT_NEGATIVE,
    "seed": _SEED,
    "shuffle_buffer_size": _NOT_NEGATIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
}


def check_ranges(values: dict[str, Any]) -> None:
    """
    Args:
        values (`dict`): settings by name; None is no number, and is passed over.

    Raises:
        UserError: at the first number that is outside its range, infinity and NaN among them.
    """
    for name, allowed in _RANGES.items():
        value = values.get(name)
        if value is not None and value not in allowed:
            raise UserError(f"--{name} {value}: give {allowed.in_words}.")
