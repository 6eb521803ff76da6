"""The order in which rows are trained: rows of one kind (with image, text only) together, and like lengths if asked.

A step of W processes x B rows takes W*B rows of one kind, sorted by length and dealt so that the processes have about
equally many words. That evens out the work but saves no padding: each process gets long rows and short ones. Steps of
rows of like length, which do save it, are what `pool_steps` is for. Two orders are here:

* ours, for training: a function of the lengths, the seed and the epoch and of nothing else, so that a resumed run
  continues the same order and every process computes the same one;
* the original LLaVA's, for comparison, to the last index (`original_order.py`).

The original's convention for lengths holds throughout: positive for a row with images, negative for a text-only row.
Legend: `M` steps, `S` rows per step = world_size * batch_size.
"""

from collections.abc import Iterator

import numpy as np
import torch

from hf_llava_ft.data.dealing import Lengths, checked_lengths, dealt_rows, permutation
from hf_llava_ft.data.original_order import (
    OriginalOrderSampler,
    length_grouped_indices,
    original_modality_order,
    split_to_even_chunks,
)

__all__ = [
    "ModalityLengthSampler",
    "OriginalOrderSampler",
    "length_grouped_indices",
    "modality_length_grouped_indices",
    "split_to_even_chunks",
]


def modality_length_grouped_indices(
    lengths: Lengths,
    batch_size: int,
    world_size: int,
    generator: torch.Generator | None = None,
    *,
    original_rng: bool = False,
    pool_steps: int = 1,
    longest_first: bool = False,
) -> list[int]:
    """
    One epoch's order of rows, each exactly once.

    Every `world_size * batch_size` consecutive rows (a step) are of one kind, and the steps come in random order. What
    is left of each kind, less than a step, goes to the end: whole batches of image rows, whole batches of text rows,
    then the rest. So at most one batch of an epoch holds both kinds, the last or the one before it, and only the last
    one can be short.

    Args:
        lengths (`int[N]`):
            Rows' lengths: positive with images, negative for text only, never 0.
        batch_size (`int`):
            Rows per process and forward pass.
        world_size (`int`):
            Number of processes times gradient accumulation steps, as the original counts it, so that a whole optimizer
            step is of one kind.
        generator (`torch.Generator`, *optional*):
            Source of all shuffles. None is torch's global generator.
        original_rng (`bool`, defaults to `False`):
            Return the original LLaVA's order instead (`get_modality_length_grouped_indices` in its llava_trainer.py).
        pool_steps (`int`, defaults to 1):
            Sort this many steps' worth of shuffled rows by length before cutting them into steps. 1 composes steps at
            random, like the original; 50 (what transformers' grouping by length uses) removes most of the padding, at
            the price of steps that hold one length each.
        longest_first (`bool`, defaults to `False`):
            Swap the step that holds the longest row to the front, so that a run too big for its memory fails at once.

    Returns:
        `list[int]` of N indices.

    Raises:
        UserError: if a length is 0.
    """
    lengths = checked_lengths(lengths, batch_size, world_size)
    kinds = [np.flatnonzero(lengths > 0), np.flatnonzero(lengths < 0)]
    if original_rng:
        if longest_first or pool_steps != 1:
            raise ValueError(
                "the original's order has no longest_first and no pool_steps; leave out one or the other."
            )
        return original_modality_order(lengths, batch_size, world_size, generator)

    if pool_steps < 1:
        raise ValueError(f"pool_steps must be at least 1, not {pool_steps}.")
    sizes = np.abs(lengths)
    step_size = batch_size * world_size
    steps_by_kind, batches, rest = [], [], []
    for kind in kinds:
        shuffled = kind[permutation(len(kind), generator)]
        num_in_steps = len(kind) // step_size * step_size
        num_in_batches = len(kind) // batch_size * batch_size
        in_steps = shuffled[:num_in_steps]
        pool = np.arange(num_in_steps) // (step_size * pool_steps)
        in_steps = in_steps[np.lexsort((-sizes[in_steps], pool))]  # pools in turn, each from long to short
        steps_by_kind.append(dealt_rows(in_steps.reshape(-1, step_size), sizes, world_size))  # (M of this kind, S)
        batches.append(shuffled[num_in_steps:num_in_batches])
        rest.append(shuffled[num_in_batches:])
    steps = np.concatenate(steps_by_kind)  # (M, S)
    steps = steps[permutation(len(steps), generator)]
    if longest_first and len(steps):
        longest = sizes[steps].max(axis=1).argmax()
        steps[[0, longest]] = steps[[longest, 0]]
    return np.concatenate([steps.reshape(-1), *batches, *rest]).tolist()


class ModalityLengthSampler(torch.utils.data.Sampler[int]):
    """
    [`modality_length_grouped_indices`] as a sampler whose order depends on `seed + epoch` only.

    No generator's state has to be saved or restored: to resume, set the epoch and skip the batches already seen. All
    processes use the same sampler; accelerate deals its batches to them in turn.

    Args:
        lengths (`int[N]`): positive with images, negative for text only.
        batch_size (`int`): per process and forward pass.
        world_size (`int`, defaults to 1): number of processes times gradient accumulation steps.
        seed (`int`, defaults to 0): the same on all processes.
        pool_steps (`int`, defaults to 1): above 1, steps hold rows of like length, which saves padding.
        longest_first (`bool`, defaults to `False`): put the step with the longest row first.

    Raises:
        UserError: if a length is 0.
    """

    def __init__(
        self,
        lengths: Lengths,
        batch_size: int,
        world_size: int = 1,
        seed: int = 0,
        *,
        pool_steps: int = 1,
        longest_first: bool = False,
    ):
        self.lengths = checked_lengths(lengths, batch_size, world_size)
        self.batch_size = batch_size
        self.world_size = world_size
        self.seed = seed
        self.pool_steps = pool_steps
        self.longest_first = longest_first
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next `iter()` gives; Trainer and accelerate call it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(
            modality_length_grouped_indices(
                self.lengths,
                self.batch_size,
                self.world_size,
                generator,
                pool_steps=self.pool_steps,
                longest_first=self.longest_first,
            )
        )
