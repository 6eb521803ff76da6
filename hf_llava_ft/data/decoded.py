"""Which image files were found to be pictures, so that none is decoded twice: not by a check and then by training, not
when rows are added to a set, not under each of several names.

A file is known by device, inode, size and times, in 8 bytes; the names do not matter.

What may surprise: a file that was written while or shortly before it was decoded is not remembered, since another
change within the clock's grain would go unseen.
"""

import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import numpy as np
import PIL
from filelock import FileLock
from PIL import Image

_VERSION = 2  # raise it when another file counts as a picture
_MAX_KNOWN = 20_000_000  # 160 MB on disk
NO_FILE = 0
# What a file is known by. Device and inode can be any 64 bits.
STATE = np.dtype([("device", "<u8"), ("inode", "<u8"), ("size", "<i8"), ("modified", "<i8"), ("changed", "<i8")])
_PACKED = struct.Struct("<QQqqq")
MISSING = _PACKED.pack(0, 0, -1, 0, 0)


def packed_state(found: os.stat_result) -> bytes:
    """One [`STATE`]."""
    return _PACKED.pack(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class DecodedPictures:
    """
    Args:
        root (`Path`): of the cache.
    """

    def __init__(self, root: Path):
        folder = root / "llava_decoded_pictures"
        self._path = folder / f"{_VERSION}-{PIL.__version__}-{Image.MAX_IMAGE_PIXELS}.npy"
        self._began = _clock_of(folder)
        self._known = self._read()

    def keys(self, paths: Sequence[str]) -> np.ndarray:
        """`uint64[N]`, equal for names of one file as it is now; `NO_FILE` where there is none."""
        return np.fromiter(map(_key, paths), dtype=np.uint64, count=len(paths))

    def keys_of_states(self, states: np.ndarray) -> np.ndarray:
        """`uint64[N]`, as `keys` gives them, of files whose `STATE[N]` was asked already."""
        packed, size = states.tobytes(), STATE.itemsize
        pieces = (packed[start : start + size] for start in range(0, len(packed), size))
        return np.fromiter(map(_key_of, pieces), dtype=np.uint64, count=len(states))

    def are_known(self, keys: np.ndarray) -> np.ndarray:
        """`bool[N]`: which of `keys` were found to be pictures."""
        return np.isin(keys, self._known) & (keys != NO_FILE)

    def remember(self, paths: Sequence[str], keys: np.ndarray) -> None:
        """
        Keeps what could be decoded, where there is room for it.

        Args:
            paths (`Sequence[str]`): files that could be decoded since this object was made.
            keys (`uint64[N]`): of them, before they were decoded.
        """
        if not self._began:
            return
        now = np.fromiter((_key(path, self._began) for path in paths), dtype=np.uint64, count=len(paths))
        new = keys[(keys == now) & (keys != NO_FILE)]
        if not len(new):
            return
        with suppress(OSError), FileLock(f"{self._path}.lock"):
            known = np.union1d(self._read(), new)
            if len(known) <= _MAX_KNOWN:
                unfinished = self._path.with_suffix(".incomplete")
                with open(unfinished, "wb") as file:
                    np.save(file, known)
                unfinished.replace(self._path)

    def _read(self) -> np.ndarray:
        try:
            known = np.load(self._path, allow_pickle=False)
        except (OSError, ValueError, EOFError):  # none, or one that something else wrote
            return np.zeros(0, dtype=np.uint64)
        return known if known.dtype == np.uint64 and known.ndim == 1 else np.zeros(0, dtype=np.uint64)


def _key(path: str, changed_before: int | None = None) -> int:
    """Of the file as it is now; `NO_FILE` where there is none that was changed before that time, in nanoseconds."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return NO_FILE
    if changed_before is not None and found.st_ctime_ns >= changed_before:
        return NO_FILE
    return _key_of(packed_state(found))


def _key_of(state: bytes) -> int:
    return NO_FILE if state == MISSING else int.from_bytes(blake2b(state, digest_size=8).digest(), "little")


def _clock_of(folder: Path) -> int:
    """Now, as the disk's clock has it; 0 where nothing can be kept."""
    probe = folder / f".clock-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        now = probe.stat().st_mtime_ns
        probe.unlink()
    except OSError:
        return 0
    return now
