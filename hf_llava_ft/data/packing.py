"""Rows packed to a budget of tokens: which rows come together, in which order, in each epoch.

Shuffled rows are taken window by window, and best-fit packs each: a row goes where the least room is left over. Both
the packs and their order follow from the lengths, the seed and the epoch alone, so that a resumed run continues the
same order and every process computes the same one.

What may surprise: every epoch has the same number of packs, a multiple of the processes, because the Trainer counts
an epoch's steps once. Where an epoch needs fewer, the packs of most rows are divided; nothing is lost by that, since a
pack is computed at its own length.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from hf_llava_ft.data.dealing import Lengths, checked_lengths
from hf_llava_ft.errors import UserError

# Of so many rows the packs are full to about a percent, and no epoch waits long for its order.
_WINDOW_ROWS = 1024
# Where there are several windows, epochs differ in what they need: this part more than the first has to do.
_SLACK = 0.005
# Rows are sorted by their length times up to this much more, so that they meet other rows in each epoch.
_MIXING = 0.2


def best_fit(lengths: np.ndarray, budget: int, order: np.ndarray | None = None) -> list[list[int]]:
    """
    Packs of at most `budget` tokens, each row where the least room is left over behind it.

    Args:
        lengths (`int64[N]`): none above `budget`.
        order (`int64[N]`, *optional*): in which rows are taken; by default from long to short, which fills best.

    Returns:
        Packs of indices; every index is in one of them.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), sorted
    for index in (np.argsort(-lengths, kind="stable") if order is None else order).tolist():
        length = int(lengths[index])
        place = bisect_left(room, (length, -1))
        if place == len(room):
            left, pack = budget, len(packs)
            packs.append([])
        else:
            left, pack = room.pop(place)
        packs[pack].append(index)
        insort(room, (left - length, pack))
    return packs


class PackSampler(torch.utils.data.Sampler[list[int]]):
    """
    The packs of an epoch, as lists of the indices of their rows.

    Args:
        lengths (`int[N]`): tokens of each row; signs, as in `sampler.py`, do not matter.
        budget (`int`): most tokens of a pack.
        num_processes (`int`, defaults to 1): among which the packs are dealt in turn.
        seed (`int`, defaults to 0): the same on all processes.
        where (`str`): what messages call the rows.

    Raises:
        UserError: if a row is longer than `budget`, naming the longest.
    """

    def __init__(
        self, lengths: Lengths, budget: int, num_processes: int = 1, seed: int = 0, where: str = "the rows to train on"
    ):
        self.lengths = np.abs(checked_lengths(lengths, 1, num_processes))
        self.budget = budget
        self.num_processes = num_processes
        self.seed = seed
        self.epoch = 0
        longest = int(self.lengths.max(initial=0))
        if longest > budget:
            raise UserError(
                f"{where}: row {int(self.lengths.argmax()) + 1} has {longest:,} tokens, more than "
                f"--max_tokens_per_batch {budget:,} takes: give {longest} or more, or cut rows with --on_bad_row skip "
                f"and --model_max_length {budget}."
            )
        self._first = self._packed(0)
        number = len(self._first)
        if len(self.lengths) > _WINDOW_ROWS:
            number += int(np.ceil(_SLACK * number))
        self._num_packs = -(-number // num_processes) * num_processes

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose packs the next `iter()` gives; Trainer and accelerate call it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._num_packs

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.packs(self.epoch))

    def packs(self, epoch: int) -> list[list[int]]:
        """The packs of `epoch`, in order. Where each is one row and the last processes have none, some come twice, as
        accelerate has it."""
        found = self._packed(epoch, _MIXING)
        if len(found) > self._num_packs:
            found = self._packed(epoch)
        if len(found) > self._num_packs:
            found = self._first
        packs = _divided(found, self.lengths, self._num_packs)
        order = self._random(epoch, 1).permutation(len(packs))
        packs = [packs[place] for place in order]
        return packs + [packs[place % len(packs)] for place in range(self._num_packs - len(packs))]

    def _packed(self, epoch: int, mixing: float = 0.0) -> list[list[int]]:
        random = self._random(epoch, 0)
        shuffled = random.permutation(len(self.lengths))
        packs: list[list[int]] = []
        for start in range(0, len(shuffled), _WINDOW_ROWS):
            window = shuffled[start : start + _WINDOW_ROWS]
            lengths = self.lengths[window]
            order = np.argsort(-lengths * (1 + mixing * random.random(len(window))), kind="stable")
            packs += [window[pack].tolist() for pack in best_fit(lengths, self.budget, order)]
        return packs

    def _random(self, *numbers: int) -> np.random.RandomState:
        # RandomState, whose streams numpy keeps the same for ever.
        return np.random.RandomState([number % 2**32 for number in (self.seed, *numbers)])


def _divided(packs: list[list[int]], lengths: np.ndarray, number: int) -> list[list[int]]:
    """`packs`, of which those of most rows are divided in two until there are `number`, or each is one row."""
    heap = [(-len(pack), place) for place, pack in enumerate(packs)]
    heapq.heapify(heap)
    packs = list(packs)
    while len(packs) < number and -heap[0][0] > 1:
        _, place = heapq.heappop(heap)
        rows = sorted(packs[place], key=lambda row: (-lengths[row], row))
        packs[place] = rows[::2]
        packs.append(rows[1::2])
        heapq.heappush(heap, (-len(packs[place]), place))
        heapq.heappush(heap, (-len(packs[-1]), len(packs) - 1))
    return packs


class PackedRows(torch.utils.data.Dataset):
    """Rows as a dataset whose index is a pack: `rows[[3, 0]]` are the rows 3 and 0."""

    def __init__(self, rows: Any):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, pack: Sequence[int]) -> list[Any]:
        return [self.rows[index] for index in pack]
