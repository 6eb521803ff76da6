"""Rows of a LLaVA JSON file as columns: read by Arrow's parser, checked and translated whole, without a Python object
for each.

This is the road of rows in which nothing is unusual, some five times as fast as `parse_llava_row`. Wherever that one
would refuse a row, or where a file uses more of what it takes than is translated here (`system` as a key, `role` and
`content`, numbers and text as ids in turn), the answer is None, and the rows are read one by one: so what is said of a
row, and which row comes first, is said in one place.

What may surprise:
* Arrow refuses what Python's `json` takes: a key that is there twice, one that is text here and a number there. What
  both take they read alike, down to half a surrogate pair, which Arrow refuses.
* Its parser recurses without a limit, so brackets are counted before it is called.
"""

import io
import re
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from hf_llava_ft.data.json.turns import Bytes, content_of
from hf_llava_ft.data.json.usual_rows import loose_brackets, usual_rows
from hf_llava_ft.data.schema import ROLES

_MAX_DEPTH = 100  # a row that is trained on has 4; the parser breaks down at some ten thousand
_OTHER_MEDIA = ("video", "videos", "audio", "audios")
_NOT_HERE = ("system", *_OTHER_MEDIA)
_IMAGE_KEYS = ("image", "images")
_CODES = {"user": 0, "assistant": 1, "system": 2}
# Arrow's parser takes it for Infinity, also in what nobody reads, and Python's does not.
_NO_NUMBER = re.compile(rb"[:\[,][ \t\r\n]*-?Inf(?=[ \t\r\n]*[,}\]])")
_NOT_STRUCTURE = bytes(set(range(256)) - set(b'[]{}"'))
_DEPTH_OF = np.zeros(256, dtype=np.int32)
_DEPTH_OF[list(b"[{")], _DEPTH_OF[list(b"]}")] = 1, -1


class Columns(NamedTuple):
    """
    N rows, as `parse_llava_row` has them.

    Args:
        ids (`pa.StringArray[N]`): null where a row has none.
        messages (`pa.ListArray[N]`): as in `FEATURES` of `data/builder.py`.
        image_names (`pa.ListArray[N]`): of strings, as the rows have them; not looked up.
        num_words (`int64[N]`): the measure of `count_words`.
    """

    ids: pa.Array
    messages: pa.Array
    image_names: pa.Array
    num_words: np.ndarray


def rows_of_part(contents: bytes, is_list: bool) -> pa.StructArray | None:
    """As [`rows_of_json`], where rows are as most are without what nobody reads."""
    if b"Inf" in contents and _NO_NUMBER.search(contents):
        return None
    rows = usual_rows(contents, is_list) if _is_utf8(contents) else None
    if rows is not None and (loose_brackets(contents, rows) <= _MAX_DEPTH or _depth(contents) <= _MAX_DEPTH):
        return rows
    return rows_of_json(contents, is_list)


def rows_of_json(contents: bytes, is_list: bool) -> pa.StructArray | None:
    """
    The rows of a JSON list, or of JSONL, as Arrow reads them; None where it does not, or they are no objects.

    Args:
        contents (`bytes`): the whole list, or whole lines.
        is_list (`bool`): which of them.
    """
    if _depth(contents) > _MAX_DEPTH or not _is_utf8(contents):
        return None
    if is_list:  # the parser knows objects only
        contents = b'{"rows":%b}' % contents
    try:
        table = pyarrow.json.read_json(
            io.BytesIO(contents),
            pyarrow.json.ReadOptions(use_threads=False, block_size=len(contents) + 1),
            pyarrow.json.ParseOptions(newlines_in_values=True),
        )
    except pa.ArrowException:
        return None
    if is_list:
        # What closes the list early is noticed: more keys, or more objects.
        if table.num_rows != 1 or table.column_names != ["rows"] or not pa.types.is_list(table.schema.types[0]):
            return None
        rows = pa.concat_arrays(table["rows"].chunks).flatten()
    else:
        rows = pa.concat_arrays(table.to_struct_array().chunks) if table.num_rows else pa.array([], pa.null())
    return rows if isinstance(rows, pa.StructArray) and not rows.null_count else None


def names_of_images(rows: pa.StructArray) -> list[str] | None:
    """Each image name once, in the order in which they first appear; None where they are no plain names."""
    names = _image_names(rows)
    if names is None:
        return None
    found = pc.unique(names.flatten()).to_pylist()
    return [name for name in found if not name.startswith("data:")]


def columns_of(rows: pa.StructArray) -> Columns | None:
    """The rows checked and translated; None if one of them is wrong, or unusual."""
    for key in _NOT_HERE:
        column = _field(rows, key)
        if column is not None and column.null_count < len(rows):
            return None
    ids, names = _ids(rows), _image_names(rows)
    conversations = _field(rows, "conversations")
    if ids is None or names is None or not _is_list(conversations) or conversations.null_count:
        return None
    if pc.any(pc.equal(pc.utf8_trim_whitespace(names.flatten()), "")).as_py():
        return None
    turns, num_turns = conversations.flatten(), _lengths(conversations)
    if not isinstance(turns, pa.StructArray) or turns.null_count or not num_turns.all():
        return None
    speakers, values = _field(turns, "from"), _field(turns, "value")
    if not _is_text(speakers) or not _is_text(values) or speakers.null_count or values.null_count:
        return None
    said = Bytes(values)
    if said.have_nul or any(_has_nul(column) for column in (ids, names.flatten())):
        return None
    roles = _roles(speakers, num_turns)
    num_words = said.num_words()
    if roles is None or not num_words[roles == _CODES["assistant"]].all():
        return None
    places = said.places_of_images()
    if roles[places.turns].any():
        return None
    starts = np.cumsum(num_turns) - num_turns
    if (np.add.reduceat(places.counts(len(values)), starts) != _lengths(names)).any():
        return None
    content = content_of(values, places)
    role_names = pa.DictionaryArray.from_arrays(pa.array(roles), list(_CODES)).cast(pa.string())
    messages = _as_list(pa.StructArray.from_arrays([role_names, content], ["role", "content"]), num_turns)
    return Columns(ids, messages, names, np.add.reduceat(num_words, starts))


def _depth(contents: bytes) -> int:
    """How deep brackets are nested, up to where the JSON is broken."""
    # Without escapes every quote begins or ends a text.
    marks = contents.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NOT_STRUCTURE)
    structure = np.frombuffer(marks, dtype=np.uint8)
    is_inside = np.cumsum(structure == ord('"')) % 2 == 1
    return int(np.cumsum(np.where(is_inside, 0, _DEPTH_OF[structure])).max(initial=0))


def _is_utf8(contents: bytes) -> bool:
    if contents.isascii():
        return True
    offsets = pa.array([0, len(contents)], pa.int32()).buffers()[1]
    try:  # as one value of a column, which takes a third of the time of decoding
        pa.Array.from_buffers(pa.binary(), 1, [None, offsets, pa.py_buffer(contents)]).cast(pa.string())
    except pa.ArrowInvalid:
        return False
    return True


def _field(rows: pa.StructArray, name: str) -> Any:
    """None where no row has it."""
    places = rows.type.get_all_field_indices(name)
    return rows.field(places[0]) if len(places) == 1 else None


def _is_text(column: Any) -> bool:
    return column is not None and pa.types.is_string(column.type)


def _is_list(column: Any) -> bool:
    return column is not None and pa.types.is_list(column.type)


def _lengths(lists: pa.Array) -> np.ndarray:
    return pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)


def _as_list(values: pa.Array, lengths: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)), values)


def _has_nul(column: pa.Array) -> bool:
    return pc.any(pc.match_substring(column, "\0")).as_py() is True


def _ids(rows: pa.StructArray) -> pa.Array | None:
    ids = _field(rows, "id")
    if ids is None or pa.types.is_null(ids.type):
        return pa.nulls(len(rows), pa.string())
    return ids.cast(pa.string()) if _is_text(ids) or pa.types.is_int64(ids.type) else None


def _image_names(rows: pa.StructArray) -> pa.ListArray | None:
    """Of each row a list of strings; None where a row has anything else."""
    found = None
    for key in _IMAGE_KEYS:
        column = _field(rows, key)
        if column is None or column.null_count == len(rows):
            continue
        if found is not None:
            return None
        if _is_text(column):
            found = _as_list(column.drop_null(), column.is_valid().to_numpy(zero_copy_only=False))
        elif _is_list(column) and (_is_text(column.flatten()) or pa.types.is_null(column.type.value_type)):
            lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
            found = _as_list(column.flatten().cast(pa.string()), lengths)
        else:
            return None
    if found is None:
        return _as_list(pa.array([], pa.string()), np.zeros(len(rows), dtype=np.int64))
    return None if found.flatten().null_count else found


def _roles(speakers: pa.Array, num_turns: np.ndarray) -> np.ndarray | None:
    """`int8[T]` of `_CODES`; None unless a system turn, if any, and then user and assistant take turns."""
    encoded = speakers.dictionary_encode()
    codes = [_CODES.get(ROLES.get(name, ""), -1) for name in encoded.dictionary.to_pylist()]
    roles = np.array(codes, dtype=np.int8)[encoded.indices.to_numpy()]
    starts = np.cumsum(num_turns) - num_turns
    has_system = roles[starts] == _CODES["system"]
    places = np.arange(len(roles)) - np.repeat(starts + has_system, num_turns)
    spoken = num_turns - has_system
    if (roles != np.where(places < 0, _CODES["system"], places % 2)).any() or (spoken % 2).any() or not spoken.all():
        return None
    return roles


def _num_words(texts: pa.Array) -> np.ndarray:
    """`int64[T]`: how many pieces `str.split` makes of each."""
    return Bytes(texts).num_words()
