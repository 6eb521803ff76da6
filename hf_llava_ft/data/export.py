"""Data of any format as a Parquet dataset for the Hub: images embedded, read back before it counts.

What may surprise:
* Rows are read, written and compared one small group at a time, so memory does not grow with the set.
* Of an image's path only the file name is written: the rest says where it lay on somebody's computer.
* The folder appears when everything in it has been read back and found equal, or not at all.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Image, List
from datasets.utils import tqdm  # the bar that datasets' disable_progress_bars() silences

from hf_llava_ft.checkpoints.artifact import staged_folder
from hf_llava_ft.data.features import FEATURES
from hf_llava_ft.data.formats.checked_rows import checked_rows
from hf_llava_ft.data.formats.images import MAX_IMAGE_BYTES
from hf_llava_ft.data.formats.source import Source
from hf_llava_ft.errors import UserError

# `datasets` writes row groups of 100 rows where there are images, so that a viewer of the Hub can show a page.
_GROUP_ROWS = 100
_GROUP_BYTES = 64 * 2**20


@dataclass(frozen=True)
class ExportedDataset:
    """
    Args:
        folder (`Path`): README.md, if a card was asked for, and data/train-*.parquet.
        num_rows (`int`): rows.
        num_images (`int`): embedded images.
        num_bytes (`int`): of the rows in memory, images encoded.
        num_shards (`int`): Parquet files.
        download_bytes (`int`): of these files.
    """

    folder: Path
    num_rows: int
    num_images: int
    num_bytes: int
    num_shards: int
    download_bytes: int


def export_dataset(
    sources: list[Source],
    output_dir: str | os.PathLike,
    max_shard_size: int | str = "500MB",
    card: Callable[[ExportedDataset], str] | None = None,
) -> ExportedDataset:
    """
    Write sources as one Parquet dataset with the columns of `FEATURES`, and compare what `datasets` reads from it.

    Args:
        sources (`list[Source]`): of `open_source`; their rows follow one another.
        output_dir (`str`): a folder that is not there yet, or is empty.
        max_shard_size (`int` or `str`, defaults to "500MB"): bytes of rows after which the next file begins.
        card (`Callable`, *optional*): makes of the numbers the text of README.md.

    Raises:
        UserError: at the first row or image that is wrong; nothing is written then.
        `RuntimeError`: if what was written does not read back the same.
    """
    shard_bytes = _shard_bytes(max_shard_size)
    weighted = next((source for source in sources if source.weight != 1), None)
    if weighted is not None:
        raise UserError(f"{weighted.where} has a weight, and a dataset is written whole; give the weight in training.")
    with staged_folder(Path(output_dir)) as staged:
        (staged / "data").mkdir()
        written = _Shards(staged / "data", shard_bytes)
        digest = blake2b(digest_size=16)
        with tqdm(desc="Writing", unit=" rows") as bar:
            for row in _embedded_rows(sources):
                digest.update(_row_digest(row))
                written.add(row)
                bar.update()
        written.close()
        exported = ExportedDataset(
            folder=Path(output_dir),
            num_rows=written.num_rows,
            num_images=written.num_images,
            num_bytes=written.num_bytes,
            num_shards=len(written.paths),
            download_bytes=sum(path.stat().st_size for path in written.paths),
        )
        if card is not None:
            (staged / "README.md").write_text(card(exported), encoding="utf-8")
        _read_back(staged, exported.num_rows, digest.digest())
    return exported


class _Shards:
    """Parquet files of about equal size, of which one row group is held in memory."""

    def __init__(self, folder: Path, shard_bytes: int):
        self.paths: list[Path] = []
        self.num_rows = self.num_images = self.num_bytes = 0
        self._folder, self._shard_bytes = folder, shard_bytes
        self._writer: pq.ParquetWriter | None = None
        self._bytes_in_shard = self._bytes_in_group = 0
        self._group: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self._group.append(row)
        self.num_rows += 1
        self.num_images += len(row["images"])
        self._bytes_in_group += sum(len(image["bytes"]) for image in row["images"])
        if len(self._group) >= _GROUP_ROWS or self._bytes_in_group >= min(_GROUP_BYTES, self._shard_bytes):
            self._write_group()

    def close(self) -> None:
        """Writes what is left, and gives the files the names that `datasets` gives them."""
        if self._group:
            self._write_group()
        if self._writer is not None:
            self._writer.close()
        for index, path in enumerate(self.paths):
            self.paths[index] = path.rename(path.with_name(f"train-{index:05d}-of-{len(self.paths):05d}.parquet"))

    def _write_group(self) -> None:
        table = pa.Table.from_pylist(self._group, schema=FEATURES.arrow_schema)
        if self._writer is not None and self._bytes_in_shard + table.nbytes > self._shard_bytes:
            self._writer.close()
            self._writer = None
        if self._writer is None:
            self.paths.append(self._folder / f"train-{len(self.paths):05d}.parquet")
            # Pictures are compressed already, and a page index lets a viewer take one row out of a group.
            self._writer = pq.ParquetWriter(
                self.paths[-1], table.schema, use_dictionary=["id"], write_page_index=True, compression="snappy"
            )
            self._bytes_in_shard = 0
        self._writer.write_table(table, row_group_size=len(self._group))
        self._bytes_in_shard += table.nbytes
        self.num_bytes += table.nbytes
        self._group, self._bytes_in_group = [], 0


def _embedded_rows(sources: Iterable[Source]) -> Iterator[dict[str, Any]]:
    for source in sources:
        for number, row in checked_rows(source):
            images = []
            for image in row["images"]:
                name = None if image["path"] is None else os.path.basename(image["path"])
                content = image["bytes"]
                if content is None:
                    content = _file_bytes(image["path"], f"{source.where}: row {number} (id {row['id']!r})")
                images.append({"bytes": content, "path": name})
            yield {**row, "images": images}


def _file_bytes(path: str, place: str) -> bytes:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_IMAGE_BYTES:
                raise UserError(
                    f"{place}: image {os.path.basename(path)!r} has {size:,} bytes, and {MAX_IMAGE_BYTES:,} are the "
                    "limit; make it smaller."
                )
            return file.read()
    except OSError as error:
        raise UserError(f"{place}: image {os.path.basename(path)!r} can't be read ({error.strerror}).") from None


def _row_digest(row: dict[str, Any]) -> bytes:
    digest = blake2b(digest_size=16)
    plain = {key: value for key, value in row.items() if key != "images"}
    plain["images"] = [image["path"] for image in row["images"]]
    digest.update(json.dumps(plain, sort_keys=True).encode())
    for image in row["images"]:
        digest.update(blake2b(image["bytes"], digest_size=16).digest())
    return digest.digest()


def _read_back(folder: Path, num_rows: int, expected: bytes) -> None:
    rows = datasets.load_dataset(str(folder), split="train", streaming=True)
    if rows.features != FEATURES:
        raise RuntimeError(f"{folder.name}: datasets reads other columns from it than were written.")
    digest, count = blake2b(digest_size=16), 0
    for row in tqdm(
        rows.cast_column("images", List(Image(decode=False))), desc="Reading back", unit=" rows", total=num_rows
    ):
        digest.update(_row_digest(row))
        count += 1
    if count != num_rows or digest.digest() != expected:
        raise RuntimeError(f"{folder.name}: datasets reads other rows from it than were written.")


def _shard_bytes(size: int | str) -> int:
    found = re.fullmatch(r"\s*(\d+)\s*([KMGTP])(I?)B", str(size).upper())
    if isinstance(size, int):
        number = size
    elif found is None:
        number = 0
    else:
        number = int(found[1]) * (1024 if found[3] else 1000) ** ("KMGTP".index(found[2]) + 1)
        if not found[3] and str(size).endswith("b"):  # bits, as `datasets` has it
            number //= 8
    if number <= 0:
        raise UserError(f"--max_shard_size {size} is no size; write 500MB or 1GB.")
    return number
