"""The columns of a file's parts, on the disk between the reading that counts its rows and the one that writes them
into the cache of `datasets`, so that the JSON is parsed once.

Whoever keeps them removes them; what a killed process left is used by the next one, or removed.
"""

import os
from contextlib import suppress
from pathlib import Path

import pyarrow as pa

from hf_llava_ft.data.json.columns import Columns


def keep(columns: Columns, folder: Path, number: int) -> None:
    """
    Args:
        columns (`Columns`): of a part.
        folder (`Path`): those of one file; it is made.
        number (`int`): which part it is.

    Where they can't be written they are not kept: the part is then parsed once more.
    """
    path = folder / f"{number}.arrow"
    unfinished = path.with_suffix(f".incomplete-{os.getpid()}")
    arrays = [columns.ids, columns.messages, columns.image_names, pa.array(columns.num_words)]
    batch = pa.record_batch(arrays, names=list(Columns._fields))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(os.fspath(unfinished), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        unfinished.replace(path)
    except OSError:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def kept(folder: Path, number: int) -> Columns | None:
    """What `keep` was given, mapped from the disk; None if it is not there."""
    try:
        with pa.memory_map(os.fspath(folder / f"{number}.arrow")) as file:
            batch = pa.ipc.open_file(file).get_batch(0)
    except (OSError, pa.ArrowException):
        return None
    ids, messages, image_names, num_words = batch.columns
    return Columns(ids, messages, image_names, num_words.to_numpy(zero_copy_only=False))
