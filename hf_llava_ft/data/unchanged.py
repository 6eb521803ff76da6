"""Whether the files that a run reads are still what they were when it began: by `stat`, nothing is read.

Of rows in memory all images are known when the run begins, and their sizes and times are kept: 24 bytes an image. A
stream meets an image when its turn comes; there it may not be younger than the run.
"""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from hf_llava_ft.errors import UserError


class FileChanged(UserError):
    """A file of the data is not what it was when the run began. Never a reason to skip a row."""


class FilesAsTheyWere:
    """
    Sizes and times of files.

    Args:
        paths (`Iterable[str]`): the files; one that is given twice is asked once.

    Attributes:
        digest (`str`): of all sizes and times in the order of the files, without their names: a copy that keeps
            times (`cp -p`, `rsync -t`) has the same.
    """

    def __init__(self, paths: Iterable[str]):
        paths = list(dict.fromkeys(paths))
        states = np.array([_state(path) for path in paths], dtype=np.int64).reshape(-1, 2)
        self.digest = blake2b(states.tobytes(), digest_size=8).hexdigest()
        keys = np.array([_key(path) for path in paths], dtype=np.uint64)
        order = np.argsort(keys)
        self._keys, self._states = keys[order], states[order]

    def __len__(self) -> int:
        return len(self._keys)

    def check(self, path: str, place: str) -> None:
        """
        Args:
            path (`str`): the file; one that was not given is not looked at.
            place (`str`): the row that needs it, for the message.

        Raises:
            FileChanged: if it was written, replaced or removed.
        """
        key = _key(path)
        index = int(np.searchsorted(self._keys, np.uint64(key)))
        if index == len(self._keys) or int(self._keys[index]) != key:
            return
        was, found = tuple(self._states[index].tolist()), _state(path)
        if was != found:
            raise changed(path, place, f"{_in_words(was)} then and {_in_words(found)} now")


class RowsAsTheyWere:
    """
    The files behind rows that lie in memory or its cache: their data files, and the images beside them.

    Args:
        where (`str`): the data, for messages.
        files (`Sequence[str]`): the data files. What is not a file here is left out.
        datasets (`Sequence[datasets.Dataset]`): their rows, with `FEATURES` of `data/builder.py`.
    """

    def __init__(self, where: str, files: Sequence[str], datasets: Sequence[Dataset]):
        self.where = where
        self._files = [file for file in dict.fromkeys(map(str, files)) if os.path.isfile(file)]
        self._data = FilesAsTheyWere(self._files)
        self.images = FilesAsTheyWere(path for dataset in datasets for path in _image_files(dataset))
        self._next = 0

    @property
    def facts(self) -> dict[str, Any]:
        """Number of the images, and the digest of their sizes and times."""
        return {"number": len(self.images), "digest": self.images.digest}

    def check(self, row: dict[str, Any]) -> None:
        """
        Looks at the images of a row, and at one data file, each in its turn.

        Raises:
            FileChanged: if one is not what it was.
        """
        place = f"{self.where}: row with id {row.get('id')!r}"
        for image in row["images"]:
            if isinstance(image, dict) and image.get("path") and not image.get("bytes"):
                self.images.check(image["path"], place)
        if self._files:
            self._data.check(self._files[self._next % len(self._files)], place)
            self._next += 1


def _image_files(dataset: Dataset) -> Iterator[str]:
    for chunk in dataset.data.column("images").chunks:
        # Only files: an embedded picture's path is a name that it once had.
        images = pc.list_flatten(chunk)
        yield from pc.unique(images.filter(pc.is_null(pc.struct_field(images, "bytes"))).field("path")).to_pylist()


def refuse_younger(path: str, since_ns: int, place: str) -> None:
    """
    Raises:
        FileChanged: if the file was written after `since_ns`, in nanoseconds since 1970. A time that still lies ahead
            says nothing.
    """
    num_bytes, written = _state(path)
    if since_ns < written <= time.time_ns():
        raise changed(path, place, f"{_in_words((num_bytes, written))}, and the run began {_time(since_ns)}")


def changed(path: str, place: str, how: str) -> FileChanged:
    return FileChanged(
        f"{place}: {path} was changed while the run was going on ({how}); put it back as it was and go on from the "
        "last checkpoint, or begin a new run."
    )


def _key(path: str) -> int:
    return int.from_bytes(blake2b(os.fsencode(path), digest_size=8).digest(), "little")


def _state(path: str) -> tuple[int, int]:
    """Size and time; (-1, 0) for a file that is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return -1, 0
    return found.st_size, found.st_mtime_ns


def _in_words(state: tuple[int, int]) -> str:
    num_bytes, written = state
    return "not there" if num_bytes < 0 else f"{num_bytes:,} bytes of {_time(written)}"


def _time(nanoseconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(nanoseconds / 1e9))
