"""A data set of the Hub by its id.

What may surprise:
* A set of JSON files is not left to the JSON reader of `datasets`. That decides a column's type by its first 10 MB,
  and where texts and numbers mix, "000123" becomes 123 and "true" a truth value, or every text of a later part of the
  file gets quotes around it, all without a word. Its files are downloaded and read as our own are: a text stays a
  text, and a number in place of one is refused with row and turn.
* A set in WebDataset form is refused: there a picture whose ending is spelled otherwise than in the first rows, `.JPG`
  or `.jpeg` for `.jpg`, is none.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import datasets
from huggingface_hub import is_offline_mode, snapshot_download

from hf_llava_ft.data.formats.containers import ArrowRows, Container, one_line
from hf_llava_ft.data.formats.opening import one_split, split_name
from hf_llava_ft.data.json.rows import iter_json_rows
from hf_llava_ft.errors import UserError


class RowRange(NamedTuple):
    """
    Args:
        files (`tuple[str, ...]`): of a split, in order.
        start, stop (`int`, *optional*): which of its rows, counted from 0; all of them by default.
    """

    files: tuple[str, ...]
    start: int = 0
    stop: int | None = None


class HubJson(Container):
    """JSON files of a Hub data set, in its cache here; rows are numbered through all of them."""

    name = "Hub data set (JSON)"

    def __init__(self, where: str, ranges: list[RowRange]):
        self.where, self.ranges = where, ranges
        self.files = list(dict.fromkeys(file for rows in ranges for file in rows.files))
        self.fingerprint = repr([rows[1:] for rows in ranges])

    def iter_raw(self) -> Iterator[tuple[int, Any]]:
        number = 0
        for files, start, stop in self.ranges:
            for row in islice(_rows_of(files), start, stop):
                number += 1
                yield number, row
        if not number:
            raise UserError(f"{self.where} has no rows; ask for others.")


def _rows_of(files: tuple[str, ...]) -> Iterator[Any]:
    for file in files:
        for _, row in iter_json_rows(file):
            yield row


def load_hub_dataset(name: str, split: str | None) -> Container:
    """
    A data set of the Hub, downloaded into its cache; code of the Hub is never run.

    Args:
        name (`str`): `user/name`.
        split (`str`, *optional*): `train` by default, or the only one; a slice as `datasets` writes it, `train[:100]`.

    Raises:
        UserError: if it can't be had, or is of a form that would not arrive as it is.
    """
    where = name if split is None else f"{name}:{split}"
    try:
        builder = _builder(name)
        if builder.info.builder_name == "json":
            return _json_rows(builder, name, split, where)
        if builder.info.builder_name == "webdataset":
            raise UserError(
                f"{name} is a WebDataset of TAR files, of which a picture may be lost by the spelling of its ending "
                '(.JPG beside .jpg); make Parquet of it, with the columns "image" and "text" or "conversations".'
            )
        loaded = datasets.load_dataset(name, split=split)
    except UserError:
        raise
    except Exception as error:  # of datasets, huggingface_hub, httpx and fsspec; all mean the same here
        raise UserError(
            f"{name} is no file here and can't be loaded from the Hub ({one_line(error)}); "
            "check the name, the split and the network."
        ) from error
    rows = one_split(loaded, name, None)
    if rows.info.builder_name == "json":  # without the network, what an earlier load_dataset has left
        raise UserError(
            f"{name} is here only as datasets' own JSON reader left it, which may have changed texts; "
            "unset HF_HUB_OFFLINE for one run."
        )
    return ArrowRows("Hub data set", where, rows)


def _builder(name: str) -> datasets.DatasetBuilder:
    """What `datasets` would read it with; without the network, of the files that are in the cache."""
    if not is_offline_mode():
        return datasets.load_dataset_builder(name)
    try:
        folder = snapshot_download(name, repo_type="dataset")
        builder = datasets.load_dataset_builder(folder)
        if builder.info.builder_name == "json":
            return builder
    except Exception:  # not there, or not whole: then what datasets has in its own cache
        pass
    return datasets.load_dataset_builder(name)


def _json_rows(builder: datasets.DatasetBuilder, name: str, split: str | None, where: str) -> HubJson:
    field = getattr(builder.config, "field", None)
    if field is not None:
        raise UserError(
            f"{name} has its rows under the field {field!r} of its files, which is not read here; download the file "
            "and write the list of rows into one of its own."
        )
    data_files = {
        str(each): [str(file) for file in files] for each, files in (builder.config.data_files or {}).items()
    }
    manager = datasets.DownloadManager()

    def files_of(each: str) -> tuple[str, ...]:
        here = manager.download_and_extract(data_files[each])
        return tuple(manager.iter_files(here))

    if split is None or split in data_files:
        return HubJson(where, [RowRange(files_of(split_name(list(data_files), name, split)))])
    wanted = datasets.ReadInstruction.from_spec(split)
    # A slice may be in per cent, or count from the end, of every split.
    files = {each: files_of(each) for each in data_files if each in split}
    counts = {each: sum(1 for _ in _rows_of(found)) for each, found in files.items()}
    return HubJson(
        where, [RowRange(files[each.splitname], each.from_, each.to) for each in wanted.to_absolute(counts)]
    )
