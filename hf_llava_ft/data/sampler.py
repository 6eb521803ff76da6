"""The order in which rows are trained: rows of one kind (with image, text only) together, and like lengths if asked.

A step of W processes x B rows takes W*B rows of one kind, sorted by length and dealt so that the processes have about
equally many words. That evens out the work but saves no padding: each process gets long rows and short ones. Steps of
rows of like length, which do save it, are what `pool_steps` is for. Two orders are here:

* ours, for training: a function of the lengths, the seed and the epoch and of nothing else, so that a resumed run
  continues the same order and every process computes the same one;
* the original LLaVA's, for comparison, to the last index (`original_rng=True`). Its inner shuffles draw from torch's
  global generator, so its order depends on whatever used that before; and it puts one step of each kind, mixed, at the
  end of every epoch, even when nothing was left over.

The original's convention for lengths holds throughout: positive for a row with images, negative for a text-only row.
Legend: `M` steps, `S` rows per step = world_size * batch_size.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from hf_llava_ft.errors import UserError

Lengths = Sequence[int] | np.ndarray | torch.Tensor


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
        `UserError`: if a length is 0.
    """
    lengths = _checked(lengths, batch_size, world_size)
    kinds = [np.flatnonzero(lengths > 0), np.flatnonzero(lengths < 0)]
    if original_rng:
        if longest_first or pool_steps != 1:
            raise ValueError(
                "the original's order has no longest_first and no pool_steps; leave out one or the other."
            )
        return _original_order(lengths, kinds, batch_size, world_size, generator).tolist()

    if pool_steps < 1:
        raise ValueError(f"pool_steps must be at least 1, not {pool_steps}.")
    sizes = np.abs(lengths)
    step_size = batch_size * world_size
    steps_by_kind, batches, rest = [], [], []
    for kind in kinds:
        shuffled = kind[_randperm(len(kind), generator)]
        num_in_steps = len(kind) // step_size * step_size
        num_in_batches = len(kind) // batch_size * batch_size
        in_steps = shuffled[:num_in_steps]
        pool = np.arange(num_in_steps) // (step_size * pool_steps)
        in_steps = in_steps[np.lexsort((-sizes[in_steps], pool))]  # pools in turn, each from long to short
        steps_by_kind.append(_dealt_rows(in_steps.reshape(-1, step_size), sizes, world_size))  # (M of this kind, S)
        batches.append(shuffled[num_in_steps:num_in_batches])
        rest.append(shuffled[num_in_batches:])
    steps = np.concatenate(steps_by_kind)  # (M, S)
    steps = steps[_randperm(len(steps), generator)]
    if longest_first and len(steps):
        longest = sizes[steps].max(axis=1).argmax()
        steps[[0, longest]] = steps[[longest, 0]]
    return np.concatenate([steps.reshape(-1), *batches, *rest]).tolist()


def length_grouped_indices(
    lengths: Lengths, batch_size: int, world_size: int, generator: torch.Generator | None = None
) -> list[int]:
    """
    The original LLaVA's order by length alone (its `get_length_grouped_indices`), for rows of one kind.

    Args:
        lengths (`int[N]`): rows' lengths as they stand; negative ones sort as negative numbers.
        batch_size, world_size, generator: as in [`modality_length_grouped_indices`].

    Returns:
        `list[int]` of N indices.
    """
    lengths = _checked(lengths, batch_size, world_size)
    return _original_length_order(lengths, batch_size, world_size, generator).tolist()


def split_to_even_chunks(indices: Sequence[int] | np.ndarray, lengths: Lengths, num_chunks: int) -> list[list[int]]:
    """
    Deal `indices` to `num_chunks` chunks of about equal total length (the original's function of the same name).

    Each index goes to the lightest chunk that is not full yet, the first of equals. If `num_chunks` does not divide
    their number, they are dealt in turn, lengths unseen.
    """
    rows = np.asarray(indices, dtype=np.int64)
    if len(rows) % num_chunks:
        return [rows[chunk::num_chunks].tolist() for chunk in range(num_chunks)]
    return _dealt_rows(rows[None], np.asarray(lengths, dtype=np.int64), num_chunks)[0].reshape(num_chunks, -1).tolist()


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
        `UserError`: if a length is 0.
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
        self.lengths = _checked(lengths, batch_size, world_size)
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


class OriginalOrderSampler(torch.utils.data.Sampler[int]):
    """
    The order in which the original LLaVA sees the rows, as a function of seed and epoch.

    The original draws it from torch's global generator, which its Trainer seeds. So the order is that of the original
    for as long as nothing else draws from that generator while it trains: always in the first epoch, and in later ones
    unless there is dropout on the CPU. Here the draws are repeated on a seeded generator, so that a resumed run
    goes on in the same order.

    And as the original's Trainer takes no step from fewer micro-batches than are accumulated, those left over at the
    end of an epoch are left out here. (There the next epoch would add its own to them.)

    All this is the original on one process: on several, its accelerate lets another generator draw a part, and this
    order is dealt to them instead.

    Args:
        num_rows (`int`): number of rows.
        seed (`int`): the run's seed.
        lengths (`int[N]`, *optional*): group by modality and length, as in [`modality_length_grouped_indices`].
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
        self.lengths = None if lengths is None else _checked(lengths, batch_size, self.world_size)
        num_micro_batches = -(-num_rows // (batch_size * num_processes))
        num_steps = num_micro_batches // accumulation_steps or 1
        self.num_kept = min(num_rows, num_steps * self.world_size * batch_size)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next `iter()` gives; Trainer and accelerate call it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_kept

    def __iter__(self) -> Iterator[int]:
        order: list[int] = []
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(self.seed)
            for _ in range(self.epoch + 1):
                torch.empty((), dtype=torch.int64).random_()  # the DataLoader's base seed for its workers
                order = self._order()
        return iter(order[: self.num_kept])

    def _order(self) -> list[int]:
        if self.lengths is None:
            return list(torch.utils.data.RandomSampler(range(self.num_rows)))
        return modality_length_grouped_indices(self.lengths, self.batch_size, self.world_size, original_rng=True)


def _checked(lengths: Lengths, batch_size: int, world_size: int) -> np.ndarray:
    if batch_size < 1 or world_size < 1:
        raise ValueError(f"batch_size and world_size must be at least 1, not {batch_size} and {world_size}.")
    lengths = np.asarray(lengths, dtype=np.int64)
    zeros = np.flatnonzero(lengths == 0)
    if len(zeros):
        raise UserError(
            f"row {zeros[0] + 1} has length 0; give it text or remove it, since its sign tells image rows from text."
        )
    return lengths


def _randperm(n: int, generator: torch.Generator | None) -> np.ndarray:
    return torch.randperm(n, generator=generator).numpy()


def _dealt(steps: np.ndarray, sizes: np.ndarray, world_size: int) -> np.ndarray:
    """Each step of `steps` (M, S) sorted from long to short (equals keep their order), then dealt to the processes."""
    by_length = np.argsort(-sizes[steps], axis=1, kind="stable")
    return _dealt_rows(np.take_along_axis(steps, by_length, axis=1), sizes, world_size)


def _dealt_rows(steps: np.ndarray, sizes: np.ndarray, num_chunks: int) -> np.ndarray:
    """`steps` (M, S) -> (M, S) of `num_chunks` equal runs each; all M steps advance together, one row at a time."""
    num_steps, step_size = steps.shape
    chunk_size = step_size // num_chunks
    if num_chunks == 1 or chunk_size <= 1:  # nothing to choose: with one row each, chunks fill from first to last
        return steps
    step = np.arange(num_steps)
    loads = np.zeros((num_steps, num_chunks))  # float for inf; sums of lengths stay exact below 2**53
    filled = np.zeros((num_steps, num_chunks), dtype=np.int64)
    dealt = np.empty((num_steps, num_chunks, chunk_size), dtype=steps.dtype)
    for column in steps.T:
        chunk = loads.argmin(axis=1)
        slot = filled[step, chunk]
        dealt[step, chunk, slot] = column
        filled[step, chunk] = slot + 1
        loads[step, chunk] = np.where(slot + 1 == chunk_size, np.inf, loads[step, chunk] + sizes[column])
    return dealt.reshape(num_steps, step_size)


def _original_length_order(
    lengths: np.ndarray, batch_size: int, world_size: int, generator: torch.Generator | None
) -> np.ndarray:
    step_size = batch_size * world_size
    order = _randperm(len(lengths), generator)
    num_in_steps = len(order) // step_size * step_size
    steps = _dealt(order[:num_in_steps].reshape(-1, step_size), lengths, world_size)
    rest = order[num_in_steps:]
    rest = rest[np.argsort(-lengths[rest], kind="stable")]
    chunks = split_to_even_chunks(rest, lengths, world_size)
    return np.array([*steps.reshape(-1).tolist(), *(index for chunk in chunks for index in chunk)], dtype=np.int64)


def _original_order(
    lengths: np.ndarray,
    kinds: list[np.ndarray],
    batch_size: int,
    world_size: int,
    generator: torch.Generator | None,
) -> np.ndarray:
    if not all(len(kind) for kind in kinds):
        return _original_length_order(lengths, batch_size, world_size, generator)
    step_size = batch_size * world_size
    steps_by_kind, last = [], []
    for kind in kinds:
        # The global generator, and not the caller's: a slip of the original that its order depends on.
        order = kind[_original_length_order(np.abs(lengths[kind]), batch_size, world_size, None)]
        num_in_steps = (
            (len(order) - 1) // step_size * step_size
        )  # its last step leaves the shuffle even when it is whole
        steps_by_kind.append(order[:num_in_steps].reshape(-1, step_size))
        last.append(order[num_in_steps:])
    steps = np.concatenate(steps_by_kind)
    steps = steps[_randperm(len(steps), generator)]
    return np.concatenate([steps.reshape(-1), np.sort(np.concatenate(last))])
