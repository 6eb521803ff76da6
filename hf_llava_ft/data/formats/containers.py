"""What holds rows: JSON, CSV, Parquet, Arrow. Each is read a little at a time.

What may surprise:
* In a table every row has every column. A null there is a key that is not there, so that a dialect sees the same row
  as from JSON.
"""

import csv
import os
from collections.abc import Iterator
from typing import Any, NamedTuple, TextIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from hf_llava_ft.data.json.rows import MAX_ROW_CHARS, iter_json_rows
from hf_llava_ft.data.schema import row_place
from hf_llava_ft.errors import UserError

# Rows decoded at once: with embedded pictures of a megabyte, 32 MB.
_BATCH_ROWS = 32
# A row group is decoded page by page, so only the mean can be judged beforehand; a camera's picture is below 64 MiB.
_MAX_MEAN_ROW_BYTES = 256 * 2**20


class Container:
    """
    Rows as plain data.

    Attributes:
        name (`str`): in words, for messages.
        where (`str`): file, folder or Hub id.
        files (`list[str]`): what the rows are read from; their state decides whether a cache is still good.
        fingerprint (`str`): decides it too, where there is one.
        num_rows (`int`, *optional*): None where only reading it all would tell.
        image_folder (`str`, *optional*): folder that image paths are relative to, where the container says so itself.
    """

    name = ""
    where = ""
    files: list[str] = []
    fingerprint = ""
    num_rows: int | None = None
    image_folder: str | None = None

    def iter_raw(self) -> Iterator[tuple[int, Any]]:
        """Yields (number from 1, row); raises `UserError` if the container is broken."""
        raise NotImplementedError

    def column_names(self) -> list[str]:
        """Of a table all its columns; of other files none, since any row may have others."""
        return []


class JsonFile(Container):
    """A JSON list of rows, or one row per line."""

    def __init__(self, path: str, first: bytes):
        self.where, self.files = path, [path]
        self.name = "JSON" if first == b"[" else "JSON Lines"

    def iter_raw(self) -> Iterator[tuple[int, Any]]:
        return iter_json_rows(self.where)


class CsvFile(Container):
    """
    Values under a line of names, separated by commas, tabs or semicolons. Every value is text; an empty one is a key
    that is not there.
    """

    def __init__(self, path: str, separator: str = ","):
        self.where, self.files, self._separator = path, [path], separator
        self.name = {",": "CSV", "\t": "TSV"}.get(separator, "CSV (semicolons)")

    def column_names(self) -> list[str]:
        return next(self._records())[1]

    def iter_raw(self) -> Iterator[tuple[int, Any]]:
        number, header = 0, []
        for number, values in self._records():
            if not number:
                header = values
                continue
            if len(values) != len(header):
                in_words = {",": "comma", "\t": "tab"}.get(self._separator, "semicolon")
                raise UserError(
                    f"{row_place(self.where, number)} has {len(values)} values under {len(header)} names; "
                    f"write a value that holds a {in_words} in quotes."
                )
            yield number, {name: value for name, value in zip(header, values, strict=True) if value}
        if not number:
            raise UserError(f"{self.where} has no rows; write at least one below the names of the columns.")

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """(number, values); of the line of names the number is 0."""
        number = 0
        try:
            with open(self.where, encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(self._lines(file), delimiter=self._separator, strict=True)
                header = next(reader, None) or []
                twice = next((name for index, name in enumerate(header) if name in header[:index]), None)
                if twice is not None:
                    raise UserError(f"{self.where} has two columns called {twice[:40]!r}; rename one of them.")
                yield 0, header
                for values in filter(None, reader):  # an empty line is no row
                    number += 1
                    yield number, values
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.where} is not UTF-8 text ({error.reason} after row {number}); save it as UTF-8."
            ) from None
        except csv.Error as error:
            raise UserError(
                f"{row_place(self.where, number + 1)} is not valid {self.name} ({error}); correct it."
            ) from None
        except OSError as error:
            raise UserError(f"{self.where} can't be read ({error.strerror or error}); check the path.") from None

    def _lines(self, file: TextIO) -> Iterator[str]:
        while line := file.readline(MAX_ROW_CHARS + 1):
            if len(line) > MAX_ROW_CHARS:
                raise UserError(f"{self.where} has a line longer than {MAX_ROW_CHARS} characters; correct it.")
            yield line


class RowGroup(NamedTuple):
    """
    Consecutive rows of a Parquet file.

    Args:
        path (`str`): the file.
        group (`int`): its place in it.
        first_row (`int`): number of its first row, from 1, over all files.
        num_rows (`int`): how many rows it has.
        num_bytes (`int`): what they unpack to.
    """

    path: str
    group: int
    first_row: int
    num_rows: int
    num_bytes: int


class ParquetFiles(Container):
    """Parquet files whose rows follow one another."""

    name = "Parquet"

    def __init__(self, where: str, files: list[str]):
        self.where, self.files = where, files
        self.num_rows = sum(self._open(path).metadata.num_rows for path in files)
        if not self.num_rows:
            raise UserError(f"{where} has no rows; give Parquet files with at least one conversation.")

    def _open(self, path: str) -> pq.ParquetFile:
        try:
            file = pq.ParquetFile(path, memory_map=True)
            names = file.schema_arrow.names
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{path} is not a whole Parquet file ({one_line(error)}); write or copy it again.") from (
                None
            )
        if len(set(names)) < len(names):
            raise UserError(f"{path} has two columns of the same name; rename one of them.")
        return file

    def iter_raw(self) -> Iterator[tuple[int, Any]]:
        for group in self.row_groups():
            yield from self.iter_row_group(group)

    def row_groups(self) -> Iterator["RowGroup"]:
        """What the rows lie in; each can be read on its own."""
        number = 1
        for path in self.files:
            metadata = self._open(path).metadata
            for index in range(metadata.num_row_groups):
                group = metadata.row_group(index)
                yield RowGroup(path, index, number, group.num_rows, group.total_byte_size)
                number += group.num_rows

    def column_names(self) -> list[str]:
        return self._open(self.files[0]).schema_arrow.names

    def iter_row_group(self, group: "RowGroup") -> Iterator[tuple[int, Any]]:
        """The rows of one of [`row_groups`], as `iter_raw` gives them."""
        path, number = group.path, group.first_row - 1
        if group.num_rows and group.num_bytes / group.num_rows > _MAX_MEAN_ROW_BYTES:
            raise UserError(
                f"{path}: rows {number + 1} to {number + group.num_rows} unpack to {group.num_bytes:,} bytes, which "
                "is more than any conversation; remove what is so long."
            )
        file = self._open(path)
        try:
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group.group]):
                for row in _plain_rows(batch):
                    number += 1
                    yield number, row
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{path} can't be read after row {number} ({one_line(error)}); write or copy it again."
            ) from None


class ArrowRows(Container):
    """A `datasets.Dataset`, from a folder of `save_to_disk` or from the Hub."""

    def __init__(self, name: str, where: str, dataset: datasets.Dataset):
        self.name, self.where, self.dataset = name, where, dataset
        self.files = [file["filename"] for file in dataset.cache_files]
        self.fingerprint = dataset._fingerprint
        self.num_rows = len(dataset)
        if not self.num_rows:
            raise UserError(f"{where} has no rows; give a dataset with at least one conversation.")

    def iter_raw(self) -> Iterator[tuple[int, Any]]:
        return self.iter_rows(0, len(self.dataset))

    def column_names(self) -> list[str]:
        return self.dataset.column_names

    def iter_rows(self, start: int, stop: int) -> Iterator[tuple[int, Any]]:
        """The rows at `start`, counted from 0, up to `stop`, as `iter_raw` gives them."""
        rows = self.dataset.with_format("arrow")  # as stored: formatting would decode the pictures
        for first in range(start, stop, _BATCH_ROWS):
            yield from enumerate(_plain_rows(rows[first : min(first + _BATCH_ROWS, stop)]), start=first + 1)


class ImageFolderMetadata(Container):
    """A folder of images with a table of their captions, as `imagefolder` of `datasets` reads it."""

    def __init__(self, folder: str, table: Container):
        self.table = table
        self.name = f"folder ({os.path.basename(table.files[0])})"
        self.where, self.files, self.num_rows = table.where, table.files, table.num_rows
        self.image_folder = folder

    def iter_raw(self) -> Iterator[tuple[int, Any]]:
        return self.table.iter_raw()

    def column_names(self) -> list[str]:
        return self.table.column_names()


def _plain_rows(batch: pa.RecordBatch | pa.Table) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if value is not None} for row in batch.to_pylist()]


def one_line(error: BaseException) -> str:
    """What an exception says, fit for a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
