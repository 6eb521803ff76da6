"""What a data file holds, found by reading it once and remembered for as long as the file is the same.

A small list beside the cache of `datasets` keeps it: so opening a known set reads no data file again, and costs one
`stat` for each image.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from filelock import FileLock

from hf_llava_ft.data.json.named_images import NamedImages
from hf_llava_ft.data.json.parts import JsonPart, index_json
from hf_llava_ft.errors import UserError


@dataclass(frozen=True)
class FileIndex:
    """
    Args:
        digest (`str`): of the file's bytes.
        images (`list[str]`): the image names in it, each once, in the order they first appear.
        parts (`list[JsonPart]`): its rows, in parts that several processes can read.
        num_rows (`int`): how many they are.
    """

    digest: str
    images: list[str]
    parts: list[JsonPart]
    num_rows: int


def file_index(path: str, cache_root: Path, keep_columns: bool = False) -> FileIndex:
    """
    Args:
        path (`str`): a LLaVA JSON or JSONL file.
        cache_root (`Path`): where the list is kept.
        keep_columns (`bool`): if the file has to be read now, keep its columns in [`columns_folder`].

    Raises:
        UserError: if the file can't be read, or is no JSON.
    """
    kept = _kept_index(path, cache_root)
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{kept}.lock"):  # one process of many reads the file
            if not kept.exists():
                unfinished, columns = kept.with_suffix(".incomplete"), kept.with_suffix(_COLUMNS)
                shutil.rmtree(columns, ignore_errors=True)  # of a process that was killed
                found = index_json(path, columns_folder=columns if keep_columns else None)
                index = FileIndex(found.digest, found.images, found.parts, found.num_rows)
                written = {**vars(index), "parts": [vars(part) for part in index.parts]}
                unfinished.write_text(json.dumps(written), encoding="utf-8")
                unfinished.replace(kept)
                return index
    known = json.loads(kept.read_text(encoding="utf-8"))
    parts = [JsonPart(**part) for part in known["parts"]]
    return FileIndex(known["digest"], known["images"], parts, known["num_rows"])


def columns_folder(path: str, cache_root: Path) -> Path:
    """Where the columns of a file are that was just read; it need not be there."""
    return _kept_index(path, cache_root).with_suffix(_COLUMNS)


def content_fingerprint(indexes: Sequence[FileIndex], images: NamedImages) -> str:
    """Digest of the data files' contents, of the folder, and each named image's path, size and modification time."""
    digest = blake2b(images.digest, digest_size=16)
    for index in indexes:
        digest.update(index.digest.encode())
    return digest.hexdigest()


def _kept_index(path: str, cache_root: Path) -> Path:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); check the path.") from None
    # With ctime, which no program can set: a file that another of equal size and time was copied over is noticed too.
    identity = [path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    name = f"{blake2b(repr(identity).encode(), digest_size=16).hexdigest()}.index.json"
    return cache_root / "llava_conversations_files" / name


_COLUMNS = ".columns"
