"""A disk that is full, at any byte, or that cannot be written, under each command that writes a folder."""

import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.commands import Command, digests, run
from tests.faults.kills import OPERATIONS, Operation, prepared

WRITING = [operation for operation in OPERATIONS if operation.name in ("merge", "convert", "export")]


@contextmanager
def small_disk(folder: Path, size: int, *options: str) -> Iterator[Path]:
    """
    Mounts a file system of `size` bytes at `folder`.

    Raises:
        PermissionError: if this user may not mount one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(f"a small disk is a tmpfs here, and it cannot be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def outcome_on_disk(operation: Operation, start: Path, folder: Path, size: int, *options: str) -> str:
    """
    Runs `operation` with its output on a disk of `size` bytes.

    Raises:
        AssertionError: if it did not end with exit code 2 and one sentence, or left something.
    """
    shutil.copytree(start, folder)
    with small_disk(folder / "disk", size, *options) as disk:
        words = [f"disk/{operation.output}" if word == operation.output else word for word in operation.words]
        command = Command(words, folder)
        code, printed = command.wait(), command.printed()
        assert code == 2, f"exit code {code}: {printed[-1500:]}"
        assert "Traceback" not in printed, printed[-1500:]
        assert len([line for line in printed.splitlines() if line.startswith("error: ")]) == 1, printed[-1500:]
        assert not digests(disk), f"left: {sorted(digests(disk))}"
    return "one sentence, nothing left"


def fill_often(
    root: Path, checkpoint: Path, count: int, seed: int, only: str | None = None, tell: Callable[[str], None] = print
) -> dict[str, Counter]:
    """Each command on `count` disks that are too small in all, and on one that is read-only."""
    start = prepared(root / "start", checkpoint)
    chosen = [operation for operation in WRITING if only in (None, operation.name)]
    rng = random.Random(seed)
    outcomes: dict[str, Counter] = {}
    for operation in chosen:
        folder = root / f"unbroken-{operation.name}"
        shutil.copytree(start, folder)
        run(operation.words, folder)
        # In whole pages, as the file system counts.
        size = sum(-(-path.stat().st_size // 4096) * 4096 for path in (folder / operation.output).rglob("*"))
        sizes = [max(4096, int(rng.uniform(0.05, 0.95) * size)) for _ in range(count // len(chosen))]
        for number, options in enumerate([*((each,) for each in sizes), (size, "ro")]):
            name = f"{operation.name}, {'a read-only disk' if 'ro' in options else 'a full disk'}"
            place = root / f"{operation.name}-disk-{number}"
            try:
                outcome = outcome_on_disk(operation, start, place, *options)
            except AssertionError as error:
                outcome = "failed"
                tell(f"{name} ({options[0]} bytes): {error}")
            outcomes.setdefault(name, Counter())[outcome] += 1
            shutil.rmtree(place)
    return outcomes
