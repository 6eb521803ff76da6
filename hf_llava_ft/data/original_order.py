"""The order in which the original LLaVA trains the rows, to the last index: for comparison with its runs.

Its inner shuffles draw from torch's global generator, so its order depends on whatever used that before; and it puts
one step of each kind (with image, text only), mixed, at the end of every epoch, even when nothing was left over.

Source: haotian-liu/LLaVA, `llava/train/llava_trainer.py`. Legend: `M` steps, `S` rows per step = world_size *
batch_size.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, islice

import numpy as np
import torch

from hf_llava_ft.data.dealing import Lengths, checked_lengths, dealt_rows, permutation


def original_modality_order(
    lengths: Lengths, batch_size: int, world_size: int, generator: torch.Generator | None = None
) -> list[int]:
    """
    The original's `get_modality_length_grouped_indices`.

    Args:
        lengths, batch_size, world_size: as in `modality_length_grouped_indices` of `sampler.py`.
        generator (`torch.Generator`, *optional*): source of the outer shuffle alone; the inner ones are drawn from
            torch's global generator, as in the original.

    Returns:
        `list[int]` of N indices.

    Raises:
        UserError: if a length is 0.
    """
    lengths = checked_lengths(lengths, batch_size, world_size)
    kinds = [np.flatnonzero(lengths > 0), np.flatnonzero(lengths < 0)]
    if not all(len(kind) for kind in kinds):
        return _length_order(lengths, batch_size, world_size, generator).tolist()
    step_size = batch_size * world_size
    steps_by_kind, last = [], []
    for kind in kinds:
        # The global generator, and not the caller's: a slip of the original that its order depends on.
        order = kind[_length_order(np.abs(lengths[kind]), batch_size, world_size, None)]
        # Its last step leaves the shuffle even when it is whole.
        num_in_steps = (len(order) - 1) // step_size * step_size
        steps_by_kind.append(order[:num_in_steps].reshape(-1, step_size))
        last.append(order[num_in_steps:])
    steps = np.concatenate(steps_by_kind)
    steps = steps[permutation(len(steps), generator)]
    return np.concatenate([steps.reshape(-1), np.sort(np.concatenate(last))]).tolist()


def length_grouped_indices(
    lengths: Lengths, batch_size: int, world_size: int, generator: torch.Generator | None = None
) -> list[int]:
    """
    The original LLaVA's order by length alone (its `get_length_grouped_indices`), for rows of one kind.

    Args:
        lengths (`int[N]`): rows' lengths as they stand; negative ones sort as negative numbers.
        batch_size, world_size, generator: as in [`original_modality_order`].

    Returns:
        `list[int]` of N indices.
    """
    lengths = checked_lengths(lengths, batch_size, world_size)
    return _length_order(lengths, batch_size, world_size, generator).tolist()


def split_to_even_chunks(indices: Sequence[int] | np.ndarray, lengths: Lengths, num_chunks: int) -> list[list[int]]:
    """
    Deal `indices` to `num_chunks` chunks of about equal total length (the original's function of the same name).

    Each index goes to the lightest chunk that is not full yet, the first of equals. If `num_chunks` does not divide
    their number, they are dealt in turn, lengths unseen.
    """
    rows = np.asarray(indices, dtype=np.int64)
    if len(rows) % num_chunks:
        return [rows[chunk::num_chunks].tolist() for chunk in range(num_chunks)]
    return dealt_rows(rows[None], np.asarray(lengths, dtype=np.int64), num_chunks)[0].reshape(num_chunks, -1).tolist()


class OriginalOrderSampler(torch.utils.data.Sampler[int]):
    """
    The order in which the original LLaVA sees the rows, as a function of seed and epoch.

    The original draws it from torch's global generator, which its Trainer seeds. So the order is that of the original
    for as long as nothing else draws from that generator while it trains: always in the first epoch, and in later ones
    unless there is dropout on the CPU. Here the draws are repeated on a seeded generator, so that a resumed run
    goes on in the same order.

    And as the original's Trainer takes no step from fewer micro-batches than are accumulated, those left over at the
    end of an epoch come first in the next one, and are left out after the last. (Where the last micro-batch of an
    epoch is a short one, they are left out after each: a row too few would shift all that follow.)

    All this is the original on one process: on several, its accelerate lets another generator draw a part, and this
    order is dealt to them instead.

    Args:
        num_rows (`int`): number of rows.
        seed (`int`): the run's seed.
        lengths (`int[N]`, *optional*): group by modality and length, as in [`original_modality_order`].
        batch_size (`int`, defaults to 1): per process and forward pass.
        num_processes (`int`, defaults to 1): among which accelerate deals the batches.
        accumulation_steps (`int`, defaults to 1): micro-batches to an optimizer step.
    """

    def __init__(
        self,
        num_rows: int,
        seed: int,
        *,
        lengths: Lengths | None = None,
        batch_size: int = 1,
        num_processes: int = 1,
        accumulation_steps: int = 1,
    ):
        self.num_rows = num_rows
        self.seed = seed
        self.batch_size = batch_size
        self.world_size = num_processes * accumulation_steps
        self.lengths = None if lengths is None else checked_lengths(lengths, batch_size, self.world_size)
        num_micro_batches = -(-num_rows // (batch_size * num_processes))
        num_steps = num_micro_batches // accumulation_steps or 1
        self.num_kept = min(num_rows, num_steps * self.world_size * batch_size)
        self.carries_over = num_rows % (batch_size * num_processes) == 0
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next `iter()` gives; Trainer and accelerate call it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_kept

    def __iter__(self) -> Iterator[int]:
        orders: list[list[int]] = []
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(self.seed)
            for _ in range(self.epoch + 1):
                torch.empty((), dtype=torch.int64).random_()  # the DataLoader's base seed for its workers
                orders.append(self._order())
        if not self.carries_over:
            return iter(orders[-1][: self.num_kept])
        start = self.epoch * self.num_kept
        return islice(chain.from_iterable(orders), start, start + self.num_kept)

    def _order(self) -> list[int]:
        if self.lengths is None:
            return list(torch.utils.data.RandomSampler(range(self.num_rows)))
        return original_modality_order(self.lengths, self.batch_size, self.world_size)


def _dealt(steps: np.ndarray, sizes: np.ndarray, world_size: int) -> np.ndarray:
    """Each step of `steps` (M, S) sorted from long to short (equals keep their order), then dealt to the processes."""
    by_length = np.argsort(-sizes[steps], axis=1, kind="stable")
    return dealt_rows(np.take_along_axis(steps, by_length, axis=1), sizes, world_size)


def _length_order(
    lengths: np.ndarray, batch_size: int, world_size: int, generator: torch.Generator | None
) -> np.ndarray:
    step_size = batch_size * world_size
    order = permutation(len(lengths), generator)
    num_in_steps = len(order) // step_size * step_size
    steps = _dealt(order[:num_in_steps].reshape(-1, step_size), lengths, world_size)
    rest = order[num_in_steps:]
    rest = rest[np.argsort(-lengths[rest], kind="stable")]
    chunks = split_to_even_chunks(rest, lengths, world_size)
    return np.array([*steps.reshape(-1).tolist(), *(index for chunk in chunks for index in chunk)], dtype=np.int64)
