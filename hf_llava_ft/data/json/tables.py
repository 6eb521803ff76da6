"""Parts of a JSON file as Arrow tables in the layout of `FEATURES`: a part at once where its rows are usual, else one
row after the other, which also finds what is wrong."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_llava_ft.data.features import FEATURES
from hf_llava_ft.data.image_folder import ImageFolder
from hf_llava_ft.data.json.garbage import garbage_collection_paused
from hf_llava_ft.data.json.llava_json import checked_row
from hf_llava_ft.data.json.named_images import NamedImages
from hf_llava_ft.data.json.parts import JsonPart, iter_part, part_columns
from hf_llava_ft.errors import UserError

TABLE_ROWS = 1000


def tables_of_part(
    part: JsonPart, images: ImageFolder, named: NamedImages, columns_folder: Path | None
) -> Iterator[pa.Table]:
    """
    Args:
        images (`ImageFolder`): that image names are relative to.
        named (`NamedImages`): all that the file names.
        columns_folder (`Path`, *optional*): where columns may have been kept, for `part_columns`.

    Yields:
        `pa.Table` of at most `TABLE_ROWS` rows.

    Raises:
        UserError: at the first row that is wrong.
    """
    whole = _at_once(part, images, named, columns_folder)
    if whole is not None:
        for start in range(0, len(whole), TABLE_ROWS):
            yield whole.slice(start, TABLE_ROWS)
        return
    rows = (checked_row(value, part.path, number, images) for number, value in iter_part(part))
    while table := _next_table(rows):
        yield table


def _at_once(part: JsonPart, images: ImageFolder, named: NamedImages, columns_folder: Path | None) -> pa.Table | None:
    """None where rows have to be read one by one: one is wrong, or unusual."""
    columns = part_columns(part, columns_folder)
    if columns is None:
        return None
    try:
        paths = _paths_of(columns.image_names.flatten(), part, images, named)
    except UserError:
        return None  # the row that names it first is found on the other road
    pictures = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"])
    stored = pa.ListArray.from_arrays(columns.image_names.offsets, pictures)
    numbers = np.arange(part.first_row, part.first_row + len(columns.ids))
    arrays = {
        "id": pc.coalesce(columns.ids, pa.array(numbers).cast(pa.string())),
        "messages": columns.messages,
        "images": stored,
        "num_words": pa.array(columns.num_words, pa.int32()),
        "num_images": pc.list_value_length(stored),
    }
    return pa.table([arrays[name] for name in FEATURES], schema=FEATURES.arrow_schema)


def _paths_of(names: pa.Array, part: JsonPart, images: ImageFolder, named: NamedImages) -> pa.Array:
    if named.are_plain and not pc.any(pc.starts_with(names, "data:")).as_py():
        return pc.binary_join_element_wise(named.prefix, names, "")
    encoded = names.dictionary_encode()
    found = [images.resolve(name, part.path) for name in encoded.dictionary.to_pylist()]
    return pa.DictionaryArray.from_arrays(encoded.indices, pa.array(found, pa.string())).cast(pa.string())


def _next_table(rows: Iterator[dict]) -> pa.Table | None:
    """The next rows of `checked_row`; None at the end."""
    with garbage_collection_paused():
        batch = list(islice(rows, TABLE_ROWS))
        if not batch:
            return None
        columns: dict[str, list] = {name: [row[name] for row in batch] for name in FEATURES}
        columns["images"] = [[{"bytes": None, "path": path} for path in paths] for paths in columns["images"]]
        return pa.table(columns, schema=FEATURES.arrow_schema)
