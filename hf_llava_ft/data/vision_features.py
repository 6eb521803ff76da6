"""What a frozen vision tower made of pictures, kept on disk: a file for each picture, which is found by the picture's
own bytes.

A file is written beside its place and moved there whole, so that a killed run leaves none that is half done, and
processes that store the same picture at once leave one of two equal ones. Whatever else may have befallen it, the
checksum in its header says: a file that is not as it was written counts as none, and is written anew.

Files are mapped into memory and not read into it: what a batch takes of them is copied once.
"""

import os
import secrets
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_TENSOR = "features"
_UNFINISHED = "unfinished"
_DAY = 86_400


@dataclass(frozen=True)
class StoredPicture:
    """
    Args:
        features (`float[crops, P, F]`): what the projector reads.
        height, width (`int`): of the picture in pixels, as it was opened.
    """

    features: torch.Tensor
    height: int
    width: int


def digest_of(picture: bytes) -> str:
    """By which an encoded picture is known."""
    return blake2b(picture, digest_size=16).hexdigest()


class VisionFeatures:
    """
    Args:
        folder (`Path`): of one tower and one way of preparing pictures for it.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, digest: str) -> StoredPicture | None:
        """What is kept of the picture of this `digest`; None where there is nothing, or not what was written."""
        try:
            with safe_open(self._path(digest), framework="pt") as file:
                said, features = file.metadata() or {}, file.get_tensor(_TENSOR)
            found = StoredPicture(features, int(said["height"]), int(said["width"]))
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        return found if said.get("checksum") == _checksum(digest, found) else None

    def has(self, digest: str) -> bool:
        """Whether there is a file of it."""
        return self._path(digest).exists()

    def write(self, digest: str, picture: StoredPicture) -> None:
        """
        Raises:
            OSError: if there is no room, or the folder can't be written to.
        """
        path = self._path(digest)
        picture = StoredPicture(picture.features.detach().cpu().contiguous(), picture.height, picture.width)
        said = {"height": str(picture.height), "width": str(picture.width), "checksum": _checksum(digest, picture)}
        unfinished = self.folder / _UNFINISHED / f"{digest}-{secrets.token_hex(4)}"
        for folder in (path.parent, unfinished.parent):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            save_file({_TENSOR: picture.features}, unfinished, metadata=said)
            os.replace(unfinished, path)
        except SafetensorError as error:  # as it calls a full disk
            raise OSError(str(error)) from error
        finally:
            unfinished.unlink(missing_ok=True)

    def tidy(self) -> None:
        """Removes what killed runs left half done, a day ago or earlier."""
        with suppress(OSError):
            for file in (self.folder / _UNFINISHED).iterdir():
                with suppress(OSError):
                    if file.stat().st_mtime < time.time() - _DAY:
                        file.unlink()

    def _path(self, digest: str) -> Path:
        return self.folder / digest[:2] / f"{digest}.safetensors"


def _checksum(digest: str, picture: StoredPicture) -> str:
    """Of all that a file says, and of whose it is."""
    features = picture.features
    said = f"{digest} {picture.height} {picture.width} {features.dtype} {tuple(features.shape)}"
    content = features.flatten().view(torch.uint8).numpy().data  # no copy
    return f"{zlib.crc32(content, zlib.crc32(said.encode())):08x}"
