"""SIGTERM, by which a scheduler ends a command: it removes what it staged, and exits with 143 as a shell counts."""

import os
import signal
from contextlib import suppress
from types import FrameType


def exit_on_sigterm() -> None:
    """For a process that is a program of ours. While it trains, a checkpoint is saved before that
    (`training/resuming/interruption.py`)."""
    with suppress(ValueError):  # not the main thread, in which alone a handler can be set
        signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _leave_to_the_system() -> None:
    # A handler of Python's runs between two instructions: a worker of a pool that is told to end just before it waits
    # for work would wait for ever, and its pool for it. What is staged is its parent's to remove.
    if signal.getsignal(signal.SIGTERM) is _end:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_system)
