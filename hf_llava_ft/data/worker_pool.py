"""Work on many items in several processes, with results in the order of the items.

The order is what makes an error the same however many processes there are: the first one met is that of the first
item. Processes are forked, so they start at once and share what is in memory; where a system has no safe fork
(Windows, macOS), the work is done in this process.

They end with the process that started them, however that ends.
"""

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from hf_llava_ft.errors import UserError

_PR_SET_PDEATHSIG = 1  # of prctl(2)
_ON_ITS_WAY = 0.5  # seconds
MAX_WORKERS = 32  # forking a process that holds a model takes a tenth of a second

Item = TypeVar("Item")
Result = TypeVar("Result")

_KILLED = (
    "a process that read the data was killed, most likely because memory ran out; free some memory and start again."
)


def num_workers() -> int:
    """Processes to start: one for each core that this one may use, and no more than `MAX_WORKERS`; 1 without a safe
    fork."""
    return min(len(os.sched_getaffinity(0)), MAX_WORKERS) if sys.platform == "linux" else 1


def results_in_order(
    function: Callable[[Item], Result], items: Sequence[Item], num_proc: int | None = None
) -> Iterator[Result]:
    """
    `function` of each item.

    Args:
        function: needs no pickling; forked processes have it already.
        items: small, since they are pickled; so are the results.
        num_proc (`int`, *optional*): processes; by default one for each core, and never more than items.

    Yields:
        The results in the order of the items.

    Raises:
        UserError: if a process is killed, which is what the system does when memory runs out. What `function` raises
            is raised here.
    """
    num_proc = min(num_workers() if num_proc is None else num_proc, len(items))
    if num_proc <= 1 or sys.platform != "linux":
        yield from map(function, items)
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(num_proc, context, initializer=_remember, initargs=(function, os.getpid())) as pool:
        try:
            yield from pool.map(_call, items)
        except BrokenProcessPool:
            raise _killed() from None
        finally:
            pool.shutdown(cancel_futures=True)


def results_of_stream(
    function: Callable[[Item], Result], items: Iterable[Item], num_proc: int | None = None
) -> Iterator[Result]:
    """As [`results_in_order`], for items that are made as they are needed: at most twice as many as there are
    processes wait to be worked on or to be taken."""
    num_proc = num_workers() if num_proc is None else num_proc
    if num_proc <= 1 or sys.platform != "linux":
        yield from map(function, items)
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(num_proc, context, initializer=_remember, initargs=(function, os.getpid())) as pool:
        waiting: deque[Future] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(_call, item))
                if len(waiting) > 2 * num_proc:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise _killed() from None
        finally:
            pool.shutdown(cancel_futures=True)


def _killed() -> UserError:
    # A scheduler's signal goes to all processes of a job, and may reach the workers first: this one's is on its way
    # then, and ends the wait.
    time.sleep(_ON_ITS_WAY)
    return UserError(_KILLED)


def end_with(parent: int) -> None:
    """
    Has Linux kill this process when the one that forked it is gone, by kill -9 too. Without that a worker waits for
    work for ever, because it holds the other end of the pipe itself.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was gone before
        os.kill(os.getpid(), signal.SIGKILL)


_function: Callable | None = None  # of the pool that this process works for


def _remember(function: Callable, parent: int) -> None:
    global _function
    _function = function
    end_with(parent)
    # What was forked never becomes garbage; looking at it takes time, and makes copies of memory that is shared.
    gc.freeze()


def _call(item):
    assert _function is not None
    return _function(item)
