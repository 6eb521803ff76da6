"""The signals by which a scheduler ends a command: it removes what it staged, and exits with 128 and the signal's
number, as a shell counts."""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType

# SIGTERM comes before a job is killed, SIGUSR1 if asked for with `sbatch --signal=USR1@120`.
TERMINATION_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))

_MOMENT = 0.05  # seconds


def exit_on_sigterm() -> None:
    """For a process that is a program of ours. While it trains, a checkpoint is saved before that
    (`training/resuming/interruption.py`)."""
    with suppress(ValueError):  # not the main thread, in which alone a handler can be set
        for number in TERMINATION_SIGNALS:
            signal.signal(number, _end)
        if sys.unraisablehook is not _heed:
            global _hook_before
            _hook_before, sys.unraisablehook = sys.unraisablehook, _heed


class _Ended(SystemExit):
    """That of a signal."""


def _end(number: int, frame: FrameType | None) -> None:
    raise _Ended(128 + number)


_hook_before = sys.unraisablehook


def _heed(unraisable: "sys.UnraisableHookArgs") -> None:
    # A signal that comes while Python calls what it only reports the errors of, a hook of fork or `__del__`, would be
    # lost: the command would go on to its end. It comes again a moment later.
    if not isinstance(unraisable.exc_value, _Ended):
        return _hook_before(unraisable)
    threading.Thread(target=_send_again, args=(int(str(unraisable.exc_value)) - 128,), daemon=True).start()


def _send_again(number: int) -> None:
    time.sleep(_MOMENT)
    os.kill(os.getpid(), number)


def _leave_to_the_system() -> None:
    # A handler of Python's runs between two instructions: a worker of a pool that is told to end just before it waits
    # for work would wait for ever, and its pool for it. What is staged is its parent's to remove.
    for number in TERMINATION_SIGNALS:
        if signal.getsignal(number) is _end:
            signal.signal(number, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_system)
