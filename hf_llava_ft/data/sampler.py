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
from typing import TypedDict

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
    "like_lengths",
    "modality_length_grouped_indices",
    "padding_share",
    "split_to_even_chunks",
]

# Steps whose rows are sorted by length together, as transformers' own LengthGroupedSampler has it. The original sorts
# within one step, which balances the ranks but saves no padding.
LENGTH_POOL_STEPS = 50
# An epoch of fewer pools is sorted as a whole, each row by its length times up to this much more, so that it meets
# other rows in each epoch.
_FEWEST_POOLS = 2
_MIXING = 0.1


class LikeLengths(TypedDict):
    """How [`modality_length_grouped_indices`] is to bring rows of like length together."""

    pool_steps: int
    mixing: float


def like_lengths(num_rows: int, step_size: int) -> LikeLengths:
    """For an epoch of `num_rows` in steps of `step_size` rows: little padding, and other batches in each epoch."""
    if num_rows // step_size < _FEWEST_POOLS * LENGTH_POOL_STEPS:
        return {"pool_steps": 1, "mixing": _MIXING}
    return {"pool_steps": LENGTH_POOL_STEPS, "mixing": 0.0}


def padding_share(lengths: np.ndarray, batch_size: int) -> float:
    """The share of the positions that is padding, in batches of rows of `lengths` `int[N]` one after the other."""
    longest = np.maximum.reduceat(lengths, np.arange(0, len(lengths), batch_size)).astype(np.int64)
    sizes = np.full(len(longest), batch_size)
    sizes[-1] = len(lengths) - batch_size * (len(longest) - 1)
    return 1 - float(lengths.sum()) / float((longest * sizes).sum())


def modality_length_grouped_indices(
    lengths: Lengths,
    batch_size: int,
    world_size: int,
    generator: torch.Generator | None = None,
    *,
    original_rng: bool = False,
    pool_steps: int = 1,
    mixing: float = 0.0,
    longest_first: bool = False,
    accumulation_steps: int | None = None,
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
        mixing (`float`, defaults to 0):
            Above 0, steps are cut from all rows of a kind, sorted by their lengths times 1 to 1 + `mixing`. What is
            left over are then the shortest rows with images and the longest without, which pad each other least.
        longest_first (`bool`, defaults to `False`):
            Swap the step that holds the longest row to the front, so that a run too big for its memory fails at once.
        accumulation_steps (`int`, *optional*):
            Of `world_size`, the part that is accumulation: a step's micro-batches then hold like lengths each, and
            only what the processes compute at the same time is evened out; and what is left over is sorted too. Least
            padding, whatever the size of the set. None deals a step's rows over all of its micro-batches.

    Returns:
        `list[int]` of N indices.

    Raises:
        UserError: if a length is 0.
        ValueError: if `accumulation_steps` does not divide `world_size`.
    """
    lengths = checked_lengths(lengths, batch_size, world_size)
    if accumulation_steps is not None and (accumulation_steps < 1 or world_size % accumulation_steps):
        raise ValueError(f"accumulation_steps {accumulation_steps} must be a part of world_size {world_size}.")
    kinds = [np.flatnonzero(lengths > 0), np.flatnonzero(lengths < 0)]
    if original_rng:
        if longest_first or pool_steps != 1 or mixing:
            raise ValueError(
                "the original's order has no longest_first, no pool_steps and no mixing; leave out one or the other."
            )
        return original_modality_order(lengths, batch_size, world_size, generator)

    if pool_steps < 1:
        raise ValueError(f"pool_steps must be at least 1, not {pool_steps}.")
    sizes = np.abs(lengths)
    step_size = batch_size * world_size
    steps_by_kind, batches, rest = [], [], []
    # Images from long to short and text from short to long: what is left over of both, at the end, is of like length.
    for kind, direction in zip(kinds, (-1, 1), strict=True):
        shuffled = kind[permutation(len(kind), generator)]
        if mixing:
            factors = 1 + mixing * torch.rand(len(kind), generator=generator, dtype=torch.float64).numpy()
            shuffled = shuffled[np.argsort(direction * sizes[shuffled] * factors, kind="stable")]
        num_in_steps = len(kind) // step_size * step_size
        num_in_batches = len(kind) // batch_size * batch_size
        in_steps = shuffled[:num_in_steps]
        pool = np.arange(num_in_steps) // (step_size * pool_steps)
        in_steps = in_steps[np.lexsort((-sizes[in_steps], pool))]  # pools in turn, each from long to short
        left_over = shuffled[num_in_steps:]
        if accumulation_steps is None:
            dealt = dealt_rows(in_steps.reshape(-1, step_size), sizes, world_size)
        else:
            num_processes = world_size // accumulation_steps
            dealt = dealt_rows(in_steps.reshape(-1, batch_size * num_processes), sizes, num_processes)
            left_over = left_over[np.argsort(direction * sizes[left_over], kind="stable")]
        steps_by_kind.append(dealt.reshape(-1, step_size))  # (M of this kind, S)
        batches.append(left_over[: num_in_batches - num_in_steps])
        rest.append(left_over[num_in_batches - num_in_steps :])
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
        mixing (`float`, defaults to 0): see [`modality_length_grouped_indices`].
        longest_first (`bool`, defaults to `False`): put the step with the longest row first.
        accumulation_steps (`int`, *optional*): see [`modality_length_grouped_indices`].

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
        mixing: float = 0.0,
        longest_first: bool = False,
        accumulation_steps: int | None = None,
    ):
        self.lengths = checked_lengths(lengths, batch_size, world_size)
        self.batch_size = batch_size
        self.world_size = world_size
        self.seed = seed
        self.pool_steps = pool_steps
        self.mixing = mixing
        self.longest_first = longest_first
        self.accumulation_steps = accumulation_steps
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
                mixing=self.mixing,
                longest_first=self.longest_first,
                accumulation_steps=self.accumulation_steps,
            )
        )
