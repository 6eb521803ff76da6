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
from typing import Any

from hf_llava_ft.data.json.columns import Columns, columns_of, names_of_images, rows_of_json
from hf_llava_ft.data.json.garbage import garbage_collection_paused
from hf_llava_ft.data.json.rows import MAX_ROW_CHARS, iter_json_rows
from hf_llava_ft.data.worker_pool import num_workers, results_in_order
from hf_llava_ft.errors import UserError

_PART_BYTES = 8 * 2**20
_SEARCH_BYTES = 2**20

_BOM = b"\xef\xbb\xbf"
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
    """

    parts: list[JsonPart]
    images: list[str]
    num_rows: int


def index_json(path: str, num_proc: int | None = None) -> JsonIndex:
    """
    Read the whole file once.

    Args:
        path (`str`): a UTF-8 file.
        num_proc (`int`, *optional*): processes; by default one for each core.

    Raises:
        UserError: as `iter_json_rows`.
    """
    index = _index_of_parts(path, num_workers() if num_proc is None else num_proc)
    if index is None:
        names: dict[str, None] = {}
        num_rows = 0
        for _, row in iter_json_rows(path):
            names.update(dict.fromkeys(image_names(row)))
            num_rows += 1
        index = JsonIndex([JsonPart(path)], list(names), num_rows)
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
    rows = _part_rows(part)
    if rows is None:
        raise UserError(f"{part.path} changed while it was read; start again when nothing writes to it.")
    yield from enumerate(rows, start=part.first_row)


def image_names(row: Any) -> list[str]:
    """Names of images in a row that has not been checked yet."""
    values = [row.get("image"), row.get("images")] if isinstance(row, dict) else []
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    names = [name.get("path") if isinstance(name, dict) else name for name in names]
    # A data address is the picture itself, and may be megabytes.
    return [name for name in names if isinstance(name, str) and not name.startswith("data:")]


def _index_of_parts(path: str, num_proc: int) -> JsonIndex | None:
    """None if the file cannot be read in parts."""
    from datasets.utils import tqdm  # the bar that datasets' disable_progress_bars() silences

    guessed = _guessed_parts(path)
    if not guessed or max(part.num_bytes for part in guessed) > MAX_ROW_CHARS:
        return None
    parts: list[JsonPart] = []
    names: dict[str, None] = {}
    next_row = 1
    with tqdm(total=sum(part.num_bytes for part in guessed), desc="Reading rows", unit="B", unit_scale=True) as bar:
        for part, found in zip(guessed, results_in_order(_rows_and_names, guessed, num_proc), strict=True):
            if found is None:
                return None
            num_rows, named = found
            parts.append(replace(part, first_row=next_row))
            names.update(dict.fromkeys(named))
            next_row += num_rows
            bar.update(part.num_bytes)
    if next_row == 2 and not parts[0].is_list:  # one object may be anything, and no row
        return None
    return JsonIndex(parts, list(names), next_row - 1)


def _rows_and_names(part: JsonPart) -> tuple[int, list[str]] | None:
    """The number of rows and the image names in a part; None if it is not whole rows."""
    contents = _contents(part)
    columns = None if contents is None else rows_of_json(contents, part.is_list)
    names = None if columns is None else names_of_images(columns)
    if columns is not None and names is not None and len(columns):
        return len(columns), names
    rows = _part_rows(part)
    if not rows:
        return None
    return len(rows), list(dict.fromkeys(name for row in rows for name in image_names(row)))


def _guessed_parts(path: str) -> list[JsonPart]:
    """Parts of about `_PART_BYTES` whose rows are not counted yet; none if no row is found at its beginning."""
    if not os.path.isfile(path):  # whatever is wrong with it, the one who reads it says so
        return []
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        first = _FIRST_ROW.match(file.read(_SEARCH_BYTES).removeprefix(_BOM).lstrip(b" \t\r\n"))
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


def part_columns(part: JsonPart) -> Columns | None:
    """The rows of a part, checked and translated together; None if one is wrong or unusual, and for a whole file."""
    contents = None if part.stop is None else _contents(part)
    rows = None if contents is None else rows_of_json(contents, part.is_list)
    return None if rows is None else columns_of(rows)


def _contents(part: JsonPart) -> bytes | None:
    """A part's JSON, a list or lines; None if it can't be read, or is cut off."""
    try:
        with open(part.path, "rb") as file:
            file.seek(part.start)
            contents = file.read(part.num_bytes)
    except OSError:
        return None
    if part.start == 0:
        contents = contents.removeprefix(_BOM)
    contents = contents.strip(b" \t\r\n")
    if not part.is_list:
        return contents
    # The part completed to a list of its own: "{...}, {...}," to "[{...}, {...}]".
    if not part.is_last and not contents.endswith(b","):
        return None
    before, after = b"" if part.start == 0 else b"[", b"" if part.is_last else b"]"
    return b"%b%b%b" % (before, contents if part.is_last else contents[:-1], after)


def _part_rows(part: JsonPart) -> list[Any] | None:
    """None unless the part is whole rows, each with what separates it from the next."""
    contents = _contents(part)
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
