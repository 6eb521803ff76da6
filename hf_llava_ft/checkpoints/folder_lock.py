"""One command at a time writes a folder; the second is told of the first.

The lock is the operating system's, held on a file beside the folder: it goes with the process that held it, however
that ended, so there are no stale ones. Who holds it stands in a file of its own, because filelock before 4 empties the
locked one when somebody else tries. Both are removed when the work is done.
"""

import json
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from hf_llava_ft.errors import UserError

logger = logging.getLogger(__name__)


@contextmanager
def locked_folder(folder: str | Path, for_reading: bool = False) -> Iterator[bool]:
    """
    Holds the lock of `folder`, which need not be there yet; the folder that it lies in has to. Gives false where the
    file system has no locks.

    Args:
        for_reading (`bool`): so that nobody writes it meanwhile. Where no lock can be put, none is needed.

    Raises:
        UserError: if another process, or this one, is writing it; with process, host, command and since when.
    """
    final = Path(os.path.realpath(folder))  # the same folder by any of its names
    lock_file, holder_file = lock_files(final)
    lock = FileLock(lock_file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        doing, instead = ("used", "") if for_reading else ("written", ", or choose another output folder")
        raise UserError(
            f"{folder} is being {doing} by {_holder(holder_file)}: wait until it is done{instead}."
        ) from None
    except (NotImplementedError, OSError) as error:  # file systems without locks: ENOLCK, ENOSYS, ENOTSUP
        if not for_reading:
            logger.warning("%s is written without a lock, which its file system does not have: %s", folder, error)
        yield False
        return
    try:
        with suppress(OSError):
            holder_file.write_text(json.dumps(_ourselves()), encoding="utf-8")
        yield True
    finally:
        # Before it is given back: a lock that somebody else has taken since is not ours to remove.
        for file in (holder_file, lock_file):
            with suppress(OSError):  # Windows removes no open file
                file.unlink()
        lock.release()
        if os.name == "nt":
            with suppress(OSError):
                lock_file.unlink()


def lock_files(folder: Path) -> tuple[Path, Path]:
    """The locked file and the one that says who holds it: beside `folder`, or in it where nothing can be put beside
    it, as in the root of a mounted disk."""
    parent = folder.parent
    inside = folder.is_dir() and not os.access(parent, os.W_OK)
    stem = folder / ".folder" if inside else parent / f".{folder.name}"
    return Path(f"{stem}.lock"), Path(f"{stem}.lock.json")


def _ourselves() -> dict[str, str | int]:
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "command": _command(), "since": since}


def _command() -> str:
    """The program and its subcommand. What follows may hold a token."""
    program, *rest = [*sys.argv, ""] if sys.argv else ["python", ""]
    words = [Path(program).name or "python", *([rest[0]] if rest[0].isidentifier() else [])]
    return " ".join(words)


def _holder(file: Path) -> str:
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        return f"process {told['pid']} on {told['host']} ({told['command']}, since {told['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
