"""The order in which a run takes its rows, and the padding that it leaves in the batches.

Rows with pictures and without come in batches of their own, each of like length in tokens, unless somebody said
otherwise. What may surprise: a run that goes on keeps the order that it began with, also one that began when random
rows were the default and lengths were words.
"""

from typing import Any

import numpy as np
import torch
from datasets import Dataset

from hf_llava_ft.data.builder import modality_lengths
from hf_llava_ft.data.lengths import token_lengths
from hf_llava_ft.data.sampler import (
    LENGTH_POOL_STEPS,
    LikeLengths,
    ModalityLengthSampler,
    OriginalOrderSampler,
    like_lengths,
    padding_share,
)
from hf_llava_ft.data.streaming import LlavaStream
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments

_COUNTED = {"messages", "images", "num_images"}


def keep_order(args: LlavaTrainingArguments, course: dict[str, Any] | None) -> None:
    """
    Gives `args` the order of the run that goes on, where nobody said another.

    Args:
        course (`dict`, *optional*): of that run; None if it is not known, as of one that random rows were the default
            for.
    """
    course = course or {}
    if args.order_unsaid:
        args.group_by_modality_length = bool(course.get("group_by_modality_length", False))
    if "grouped_by" not in course:
        args.grouped_by = "words"
    elif course["grouped_by"] is not None:
        args.grouped_by = course["grouped_by"]


def leave_ungrouped_what_has_no_lengths(args: LlavaTrainingArguments, dataset: Any) -> None:
    """By default, rows of another make stay in random order; who asks for groups of them is told what is missing."""
    has_lengths = isinstance(dataset, Dataset) and {"num_words", "num_images"} <= set(dataset.column_names)
    if args.order_unsaid and dataset is not None and not has_lengths:
        args.group_by_modality_length = False


def num_rows(dataset: Any) -> int | None:
    """How many rows an epoch has; None where that is not known."""
    if isinstance(dataset, LlavaStream):
        return dataset.num_rows
    return len(dataset) if hasattr(dataset, "__len__") else None


def counted_lengths(dataset: Any, processor: Any, max_length: int | None) -> np.ndarray | None:
    """`int64[N]`, tokens of each row, cut ones as long as they are trained; None where they cannot be counted."""
    if not isinstance(dataset, Dataset) or not isinstance(processor, LlavaProcessor):
        return None
    if not set(dataset.column_names) >= _COUNTED:
        return None
    lengths = token_lengths(dataset, processor, "the rows to train on")
    return lengths if max_length is None else np.minimum(lengths, max_length)


def row_sampler(
    dataset: Any, args: LlavaTrainingArguments, processor: Any, max_length: int | None = None
) -> torch.utils.data.Sampler | None:
    """
    The sampler that `args` ask for; None for transformers' own.

    Args:
        dataset: with `__len__`; to be grouped, with the columns of `load_llava_json`.
        processor: counts tokens, if it is a [`LlavaProcessor`]; lengths are words otherwise.
        max_length (`int`, *optional*): where rows are cut.
    """
    seed = args.data_seed if args.data_seed is not None else args.seed
    batch_size, accumulation_steps = args.train_batch_size, args.gradient_accumulation_steps
    if args.sampler_order == "original":
        return OriginalOrderSampler(
            len(dataset),
            seed,
            lengths=modality_lengths(dataset) if args.group_by_modality_length else None,
            batch_size=batch_size,
            num_processes=args.world_size,
            accumulation_steps=accumulation_steps,
        )
    if not args.group_by_modality_length:
        return None
    lengths, micro_batches = modality_lengths(dataset), None
    how: LikeLengths = {"pool_steps": LENGTH_POOL_STEPS, "mixing": 0.0}
    counted = counted_lengths(dataset, processor, max_length) if args.grouped_by == "tokens" else None
    world_size = args.world_size * accumulation_steps
    if counted is not None:
        lengths, micro_batches = np.sign(lengths) * counted, accumulation_steps
        how = like_lengths(len(lengths), batch_size * world_size)
    return ModalityLengthSampler(
        lengths,
        batch_size=batch_size,
        world_size=world_size,
        seed=seed,
        accumulation_steps=micro_batches,
        **how,
    )


def told_of_padding(
    sampler: Any, dataset: Any, args: LlavaTrainingArguments, processor: Any, max_length: int | None = None
) -> str | None:
    """A sentence on the padding of the first epoch; None where the lengths are not known."""
    if isinstance(dataset, LlavaStream):
        return "Batches of a stream are not grouped by length, since not all rows are known: some of them is padding."
    lengths = counted_lengths(dataset, processor, max_length)
    if lengths is None or not len(lengths):
        return None
    if isinstance(sampler, ModalityLengthSampler):
        order, how = np.array(list(sampler)), "grouped by pictures and length"
    elif isinstance(sampler, OriginalOrderSampler):
        order, how = np.array(list(sampler)), "in the original's order"
    elif args.train_sampling_strategy == "sequential":
        order, how = np.arange(len(lengths)), "in the order of the file"
    else:
        order, how = np.random.default_rng(0).permutation(len(lengths)), "in random order"
    share = padding_share(lengths[order], args.train_batch_size)
    return f"Padding: {100 * share:.1f}% of the positions, in batches of {args.train_batch_size} rows {how}."
