"""Where a row may be cut that is longer than a model takes.

The original cuts every row at the limit, wherever that falls: through an image, or in front of the whole answer. Here
a cut is refused inside an image, whose features then could not all find their places, and where nothing would be left
to learn.
"""

from collections.abc import Sequence

import numpy as np


class CannotTruncate(ValueError):
    """A row that can't be cut; the message says why, in words that follow "since"."""


def num_kept(
    ids: np.ndarray, supervised: np.ndarray, image_token_id: int, repeats: Sequence[int], max_length: int
) -> int:
    """
    How many of `ids` are left of a row that is cut behind `max_length` tokens.

    Args:
        ids (`int64[K]`): with one placeholder for each image.
        supervised (`bool[K]`): which of them are learned.
        repeats (`Sequence[int]`): the number of tokens that each image takes, in reading order.
        max_length (`int`): counted with images at their full number of tokens.

    Returns:
        `int`: K where the row is no longer than that.

    Raises:
        CannotTruncate: if the cut falls into an image, or in front of everything that is learned.
    """
    sizes = np.ones(len(ids), dtype=np.int64)
    sizes[ids == image_token_id] = repeats
    ends = np.cumsum(sizes)
    kept = int(np.searchsorted(ends, max_length, side="right"))  # those that end in front of the cut
    if kept < len(ids) and (ends[kept - 1] if kept else 0) != max_length:
        raise CannotTruncate("the cut would go through an image")
    if not supervised[:kept].any():
        raise CannotTruncate("the cut would leave nothing to learn")
    return kept
