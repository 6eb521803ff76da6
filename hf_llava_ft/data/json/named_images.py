"""The images that rows name, each asked once what it is: for the name of the cache, for the paths of the rows, and for
whether it was decoded before.
"""

import os
import stat
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from hf_llava_ft.data.decoded import MISSING, STATE, packed_state
from hf_llava_ft.data.image_folder import ImageFolder
from hf_llava_ft.data.worker_pool import results_in_order

_AT_ONCE = 32_768  # a process of its own costs as much as 10,000 of them
# In names, one a line: empty or dotted pieces of a path, absolute paths and addresses.
_NOT_PLAIN = [f"{before}{dots}{after}" for before in "/\n" for dots in ("", ".", "..") for after in "/\n"]


class _Group(NamedTuple):
    states: bytes
    digest: bytes
    are_plain: bool


class NamedImages:
    """
    Args:
        names (`Iterable[str]`): of images, as rows have them.
        folder (`ImageFolder`): that they are relative to.

    Attributes:
        states (`ndarray[N]` of `STATE`): of the files behind the names, links followed; `MISSING` for those that are
            not there. What is wrong with them is said with their rows.
        digest (`bytes`): of the folder, the names, and the files' sizes and modification times.
        are_plain (`bool`): every name, behind the folder's, is the real path of a file.

    A copy that goes to another process has `are_plain` only: no worker needs the rest.
    """

    def __init__(self, names: Iterable[str], folder: ImageFolder):
        self.names = list(names)
        # With the slash; where there is no folder, nothing is found.
        self.prefix = None if folder.real_path is None else os.path.join(folder.real_path, "")
        starts = range(0, len(self.names), _AT_ONCE)
        groups = list(results_in_order(lambda start: self._look_at(self.names[start : start + _AT_ONCE]), starts))
        self.states = np.frombuffer(b"".join(group.states for group in groups), dtype=STATE)
        self.are_plain = self.prefix is not None and all(group.are_plain for group in groups)
        digest = blake2b(os.fsencode(folder.real_path or ""), digest_size=16)
        for group in groups:
            digest.update(group.digest)
        self.digest = digest.digest()

    @property
    def paths(self) -> list[str]:
        return [f"{self.prefix or '/'}{name}" for name in self.names]

    def __getstate__(self) -> dict:
        return {"names": [], "prefix": self.prefix, "are_plain": self.are_plain, "digest": self.digest}

    def _look_at(self, names: Sequence[str]) -> _Group:
        together = "\n".join(names)
        are_plain = not any(mark in f"\n{together}\n" for mark in _NOT_PLAIN)
        are_plain = are_plain and self._are_real({name.rpartition("/")[0] for name in names})
        states = bytearray()
        for name in names:
            state = MISSING
            try:
                path = f"{self.prefix}{name}"
                found = os.lstat(path)
                if not stat.S_ISREG(found.st_mode):
                    are_plain, found = False, os.stat(path)
                state = packed_state(found)
            except (OSError, ValueError):
                are_plain = False
            states += state
        sized = np.frombuffer(states, dtype=STATE)[["size", "modified"]]
        digest = blake2b(together.encode("utf-8", "surrogatepass"), digest_size=16)
        digest.update(sized["size"].tobytes() + sized["modified"].tobytes())
        return _Group(bytes(states), digest.digest(), are_plain)

    def _are_real(self, directories: Iterable[str]) -> bool:
        """Whether no link leads to them."""
        try:
            paths = [os.path.join(self.prefix or "", directory, "") for directory in directories]
            return all(os.path.join(os.path.realpath(path), "") == path for path in paths)
        except (OSError, ValueError):
            return False
