"""What a data file holds, found by reading it once and remembered for as long as the file is the same.

A small list beside the cache of `datasets` keeps it: so opening a known set reads no data file again, and costs one
`stat` for each image.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from filelock import FileLock

from hf_llava_ft.data.image_folder import ImageFolder
from hf_llava_ft.data.json.parts import JsonPart, index_json
from hf_llava_ft.data.worker_pool import results_in_order
from hf_llava_ft.errors import UserError

_STATS_AT_ONCE = 32_768  # images; a process of its own costs as much as 10,000 of them


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


def file_index(path: str, cache_root: Path) -> FileIndex:
    """
    Args:
        path (`str`): a LLaVA JSON or JSONL file.
        cache_root (`Path`): where the list is kept.

    Raises:
        UserError: if the file can't be read, or is no JSON.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); check the path.") from None
    # With ctime, which no program can set: a file that another of equal size and time was copied over is noticed too.
    identity = [path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    name = f"{blake2b(repr(identity).encode(), digest_size=16).hexdigest()}.index.json"
    kept = cache_root / "llava_conversations_files" / name
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{kept}.lock"):  # one process of many reads the file
            if not kept.exists():
                unfinished = kept.with_suffix(".incomplete")
                index = _read_once(path)
                written = {**vars(index), "parts": [vars(part) for part in index.parts]}
                unfinished.write_text(json.dumps(written), encoding="utf-8")
                unfinished.replace(kept)
    known = json.loads(kept.read_text(encoding="utf-8"))
    parts = [JsonPart(**part) for part in known["parts"]]
    return FileIndex(known["digest"], known["images"], parts, known["num_rows"])


def content_fingerprint(indexes: Sequence[FileIndex], image_folder: str | None) -> str:
    """Digest of the data files' contents, of the folder, and each named image's path, size and modification time."""
    folder = ImageFolder(image_folder).real_path or ""
    digest = blake2b(os.fsencode(folder), digest_size=16)
    names: dict[str, None] = {}
    for index in indexes:
        digest.update(index.digest.encode())
        names.update(dict.fromkeys(index.images))
    ordered = list(names)
    groups = [ordered[start : start + _STATS_AT_ONCE] for start in range(0, len(ordered), _STATS_AT_ONCE)]

    def states_of(group: int) -> bytes:
        states = "\n".join(_state(folder, name) for name in groups[group])
        return blake2b(states.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    for states in results_in_order(states_of, range(len(groups))):
        digest.update(states)
    return digest.hexdigest()


def _read_once(path: str) -> FileIndex:
    index = index_json(path)
    digest = blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return FileIndex(digest.hexdigest(), index.images, index.parts, index.num_rows)


def _state(folder: str, name: str) -> str:
    try:
        status = os.stat(f"{folder}/{name}")
        return f"{name}\t{status.st_size}\t{status.st_mtime_ns}"
    except (OSError, ValueError):  # what is wrong with it is said with its row, when rows are read
        return f"{name}\tmissing"
