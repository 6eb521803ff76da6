"""A dataset cut into blocks of known size, each of which can be read without the rows before it.

JSON is cut as `json_parts.py` cuts it, after the one reading that counts its rows, whose result is kept in the cache
for as long as the file stays the same; Parquet by its row groups; what `save_to_disk` wrote anywhere. A CSV file is
one block, and so is JSON that is small or cannot be cut.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from hf_llava_ft.data.formats.containers import (
    ArrowRows,
    Container,
    ImageFolderMetadata,
    JsonFile,
    ParquetFiles,
    RowGroup,
)
from hf_llava_ft.data.formats.hub_datasets import HubJson
from hf_llava_ft.data.formats.source import Source
from hf_llava_ft.data.json.file_index import file_index
from hf_llava_ft.data.json.parts import JsonPart, iter_part
from hf_llava_ft.errors import UserError

_ARROW_ROWS = 256


@dataclass(frozen=True)
class Block:
    """
    Consecutive rows of a container.

    Args:
        first_row (`int`): number of its first row, from 1.
        num_rows (`int`): how many rows it has; never 0.
        num_bytes (`int`): about what has to be read for any row of it.
        part (`JsonPart` or `RowGroup`, *optional*): where it lies; None where the row's number says it.
    """

    first_row: int
    num_rows: int
    num_bytes: int
    part: JsonPart | RowGroup | None = None


def blocks_of(container: Container, cache_dir: str | os.PathLike | None = None) -> list[Block]:
    """
    All rows of a container, in order.

    Args:
        container (`Container`): of `open_container`.
        cache_dir (`str`, *optional*): where the cuts of a JSON file are kept; the cache of `datasets` by default.

    Raises:
        UserError: if a file is broken. Rows are not looked at.
    """
    container = _table_of(container)
    cache_root = Path(os.path.expanduser(cache_dir or datasets.config.HF_DATASETS_CACHE))
    if isinstance(container, JsonFile):
        return _json_blocks(container.where, cache_root)
    if isinstance(container, HubJson) and all(rows == (rows.files, 0, None) for rows in container.ranges):
        blocks: list[Block] = []
        for path in (path for rows in container.ranges for path in rows.files):
            blocks += _json_blocks(path, cache_root, sum(block.num_rows for block in blocks))
        return blocks
    if isinstance(container, ParquetFiles):
        groups = [group for group in container.row_groups() if group.num_rows]
        return [Block(group.first_row, group.num_rows, group.num_bytes, group) for group in groups]
    if isinstance(container, ArrowRows):
        num_rows = len(container.dataset)
        return [Block(start + 1, min(_ARROW_ROWS, num_rows - start), 0) for start in range(0, num_rows, _ARROW_ROWS)]
    num_rows = sum(1 for _ in container.iter_raw())
    return [Block(1, num_rows, sum(os.path.getsize(path) for path in container.files))]


def iter_block(container: Container, block: Block, start: int = 0) -> Iterator[tuple[int, Any]]:
    """
    The rows of one of [`blocks_of`], as `iter_raw` gives them.

    Args:
        container (`Container`): the same.
        block (`Block`): what is read.
        start (`int`): rows of it to leave out at its start.

    Raises:
        UserError: if the file is broken, or no longer what it was.
    """
    container = _table_of(container)
    if isinstance(block.part, JsonPart):
        return islice(iter_part(block.part), start, None)
    if isinstance(block.part, RowGroup):
        assert isinstance(container, ParquetFiles)
        return islice(container.iter_row_group(block.part), start, None)
    if isinstance(container, ArrowRows):
        first, stop = block.first_row - 1 + start, block.first_row - 1 + block.num_rows
        return container.iter_rows(first, stop)
    return islice(container.iter_raw(), start, None)


class Piece(NamedTuple):
    """Rows `start` to `stop` of those that a mixture holds of block `block` of source `source`."""

    source: int
    block: Block
    start: int
    stop: int


class RawRow(NamedTuple):
    """A row as its file has it, its number from 1, and the place of its source among all."""

    source: int
    number: int
    raw: Any


class RowReader:
    """Reads rows of pieces, going on where it stopped when what is wanted comes next."""

    def __init__(self, sources: list[Source], drawn: list[np.ndarray | None]):
        self._sources, self._drawn = sources, drawn
        self._of: tuple[int, Block] | None = None
        self._rows: Iterator[tuple[int, Any]] = iter(())
        self._next = 0  # offset in the block of what `_rows` gives next
        self._last: tuple[int, Any] = (0, None)

    def read(self, piece: Piece, skipped: int, num_rows: int) -> Iterator[RawRow]:
        """`num_rows` rows of a piece behind its first `skipped`."""
        start = piece.start + skipped
        for offset in self._offsets(piece, start, start + num_rows):
            # A row that a weight repeats is at hand.
            if self._of != (piece.source, piece.block) or offset < self._next - 1:
                container = self._sources[piece.source].container
                self._rows = iter_block(container, piece.block, int(offset))
                self._of, self._next = (piece.source, piece.block), int(offset)
            while self._next <= offset:
                row = next(self._rows, None)
                if row is None:
                    raise UserError(
                        f"{self._sources[piece.source].where} changed while it was read; "
                        "start again when nothing writes to it."
                    )
                self._last, self._next = row, self._next + 1
            yield RawRow(piece.source, *self._last)

    def _offsets(self, piece: Piece, start: int, stop: int) -> Sequence[int] | np.ndarray:
        drawn = self._drawn[piece.source]
        if drawn is None:
            return range(start, stop)
        first = piece.block.first_row - 1
        return drawn[np.searchsorted(drawn, first) :][start:stop] - first


def _table_of(container: Container) -> Container:
    return container.table if isinstance(container, ImageFolderMetadata) else container


def _json_blocks(path: str, cache_root: Path, rows_before: int = 0) -> list[Block]:
    index = file_index(os.path.abspath(path), cache_root)
    parts = [replace(part, first_row=part.first_row + rows_before) for part in index.parts]
    firsts = [part.first_row for part in parts]
    stops = [*firsts[1:], index.num_rows + rows_before + 1]
    counts = [stop - first for first, stop in zip(firsts, stops, strict=True)]
    return [
        Block(part.first_row, count, os.path.getsize(path) if part.stop is None else part.stop - part.start, part)
        for part, count in zip(parts, counts, strict=True)
    ]
