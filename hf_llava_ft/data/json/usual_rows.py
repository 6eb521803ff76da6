"""Rows of a LLaVA JSON file read by Arrow with their types told beforehand, so that nothing is guessed and what nobody
reads is passed over. Where a row is of another kind the answer is None, and `rows_of_json` of `columns.py` reads them.

What may surprise:
* Arrow's parser takes objects, so a list is put into one. A list that ends early would go unnoticed, since what
  follows it could be passed over; so a last row is added, with a key that no file can know, which has to come last.
* What is passed over can be nested without end, which the road of one by one refuses: hence [`loose_brackets`].
"""

import json
import secrets
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json

_LAST = f"last-{secrets.token_hex(16)}"
_TEXT, _TEXTS, _NUMBER = pa.string(), pa.list_(pa.string()), pa.int64()
_TURNS = pa.list_(pa.struct({"from": _TEXT, "value": _TEXT}))
# Read only to see that they are not there.
_NOT_HERE = ("system", "video", "videos", "audio", "audios")
_START = 2**16  # bytes in which the first row is looked for
_decode = json.JSONDecoder().raw_decode


def usual_rows(contents: bytes, is_list: bool) -> pa.StructArray | None:
    """
    The rows of a JSON list, or of JSONL, with their keys `id`, `image`, `images` and `conversations`.

    Args:
        contents (`bytes`): the whole list, or whole lines, in UTF-8 that has been looked at.
        is_list (`bool`): which of them.
    """
    row = _row_type(contents)
    schema = pa.schema({"rows": pa.list_(row)} if is_list else row)
    if is_list:
        if not contents.endswith(b"]"):
            return None
        contents = b"".join([b'{"rows":', memoryview(contents)[:-1], f',{{"{_LAST}":1}}]}}'.encode()])
    try:
        table = pyarrow.json.read_json(
            pa.BufferReader(contents),
            pyarrow.json.ReadOptions(use_threads=False, block_size=len(contents) + 1),
            pyarrow.json.ParseOptions(
                newlines_in_values=True, explicit_schema=schema, unexpected_field_behavior="ignore"
            ),
        )
    except pa.ArrowException:
        return None
    if not is_list:
        rows = pa.concat_arrays(table.to_struct_array().chunks) if table.num_rows else None
    else:
        rows = _all_but_the_last(table)
    if rows is None or rows.null_count:
        return None
    return rows


def _row_type(contents: bytes) -> pa.StructType:
    """As the first row has it."""
    row: Any = None
    start = contents[:_START].decode(errors="replace")
    try:
        row, _ = _decode(start, start.index("{"))
    except (ValueError, RecursionError):
        pass
    row = row if isinstance(row, dict) else {}
    return pa.struct(
        {
            "id": _NUMBER if isinstance(row.get("id"), int) else _TEXT,
            "image": _TEXTS if isinstance(row.get("image"), list) else _TEXT,
            "images": _TEXT if isinstance(row.get("images"), str) else _TEXTS,
            "conversations": _TURNS,
            **dict.fromkeys(_NOT_HERE, _TEXT),
            _LAST: _NUMBER,
        }
    )


def _all_but_the_last(table: pa.Table) -> pa.StructArray | None:
    """The rows of the one list; None if it is not one that ends with the row that was added."""
    if table.num_rows != 1:
        return None
    rows = pa.concat_arrays(table["rows"].chunks).flatten()
    is_last = rows.field(len(rows.type) - 1)
    if not len(rows) or is_last.null_count != len(rows) - 1 or not is_last[-1].is_valid:
        return None
    return rows.slice(0, len(rows) - 1)


def loose_brackets(contents: bytes, rows: pa.StructArray) -> int:
    """How many opening brackets are neither those of the rows nor in what they say."""
    turns = rows.field("conversations").flatten()
    said = sum(map(_openings_in, _texts(rows, turns)))
    return _openings(np.frombuffer(contents, dtype=np.uint8)) - 2 * len(rows) - len(turns) - said


def _texts(rows: pa.StructArray, turns: pa.StructArray) -> list[pa.Array]:
    columns = [rows.field(name) for name in ("id", "image", "images")] + [turns.field("value")]
    columns = [column.flatten() if pa.types.is_list(column.type) else column for column in columns]
    return [column for column in columns if pa.types.is_string(column.type)]


def _openings_in(column: pa.Array) -> int:
    _, offsets, data = column.buffers()
    if not data:
        return 0
    ends = np.frombuffer(offsets, dtype=np.int32)[column.offset : column.offset + len(column) + 1]
    return _openings(np.frombuffer(data, dtype=np.uint8)[ends[0] : ends[-1]])


def _openings(content: np.ndarray) -> int:
    """How many `[` and `{` there are: they differ in one bit, and no other character is equal to either but for it."""
    return int(np.count_nonzero(content | 0x20 == ord("{")))
