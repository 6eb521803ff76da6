"""The settings that follow from what trains (`defaults.py`), put where nobody said anything.

What follows from the number of rows is None here, with the rule as its origin: rows are counted when the data is open.
"""

import math
from collections.abc import Mapping
from typing import Any

from hf_llava_ft.settings.defaults import (
    ALPHA_OF_RSLORA,
    BY_SIZE,
    DEFAULT,
    FEWEST_STEPS_TO_WARM_UP,
    MOST_ROWS_PER_DEVICE,
    MOST_TOKENS_PER_PACK,
    OF_BATCH,
    OF_RATES,
    ROWS_PER_STEP_OF_STAGE_1,
    UNTIL_KNOWN,
    WARMUP_SHARE,
    alpha_of,
    batch_of,
    by_size,
    groups_by_default,
    is_by_what_trains,
    is_new_projector,
    rates_of,
    warmup_of,
)
from hf_llava_ft.settings.resolved import Setting


def put_defaults(settings: dict[str, Setting]) -> None:
    """Adds them to `settings`, of which it changes only those of origin `default`."""
    train_type = _train_type(settings)
    is_lora = train_type in ("lora", "qlora")
    origin = f"{DEFAULT} of {train_type}"

    def value(name: str) -> Any:
        """None where nobody said it."""
        return None if settings[name].origin == DEFAULT else settings[name].value

    def put(name: str, found: Any, why: str = "") -> None:
        if settings[name].origin == DEFAULT:
            settings[name] = Setting(found, f"{origin}{', ' if why else ''}{why}")

    is_new = is_new_projector(settings["vision_tower"].value, settings["pretrain_mm_mlp_adapter"].value)
    for name, rate in rates_of(train_type, {name: value(name) for name in OF_RATES}, is_new).items():
        put(name, rate)
    if is_lora:
        put("lora_r", None, _by_rows("lora_r"))
        rank = settings["lora_r"].value
        if settings["use_rslora"].value:
            put("lora_alpha", ALPHA_OF_RSLORA, "with use_rslora")
        else:
            put("lora_alpha", alpha_of(rank, use_rslora=False) if rank else None, "twice lora_r")
    grouped = groups_by_default(settings["sampler_order"].value, settings["train_sampling_strategy"].value)
    is_streamed = settings["streaming"].value
    is_packed = settings["packing"].value
    why = "since a stream does not know all rows" if is_streamed else "so that little is padding" if grouped else ""
    put(
        "group_by_modality_length",
        grouped and not is_streamed and not is_packed,
        "since packs have no padding" if is_packed else why,
    )
    put("num_train_epochs", None, _by_rows("num_epochs"))
    steps = _by_rows("rows_per_step", ROWS_PER_STEP_OF_STAGE_1 if train_type == "projector" else None)
    size, accumulation = (value(name) for name in OF_BATCH)
    if is_packed:
        put("max_tokens_per_batch", None, f"by the rows, at most {MOST_TOKENS_PER_PACK} or the longest row")
        if settings["per_device_train_batch_size"].origin == DEFAULT:
            settings["per_device_train_batch_size"] = Setting(1, "a pack")
    if settings["deepspeed"].value is not None:
        for name in OF_BATCH:
            put(name, UNTIL_KNOWN[name], "since DeepSpeed is told before the rows are counted")
    elif is_packed:
        put("gradient_accumulation_steps", None, f"so that the rows in a step are about, {steps}")
    elif size is None:
        put("per_device_train_batch_size", None, f"at most {MOST_ROWS_PER_DEVICE} of the rows in a step, {steps}")
        put("gradient_accumulation_steps", None, f"so that the rows in a step are, {steps}")
    else:
        put("gradient_accumulation_steps", 1, "since per_device_train_batch_size is given")
    max_steps = settings["max_steps"].value
    if max_steps > 0:
        put("warmup_steps", warmup_of(max_steps), f"for {max_steps} steps")
    else:
        put("warmup_steps", None, f"{WARMUP_SHARE} of the steps, or 0 of fewer than {FEWEST_STEPS_TO_WARM_UP}")


def put_by_rows(settings: Mapping[str, Setting], num_rows: int, num_devices: int) -> dict[str, Setting]:
    """`settings` with what waited for the number of rows, as a run of so many on so many devices has it."""
    train_type = _train_type(settings)
    waiting = [name for name, each in settings.items() if each.value is None and is_by_what_trains(each.origin)]
    found: dict[str, Any] = {"num_train_epochs": by_size(num_rows).num_epochs}
    found["lora_r"] = rank = settings["lora_r"].value or by_size(num_rows).lora_r
    found["lora_alpha"] = alpha_of(rank, use_rslora=False)
    batch = {name: settings[name].value for name in OF_BATCH}
    found |= batch_of(train_type, num_rows, num_devices, batch)
    values = {name: each.value for name, each in settings.items()}
    values |= {name: found[name] for name in waiting if name in found}
    rows_per_step = math.prod(values[name] for name in OF_BATCH) * num_devices
    found["warmup_steps"] = warmup_of(math.ceil(math.ceil(num_rows / rows_per_step) * values["num_train_epochs"]))
    origin = f"{DEFAULT} of {train_type}, for {num_rows:,} rows"
    put = {name: Setting(found[name], origin) for name in waiting if name in found}
    return {name: put.get(name, setting) for name, setting in settings.items()}


def _train_type(settings: Mapping[str, Setting]) -> str:
    """As `TuningArguments` understands it."""
    train_type = settings["train_type"].value
    train_type = "lora" if train_type == "use_lora" else train_type
    return "qlora" if train_type == "lora" and settings["bits"].value < 16 else train_type


def _by_rows(column: str, last: int | None = None) -> str:
    values = [getattr(line, column) for line in BY_SIZE]
    values[-1] = last or values[-1]
    each = [f"{value} up to {line.most_rows:,}" for value, line in zip(values, BY_SIZE[:-1], strict=False)]
    return f"by the number of rows: {'; '.join(each)}; else {values[-1]}"
