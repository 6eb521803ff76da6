"""SIGTERM, by which a scheduler ends a command: it removes what it staged, and exits with 143 as a shell counts."""

import os
import signal
from contextlib import suppress
from types import FrameType


def exit_on_sigterm() -> None:
    """For a process that is a program of ours. While it trains, a checkpoint is saved before that
    (`training/resuming/interruption.py`)."""
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a worker that was forked: what is staged is its parent's to remove
            os._exit(128 + number)
        raise SystemExit(128 + number)

    with suppress(ValueError):  # not the main thread, in which alone a handler can be set
        signal.signal(signal.SIGTERM, end)
