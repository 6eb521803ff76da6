"""Commands that can be killed at any moment, and what is left of them afterwards."""

import hashlib
import importlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

_CONTEXT: Any = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.faults.command_process"])
_PATIENCE = 240  # seconds


def _start(*arguments) -> None:
    # Not imported above: the caller's own process shall not hold what the commands import.
    importlib.import_module("tests.faults.command_process").run_command(*arguments)


class Command:
    """
    A command that is running.

    Args:
        words (`list`): of the command line, without `llava-ft`.
        folder (`Path`): where it runs; what it prints goes to `folder.log` beside it.
    """

    def __init__(self, words: list, folder: Path):
        self.log = folder.with_suffix(".log")
        self._process = _CONTEXT.Process(target=_start, args=(list(map(str, words)), str(self.log), str(folder)))
        self._process.start()

    def ends_within(self, seconds: float) -> bool:
        self._process.join(seconds)
        return self._process.exitcode is not None

    def wait(self) -> int:
        """The exit code."""
        if not self.ends_within(_PATIENCE):
            self._process.kill()
            raise AssertionError(f"the command hangs: {self.printed()}")
        return int(self._process.exitcode)

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits until the condition holds, or the command has ended."""
        end = time.monotonic() + _PATIENCE
        while not condition() and self._process.exitcode is None and time.monotonic() < end:
            time.sleep(0.002)

    def kill(self, number: int = signal.SIGKILL, to_all: bool = False) -> int:
        """Sends a signal to the command alone, as an operator or the system would, or to all its processes; gives the
        exit code."""
        if self._process.exitcode is None:
            with suppress(ProcessLookupError):
                is_leader = os.getpgid(self._process.pid) == self._process.pid
                (os.killpg if to_all and is_leader else os.kill)(self._process.pid, number)
        return self.wait()

    def printed(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def left_alive(self, patience: float = 20.0) -> list[int]:
        """Processes of its session that live on after `patience` seconds: a worker of a DataLoader asks every 5 whether
        its parent is there."""
        end = time.monotonic() + patience
        while (alive := _of_session(self._process.pid)) and time.monotonic() < end:
            time.sleep(0.05)
        return alive


def _of_session(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append(int(entry.name))
    return found


def run(words: list, folder: Path) -> str:
    """Runs a command to its end, and gives what it printed."""
    command = Command(words, folder)
    assert command.wait() == 0, command.printed()
    return command.printed()


def digests(folder: Path, *, leave_out: tuple[str, ...] = ()) -> dict[str, str]:
    """Every file below a folder, hidden ones too, and what is in it, wherever that lies: an adapter names its base by
    an absolute path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(part in name for part in leave_out):
            found[name] = hashlib.sha256(path.read_bytes().replace(bytes(folder), b"")).hexdigest()
    return found
