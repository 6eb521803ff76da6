"""What the orders of rows are made of: checked lengths, and rows dealt so that processes have equally much to do.

Legend: `M` steps, `S` rows per step = world_size * batch_size.
"""

from collections.abc import Sequence

import numpy as np
import torch

from hf_llava_ft.errors import UserError

Lengths = Sequence[int] | np.ndarray | torch.Tensor


def checked_lengths(lengths: Lengths, batch_size: int, world_size: int) -> np.ndarray:
    """
    `lengths` as `int64[N]`.

    Raises:
        UserError: if one is 0.
        ValueError: if `batch_size` or `world_size` is below 1.
    """
    if batch_size < 1 or world_size < 1:
        raise ValueError(f"batch_size and world_size must be at least 1, not {batch_size} and {world_size}.")
    lengths = np.asarray(lengths, dtype=np.int64)
    zeros = np.flatnonzero(lengths == 0)
    if len(zeros):
        raise UserError(
            f"row {zeros[0] + 1} has length 0; give it text or remove it, since its sign tells image rows from text."
        )
    return lengths


def permutation(n: int, generator: torch.Generator | None) -> np.ndarray:
    """`int64[n]` in random order; without a generator, torch's global one draws it."""
    return torch.randperm(n, generator=generator).numpy()


def dealt_rows(steps: np.ndarray, sizes: np.ndarray, num_chunks: int) -> np.ndarray:
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
