"""`--gradient_checkpointing auto`: whether activations are computed twice, by what a run needs and what is free.

It costs a second forward pass, so it is off unless the heaviest batch would not fit without. What may surprise: the
estimate is of the batch of the longest rows, all with as many pictures as these have on average; and on a CPU nothing
is traced where the run is small by any measure, and nothing said.
"""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from hf_llava_ft.estimate.memory import Engine
from hf_llava_ft.estimate.pictures import picture_of
from hf_llava_ft.estimate.plan import GIB, SET_ASIDE, Estimator, Plan
from hf_llava_ft.estimate.trace import Batch
from hf_llava_ft.library_differences import checkpointing_flags
from hf_llava_ft.modeling.configuration_llava import LlavaConfig
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.settings.machine import free_memory
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.training.guards.longest_batch import heaviest_batches
from hf_llava_ft.training.speed.packed_loader import heaviest_packs, pack_sampler

# Values of the width of the language model that a layer keeps for each position, by far not reached.
_MOST_KEPT = 64
_ROWS_OF_A_STREAM = 2048  # tokens, where the language model takes more


@dataclass(frozen=True)
class Choice:
    """Whether to compute activations twice, and a sentence on it; None where there is nothing to tell."""

    checkpointing: bool
    told: str | None = None


def choose_checkpointing(
    config: LlavaConfig,
    tuning: TuningArguments,
    args: LlavaTrainingArguments,
    rows: Any,
    processor: LlavaProcessor,
    longest: int,
    dtype: torch.dtype,
    loaded_on: torch.device,
    max_length: int | None = None,
) -> Choice:
    """
    The choice of `auto`.

    Args:
        config (`LlavaConfig`): of the model.
        rows (`Dataset` or `LlavaStream`): that are trained on.
        longest (`int`): tokens that a row may have.
        dtype (`torch.dtype`): of the weights that do not train.
        loaded_on (`torch.device`): where the weights are now; on the device of the run they take no more of it.
        max_length (`int`, *optional*): where longer rows are cut.
    """
    free, engine = free_memory(args.device), _engine(args)
    if free is None or engine is None:
        return Choice(False)
    batch = _heaviest(config, args, rows, processor, longest, max_length)
    on_cpu = args.device.type == "cpu"
    if on_cpu and _kept_at_most(config, batch) < free / 4:
        return Choice(False)
    plan = Plan(engine, args.world_size, args.gradient_accumulation_steps, False, batch)
    optim = str(getattr(args.optim, "value", args.optim))
    estimator = Estimator(config, tuning, dtype, bool(args.bf16 or args.fp16), "sdpa", optim)
    try:
        estimate = estimator.estimate(plan)
    except Exception:  # of an optimiser or a model that it does not know; an estimate must not end a run
        return Choice(False)
    needed = estimate.total + (0.0 if on_cpu else SET_ASIDE * GIB)
    if loaded_on.type == args.device.type:
        needed -= estimate.states.weights
    fits = needed <= free
    return Choice(
        not fits,
        f"Gradient checkpointing: {'off' if fits else 'on'}, since a step without takes about {needed / GIB:.1f} GiB "
        f"and {free / GIB:.1f} are free (--gradient_checkpointing true or false decides otherwise).",
    )


def set_checkpointing(args: LlavaTrainingArguments, checkpointing: bool) -> None:
    """Says to transformers, under all its names, whether activations are computed twice."""
    for name in checkpointing_flags():
        setattr(args, name, checkpointing)


def _engine(args: LlavaTrainingArguments) -> Engine | None:
    """None where the estimate does not know what the engine holds."""
    if args.fsdp:
        return None
    if args.deepspeed_plugin is not None:
        stage = args.deepspeed_plugin.zero_stage
        engines: dict[int, Engine] = {2: "zero2", 3: "zero3"}
        return engines.get(stage)
    return "single" if args.world_size == 1 else "ddp"


def _heaviest(
    config: LlavaConfig,
    args: LlavaTrainingArguments,
    rows: Any,
    processor: LlavaProcessor,
    longest: int,
    max_length: int | None,
) -> Batch:
    size, tokens, images = args.per_device_train_batch_size, min(longest, _ROWS_OF_A_STREAM), 1.0
    if isinstance(rows, Dataset):
        if args.packing:
            heaviest = heaviest_packs(rows, pack_sampler(rows, args, processor, max_length))
        else:
            heaviest = heaviest_batches(rows, processor, size, max_length)
        indices, tokens = heaviest[0]
        counts = rows.select(indices).select_columns(["num_images"])["num_images"]
        size = 1 if args.packing else len(indices)
        images = sum(counts) / size
    most = max(0, tokens - 1) // picture_of(config).tokens
    num_images = min(round(images + 0.499), most)
    text = tokens - num_images * picture_of(config).tokens
    return Batch(size, num_images, text, text)


def _kept_at_most(config: LlavaConfig, batch: Batch) -> float:
    """More bytes than activations and logits take."""
    text, vision = config.text_config, config.vision_config
    per_picture = (vision.image_size // vision.patch_size) ** 2 + 1
    pictures = batch.size * batch.images * picture_of(config).crops
    positions = batch.size * (batch.text_tokens + batch.images * picture_of(config).tokens)
    kept = positions * text.num_hidden_layers * _MOST_KEPT * max(text.hidden_size, text.intermediate_size)
    kept += pictures * per_picture * vision.num_hidden_layers * _MOST_KEPT * vision.intermediate_size
    return 4.0 * (kept + 4 * batch.size * batch.supervised * text.vocab_size)
