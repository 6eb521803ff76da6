"""From a file or a folder to what holds its rows.

What may surprise:
* Files are told apart by their first bytes, folders by what lies in them.
* Splits of a folder of Parquet are those that `datasets` would find: by the `configs` of its README, or by file names.
  `train` is taken unless another is asked for.
"""

import csv
import os
import stat
from typing import Any

import datasets

from hf_llava_ft.data.formats.containers import (
    ArrowRows,
    Container,
    CsvFile,
    ImageFolderMetadata,
    JsonFile,
    ParquetFiles,
    one_line,
)
from hf_llava_ft.errors import UserError

_SEPARATORS = ("\t", ",", ";")
_METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of `imagefolder` in `datasets`


def open_container(path: str, split: str | None = None) -> Container:
    """
    Args:
        path (`str`): a file or a folder.
        split (`str`, *optional*): of a folder with several; `train` if there is one by default.

    Raises:
        UserError: if it holds nothing that can be read as rows.
    """
    if os.path.isdir(path):
        return _open_folder(path, split)
    if split is not None:
        raise UserError(f"{path} is a file and has no split {split!r}; leave it out.")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path} is neither a file nor a folder; give one that holds a dataset.")
        with open(path, "rb") as file:
            head = file.read(2**16)
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror or error}); check the path.") from None
    if head[:4] == b"PAR1":
        return ParquetFiles(path, [path])
    if head.startswith(b"version https://git-lfs.github.com/spec"):
        raise UserError(f"{path} is the pointer of Git LFS to a file, and not the file; fetch it with git lfs pull.")
    if head[:2] in (b"PK", b"\x1f\x8b") or head[257:262] == b"ustar":
        raise UserError(f"{path} is an archive; unpack it and give what was in it.")
    if head[:8] == b"ARROW1\0\0":
        raise UserError(f"{path} is an Arrow file; give the folder that save_to_disk wrote, or Parquet.")
    if path.lower().endswith((".yaml", ".yml")):
        raise UserError(
            f"{path} is YAML, in which LLaVA-NeXT lists datasets; name them in --data_path instead, with the share of "
            "each: a.json:0.3,b.json."
        )
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    separator = _separator(text, path)
    return JsonFile(path, text[:1]) if separator is None else CsvFile(path, separator)


def _separator(text: bytes, path: str) -> str | None:
    """What stands between the columns of a table; None if its first line has only one."""
    # Anything else is left to the JSON reader, which says what is wrong and where.
    if text[:1] in (b"[", b"{", b"") or b"\0" in text.splitlines()[0]:
        return None
    lines = text.decode("utf-8", "replace").splitlines(keepends=True)
    if text[:1] == b'"' and not any(f'"{each}' in lines[0] for each in _SEPARATORS):
        return None
    num_columns = {}
    for each in _SEPARATORS:
        try:
            num_columns[each] = len(next(csv.reader(lines, delimiter=each)))
        except csv.Error:
            num_columns[each] = 1
    separator = max(_SEPARATORS, key=lambda each: num_columns[each])
    if num_columns[","] == num_columns[";"] == num_columns[separator] > 1:
        raise UserError(
            f"{path}: its first line could be cut at commas or at semicolons; put names that hold one in quotes."
        )
    return separator if num_columns[separator] > 1 else None


def _open_folder(folder: str, split: str | None) -> Container:
    if any(os.path.isfile(os.path.join(folder, name)) for name in ("dataset_dict.json", "state.json")):
        try:
            loaded = datasets.load_from_disk(folder)
        except Exception as error:  # pyarrow, json and datasets each have their own
            raise UserError(f"{folder} can't be loaded from disk ({one_line(error)}); save it again.") from None
        where = folder if split is None else f"{folder}:{split}"
        return ArrowRows("save_to_disk folder", where, one_split(loaded, folder, split))

    for place in filter(None, (split and os.path.join(folder, split), folder, os.path.join(folder, "train"))):
        for name in _METADATA_NAMES:
            if os.path.isfile(os.path.join(place, name)):
                return ImageFolderMetadata(place, open_container(os.path.join(place, name)))

    parquet, others = [], []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.endswith(".parquet"):
                parquet.append(os.path.join(parent, name))
            elif name.endswith((".json", ".jsonl")) and parent == folder:
                others.append(os.path.join(parent, name))
    if parquet:
        return ParquetFiles(folder if split is None else f"{folder}:{split}", _split_files(folder, split))
    if len(others) == 1 and split is None:
        return open_container(others[0])
    held = f"{len(others)} JSON files" if others else "no data file"
    raise UserError(
        f"{folder} holds {held}, no Parquet, no metadata.csv and nothing that save_to_disk wrote; "
        "give the data file itself, or make one with llava-ft init if these are pictures with captions."
    )


def _split_files(folder: str, split: str | None) -> list[str]:
    try:
        # By the rules of `datasets` for names and READMEs. Nothing is read but the README.
        data_files = datasets.load_dataset_builder(folder).config.data_files or {}
    except Exception as error:
        raise UserError(
            f"{folder}: its data files can't be told ({one_line(error)}); give a Parquet file itself."
        ) from None
    splits = {str(name): [str(path) for path in paths] for name, paths in data_files.items()}
    files = splits[split_name(list(splits), folder, split)]
    root = os.path.join(os.path.abspath(folder), "")
    outside = next((path for path in files if not os.path.abspath(path).startswith(root)), None)
    if outside is not None:
        raise UserError(f"{folder}: its README names the data file {outside!r}, outside the folder; correct it.")
    return files


def one_split(loaded: Any, where: str, split: str | None) -> datasets.Dataset:
    """Of what `datasets` has loaded: one data set, or several by name."""
    if isinstance(loaded, dict):
        return loaded[split_name(list(loaded), where, split)]
    if split is not None and str(loaded.split) != split:
        raise UserError(f"{where} has no split {split!r}; leave it out.")
    return loaded


def split_name(names: list[str], where: str, split: str | None) -> str:
    """The one of `names` that is asked for, or that goes without saying."""
    if split is None:
        split = "train" if "train" in names or not names else names[0] if len(names) == 1 else None
    if split not in names:
        wanted = "which is not told" if split is None else f"not {split!r}"
        raise UserError(f"{where} has the splits {', '.join(names) or 'none'}, {wanted}; write {where}:SPLIT.")
    return split
