"""The batches of a run with packing: a pack a batch, dealt to the processes in turn."""

from typing import Any

import numpy as np
from datasets import Dataset
from torch.utils.data import DataLoader

from hf_llava_ft.data.collator import LlavaCollator, PackCollator
from hf_llava_ft.data.packing import PackedRows, PackSampler
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.training.row_order import counted_lengths


def pack_sampler(
    dataset: Any, args: LlavaTrainingArguments, processor: LlavaProcessor, max_length: int | None
) -> PackSampler:
    """
    The packs of `dataset`.

    Raises:
        UserError: if the tokens of its rows cannot be counted, or one has more than fit in a pack.
    """
    lengths = counted_lengths(dataset, processor, max_length)
    if lengths is None or not isinstance(dataset, Dataset):
        raise UserError(
            "packing needs rows of load_data or load_llava_json and a LlavaProcessor as processing_class, by which "
            "their tokens are counted."
        )
    assert args.max_tokens_per_batch is not None
    seed = args.data_seed if args.data_seed is not None else args.seed
    return PackSampler(lengths, args.max_tokens_per_batch, args.world_size, seed)


def pack_collator(collator: Any, args: LlavaTrainingArguments, fills: bool) -> PackCollator:
    """
    Args:
        collator (`LlavaCollator`): of rows.
        fills (`bool`): whether all packs are to have the shape of a full one.
    """
    if not isinstance(collator, LlavaCollator):
        raise UserError("packing needs a LlavaCollator, which encodes the rows of a pack one by one.")
    return PackCollator(collator, args.max_tokens_per_batch if fills else None)


def pack_loader(
    dataset: Dataset, sampler: PackSampler, collator: PackCollator, args: LlavaTrainingArguments
) -> DataLoader:
    """The DataLoader of all packs, which accelerate has still to deal among the processes."""
    return DataLoader(
        PackedRows(dataset),
        batch_size=1,
        sampler=sampler,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
    )


def heaviest_packs(dataset: Dataset, sampler: PackSampler) -> list[tuple[list[int], int]]:
    """The pack of most tokens and, where it is another, that of most images, each with its tokens."""
    packs = sampler.packs(0)
    images = np.asarray(dataset.select_columns(["num_images"]).with_format("numpy")[:]["num_images"])
    sizes = np.array([(sampler.lengths[pack].sum(), images[pack].sum()) for pack in packs])
    chosen = [int(np.lexsort((sizes[:, 1 - by], sizes[:, by]))[-1]) for by in (0, 1)]
    if sizes[chosen[0], 1] == sizes[chosen[1], 1]:
        chosen.pop()
    return [(packs[place], int(sizes[place, 0])) for place in chosen]


def told_of_packs(sampler: PackSampler, args: LlavaTrainingArguments, fills: bool) -> str:
    """A sentence on the packs of an epoch, which are filled up with padding if `fills`."""
    number, rows, tokens = len(sampler), len(sampler.lengths), int(sampler.lengths.sum())
    in_a_step = args.gradient_accumulation_steps * args.world_size
    rest = "the rest padding, since layers are compiled for one shape" if fills else "without padding"
    return (
        f"Packing: {rows:,} rows in {number:,} packs of at most {sampler.budget:,} tokens, "
        f"{100 * tokens / (number * sampler.budget):.1f}% full, {rest}; a step is {in_a_step} "
        f"pack{'s' if in_a_step > 1 else ''}, {rows / number * in_a_step:.3g} rows on average."
    )
