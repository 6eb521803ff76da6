"""A JSON file cut into parts of whole rows, so that several processes can read it.

Nobody can tell from the middle of a JSON file where a row begins, so the cuts are guesses: a comma or a line's end,
and behind it the bytes with which the file's first row begins, brace and first key. A guess is proven by reading: the
first part begins with the file, and each part must be whole rows up to its last byte, so the next one begins at a row
too. If any part is not, or the file is wrong anywhere, it is read as one part by `iter_json_rows`, whose answers and
whose errors are the ones that count.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from hf_llava_ft.data.json import kept_columns
from hf_llava_ft.data.json.columns import Columns, columns_of, names_of_images, rows_of_part
from hf_llava_ft.data.json.garbage import garbage_collection_paused
from hf_llava_ft.data.json.rows import MAX_ROW_CHARS, iter_json_rows
from hf_llava_ft.data.worker_pool import num_workers, results_in_order
from hf_llava_ft.errors import UserError

_PART_BYTES = 4 * 2**20
_SEARCH_BYTES = 2**20

_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"
_SPACE = rb"[ \t\r\n]*"
_FIRST_ROW = re.compile(rb"(?P<bracket>\[?)" + _SPACE + rb'(?P<row>\{[ \t\r\n]*"[^"\\]{0,200}")')
_WHITESPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True)
class JsonPart:
    """
    Consecutive rows of a file.

    Args:
        path (`str`): the file.
        first_row (`int`): number of its first row, from 1.
        start, stop (`int`, *optional*): the bytes it takes; without them the part is the whole file.
        is_list (`bool`): the file is a JSON list, not JSONL.
        is_last (`bool`): no part follows.
    """

    path: str
    first_row: int = 1
    start: int = 0
    stop: int | None = None
    is_list: bool = False
    is_last: bool = False

    @property
    def num_bytes(self) -> int:
        """Of a part that is not the whole file."""
        assert self.stop is not None
        return self.stop - self.start


@dataclass(frozen=True)
class JsonIndex:
    """
    What is known of a file after one reading.

    Args:
        parts (`list[JsonPart]`): all its rows, in order.
        images (`list[str]`): the image names in it, each once, in the order they first appear.
        num_rows (`int`): how many rows the parts hold together.
        digest (`str`): of the file's bytes.
    """

    parts: list[JsonPart]
    images: list[str]
    num_rows: int
    digest: str


def index_json(path: str, num_proc: int | None = None, columns_folder: Path | None = None) -> JsonIndex:
    """
    Read the whole file once.

    Args:
        path (`str`): a UTF-8 file.
        num_proc (`int`, *optional*): processes; by default one for each core.
        columns_folder (`Path`, *optional*): where the columns of each part are kept, for [`part_columns`].

    Raises:
        UserError: as `iter_json_rows`.
    """
    index = _index_of_parts(path, num_workers() if num_proc is None else num_proc, columns_folder)
    if index is None:
        names: dict[str, None] = {}
        num_rows = 0
        for _, row in iter_json_rows(path):
            names.update(dict.fromkeys(image_names(row)))
            num_rows += 1
        index = JsonIndex([JsonPart(path)], list(names), num_rows, _digest_of_file(path))
    return index


def iter_part(part: JsonPart) -> Iterator[tuple[int, Any]]:
    """
    The raw rows of a part with their numbers, counted from its first one's.

    Raises:
        UserError: if it does not hold whole rows (any more).
    """
    if part.stop is None:
        for number, row in iter_json_rows(part.path):
            yield part.first_row - 1 + number, row
        return
    rows = _rows_one_by_one(part, _contents(part))
    if rows is None:
        for _ in iter_json_rows(part.path):  # what is wrong with it, if it is that
            pass
        raise UserError(f"{part.path} changed while it was read; start again when nothing writes to it.")
    yield from enumerate(rows, start=part.first_row)


def image_names(row: Any) -> list[str]:
    """Names of images in a row that has not been checked yet."""
    values = [row.get("image"), row.get("images")] if isinstance(row, dict) else []
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    names = [name.get("path") if isinstance(name, dict) else name for name in names]
    # A data address is the picture itself, and may be megabytes.
    return [name for name in names if isinstance(name, str) and not name.startswith("data:")]


class _Found(NamedTuple):
    """What a part turned out to be."""

    num_rows: int
    names: list[str]
    digest: bytes


def _index_of_parts(path: str, num_proc: int, columns_folder: Path | None) -> JsonIndex | None:
    """None if the file cannot be read in parts."""
    from datasets.utils import tqdm  # the bar that datasets' disable_progress_bars() silences

    guessed = _guessed_parts(path)
    if not guessed or max(part.num_bytes for part in guessed) > MAX_ROW_CHARS:
        return None
    parts: list[JsonPart] = []
    names: dict[str, None] = {}
    digest = blake2b(digest_size=16)
    next_row = 1
    with tqdm(total=sum(part.num_bytes for part in guessed), desc="Reading rows", unit="B", unit_scale=True) as bar:
        results = results_in_order(lambda part: _look_at(part, columns_folder), guessed, num_proc)
        for part, found in zip(guessed, results, strict=True):
            if found is None:
                return None
            parts.append(replace(part, first_row=next_row))
            names.update(dict.fromkeys(found.names))
            digest.update(found.digest)
            next_row += found.num_rows
            bar.update(part.num_bytes)
    if next_row == 2 and not parts[0].is_list:  # one object may be anything, and no row
        return None
    return JsonIndex(parts, list(names), next_row - 1, digest.hexdigest())


def _look_at(part: JsonPart, columns_folder: Path | None) -> _Found | None:
    """None if a part is not whole rows."""
    contents = _contents(part)
    if contents is None:
        return None
    # The cuts follow from the file, so parts that are equal make equal files.
    digest = blake2b(contents, digest_size=16).digest()
    columns = rows_of_part(contents, part.is_list)
    names = None if columns is None else names_of_images(columns)
    if columns is not None and names is not None and len(columns):
        if columns_folder is not None and (translated := columns_of(columns)) is not None:
            kept_columns.keep(translated, columns_folder, part.start)
        return _Found(len(columns), names, digest)
    rows = _rows_one_by_one(part, contents)
    if not rows:
        return None
    return _Found(len(rows), list(dict.fromkeys(name for row in rows for name in image_names(row))), digest)


def _digest_of_file(path: str) -> str:
    digest = blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _guessed_parts(path: str) -> list[JsonPart]:
    """Parts of about `_PART_BYTES` whose rows are not counted yet; none if no row is found at its beginning."""
    if not os.path.isfile(path):  # whatever is wrong with it, the one who reads it says so
        return []
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        first = _FIRST_ROW.match(file.read(_SEARCH_BYTES).removeprefix(_BOM).lstrip(_BLANK))
        if first is None:
            return []
        is_list = bool(first["bracket"])
        cut = re.compile((b"," if is_list else b"\n") + _SPACE + b"(?=" + re.escape(first["row"]) + b")")
        cuts = [0]
        for place in range(_PART_BYTES, size - _PART_BYTES // 2, _PART_BYTES):
            file.seek(place)
            found = cut.search(file.read(_SEARCH_BYTES)) if place > cuts[-1] else None
            if found is not None:
                cuts.append(place + found.end())
    cuts.append(size)
    return [
        JsonPart(path, start=start, stop=stop, is_list=is_list, is_last=stop == size)
        for start, stop in zip(cuts[:-1], cuts[1:], strict=True)
    ]


def part_columns(part: JsonPart, columns_folder: Path | None = None) -> Columns | None:
    """The rows of a part, checked and translated together; None if one is wrong or unusual, and for a whole file."""
    if part.stop is None:
        return None
    if columns_folder is not None and (kept := kept_columns.kept(columns_folder, part.start)) is not None:
        return kept
    contents = _contents(part)
    rows = None if contents is None else rows_of_part(contents, part.is_list)
    return None if rows is None else columns_of(rows)


def _contents(part: JsonPart) -> bytes | None:
    """A part's JSON, a list or lines; None if it can't be read, or is cut off."""
    try:
        with open(part.path, "rb", buffering=0) as file:
            file.seek(part.start)
            contents = file.read(part.num_bytes)
    except OSError:
        return None
    start, stop = 0, len(contents)
    if part.start == 0 and contents.startswith(_BOM):
        start = len(_BOM)
    while start < stop and contents[start] in _BLANK:
        start += 1
    while start < stop and contents[stop - 1] in _BLANK:
        stop -= 1
    if not part.is_list:
        return contents[start:stop]
    # The part completed to a list of its own: "{...}, {...}," to "[{...}, {...}]".
    if not part.is_last:
        if contents[stop - 1 : stop] != b",":
            return None
        stop -= 1
    before, after = b"" if part.start == 0 else b"[", b"" if part.is_last else b"]"
    return b"".join([before, memoryview(contents)[start:stop], after])


def _rows_one_by_one(part: JsonPart, contents: bytes | None) -> list[Any] | None:
    """None unless the part is whole rows, each with what separates it from the next."""
    if contents is None:
        return None
    try:
        with garbage_collection_paused():
            text = contents.decode("utf-8")
            return json.loads(text) if part.is_list else _lines(text)
    except (ValueError, RecursionError):
        return None


def _lines(text: str) -> list[Any]:
    decode = json.JSONDecoder().raw_decode
    rows, position = [], 0
    while position < len(text):
        row, position = decode(text, position)
        rows.append(row)
        position = _WHITESPACE.match(text, position).end()  # type: ignore[union-attr]  # matches the empty string
    return rows
