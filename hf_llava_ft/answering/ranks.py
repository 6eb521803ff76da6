"""The processes that a launcher starts for one command: each takes its share of the rows, and there is one result.

They talk over gloo, on GPUs too: it is little that they say, and whoever is done first may wait for hours, for which
NCCL has no patience.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import torch

from hf_llava_ft.errors import UserError

_PATIENCE = timedelta(days=30)
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Ranks:
    """
    Args:
        rank, count (`int`): this process among how many.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks, and writes the result."""
        return self.rank == 0

    def share(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """Of what all processes have in the same order, the items of this one."""
        return islice(items, self.rank, None, self.count)

    def size_of_share(self, total: int) -> int:
        """How many of `total` items [`share`] gives."""
        return len(range(self.rank, total, self.count))

    def from_first(self, action: Callable[[], Any]) -> Any:
        """
        What `action` returns in the first process, in all of them; the others wait for it.

        Raises:
            UserError: in all of them, if it did in the first.
        """
        if self.count == 1:
            return action()
        result: list[Any] = [None, None]
        if self.is_first:
            try:
                result[0] = action()
            except UserError as error:
                result[1] = error.sentence
        torch.distributed.broadcast_object_list(result, src=0)
        if result[1] is not None:
            raise UserError(result[1])
        return result[0]

    def from_all(self, value: Any) -> list[Any]:
        """The values of all processes, in all of them."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()


ALONE = Ranks()


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The processes of the launcher that started this one, by the variables that all launchers set; or this alone."""
    if not _is_launched():
        yield ALONE
        return
    torch.distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
    finally:
        torch.distributed.destroy_process_group()


def own_gpu() -> str | None:
    """The GPU of a process that a launcher started with others, by name; None for one alone or without GPUs."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if _is_launched() and torch.cuda.is_available() else None


def _is_launched() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
