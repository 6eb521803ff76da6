"""One dataset that can be trained on: where its rows are, what they look like, and where their images are."""

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from hf_llava_ft.data.formats.column_choice import SaidOfColumns, given_for, parse_choice
from hf_llava_ft.data.formats.columns import Given, asks_more_than_captions, find_columns, has_own_picture
from hf_llava_ft.data.formats.containers import Container
from hf_llava_ft.data.formats.dialects import (
    IMAGE_CAPTION,
    LLAVA,
    PREFERENCE,
    PROMPT_COMPLETION,
    SHAREGPT,
    Dialect,
    detect_dialect,
    own_table,
)
from hf_llava_ft.data.formats.hub_datasets import load_hub_dataset
from hf_llava_ft.data.formats.images import ImageStore, StoredImage
from hf_llava_ft.data.formats.mixture import parse_data_path
from hf_llava_ft.data.formats.opening import open_container
from hf_llava_ft.data.schema import Row, count_message_words, count_words, row_place
from hf_llava_ft.data.values import ImageRef, json_type
from hf_llava_ft.errors import UserError

# The first rows may be broken, or of text alone, where LLaVA and ShareGPT look the same.
_ROWS_LOOKED_AT = 32
_MAX_KEYS_NAMED = 8


class Source:
    """
    One dataset. Made by [`open_source`]; it can be pickled.

    Attributes:
        format (`str`): dialect and container in words: "ShareGPT JSON", "image-caption folder (metadata.csv)".
        where (`str`): file, folder or Hub id, with the split where one was asked for.
        weight (`float`): share of its rows in a mixture; see `mixture.py`.
        num_rows (`int`, *optional*): None for text files, where only reading all would tell.
        images (`ImageStore`): where image paths lead.
    """

    def __init__(self, container: Container, dialect: Dialect, images: ImageStore, weight: float = 1.0):
        self.container, self.dialect, self.images, self.weight = container, dialect, images, weight

    @property
    def format(self) -> str:
        return f"{self.dialect.name} {self.container.name}"

    @property
    def where(self) -> str:
        return self.container.where

    @property
    def num_rows(self) -> int | None:
        return self.container.num_rows

    @property
    def reading(self) -> str:
        """[`format`], and which columns are read where that is a choice: what a cache of the rows depends on."""
        columns = self.dialect.columns
        return self.format if columns is None else f"{self.format} {columns.reading}"

    def describe(self, num_rows: int | None = None) -> str:
        """`a.json: detected ShareGPT JSON, 1,203 rows`; the number is left out where it is not known. Of a table, what
        its columns are taken for is said too."""
        num_rows = self.num_rows if num_rows is None else num_rows
        rows = "" if num_rows is None else f", {num_rows:,} row{'' if num_rows == 1 else 's'}"
        columns = "" if self.dialect.columns is None else f": {self.dialect.columns.told()}"
        return f"{self.where}: detected {self.format}{rows}{columns}"

    def iter_raw(self) -> Iterator[tuple[int, Any]]:
        """
        The rows as the file has them, read a little at a time.

        Yields:
            `(number, raw)`, with numbers from 1; `raw` is plain data, images as bytes or paths.

        Raises:
            UserError: where the file itself is broken.
        """
        return self.container.iter_raw()

    def place(self, raw: Any, number: int) -> str:
        """How messages name a raw row: `data.json: row 3 (id 'cat')`."""
        return row_place(self.where, number, raw.get("id") if isinstance(raw, dict) else None)

    def parse(self, raw: Any, number: int) -> Row:
        """
        Translate and check a raw row; its images are not looked up ([`locate`]).

        Args:
            raw: what `iter_raw` gave.
            number (`int`): its number from 1.

        Raises:
            UserError: if it can't be trained on as it stands, with row number and id.
        """
        return self.dialect.parse(raw, self.where, number)

    def locate(self, image: ImageRef, place: str) -> StoredImage:
        """
        Where an image of a parsed row is: an undecoded `{"path": ..., "bytes": ...}`, as `open_picture` takes it.

        Args:
            image: an element of `Row["images"]`.
            place (`str`): [`place`] of the row.

        Raises:
            UserError: if it is missing, outside the image folder, or an address, with row number and id.
        """
        return self.images.locate(image, place)

    def row(self, raw: Any, number: int) -> dict[str, Any]:
        """A raw row as `FEATURES` of `data/builder.py` has it: parsed, images located, words and images counted."""
        row, place = self.parse(raw, number), self.place(raw, number)
        stored = [self.locate(image, place) for image in row["images"]]
        # Both count alike, but for a turn whose image was moved to its front.
        of_llava = self.dialect in (LLAVA, SHAREGPT)
        num_words = count_words(raw) if of_llava else count_message_words(row["messages"])
        return {**row, "images": stored, "num_words": num_words, "num_images": len(stored)}


def open_source(
    data_path: str | os.PathLike | Sequence[str | os.PathLike],
    image_folder: str | os.PathLike | None = None,
    *,
    allow_outside: bool = False,
    allow_urls: bool = False,
    cache_dir: str | os.PathLike | None = None,
    columns: SaidOfColumns = None,
) -> list[Source]:
    """
    Tell what the datasets are, from what is in them. Reads the first rows only.

    Args:
        data_path (`str` or `list`):
            A file, a folder or a Hub id, with `:SPLIT` and `:WEIGHT`, or several separated by commas (`mixture.py`).
        image_folder (`str`, *optional*):
            Folder that image paths are relative to. An `imagefolder` with metadata has its own.
        allow_outside (`bool`):
            Take image paths that leave the folder: absolute ones, `..`, links.
        allow_urls (`bool`):
            Fetch images from http and https addresses.
        cache_dir (`str`, *optional*):
            Where fetched images are kept; the cache of `datasets` by default.
        columns (*optional*):
            Of tables, which column is what: `image=img,prompt=question,response=answer` (`column_choice.py`).

    Raises:
        UserError: if one can't be read, or its first rows are written in no known dialect.
    """
    choice = parse_choice(columns)
    sets = parse_data_path(data_path)
    paths = [each.path for each in sets]
    unknown = next((name for name in choice.of_dataset if name not in paths), None)
    if unknown is not None and not choice.is_inherited:
        raise UserError(
            f"--columns speaks of {unknown!r}, and the data is {', '.join(paths)}; write the name as there."
        )
    opened: list[tuple[Container, list[Any], list[str], Given]] = []
    for path, is_hub, split, _ in sets:
        container = load_hub_dataset(path, split) if is_hub else open_container(path, split)
        rows = [row for _, row in islice(container.iter_raw(), _ROWS_LOOKED_AT)]
        names = container.column_names() or _keys_of(rows)
        opened.append((container, rows, names, given_for(choice, path, names, len(sets) == 1)))
    if choice.everywhere and not choice.is_inherited and not any(given for *_, given in opened):
        raise UserError(f"--columns: none of {', '.join(paths)} has all the columns that it names; correct it.")
    sources = []
    for (container, rows, names, given), (_, _, _, weight) in zip(opened, sets, strict=True):
        images = ImageStore(container.image_folder or image_folder, allow_outside, allow_urls, cache_dir)
        sources.append(Source(container, _dialect_of(container.where, rows, names, given), images, weight))
    return sources


def refuse_preferences(sources: Sequence[Source]) -> None:
    """
    Raises:
        UserError: if one of them is of preferences, of which the rejected answers would be left out without a word.
    """
    for source in sources:
        if source.dialect is PREFERENCE:
            raise UserError(
                f"{source.where} holds preferences (chosen and rejected), which are learned with TRL's DPOTrainer: "
                "see docs/preference.md; to learn the chosen answers alone, write them as completion."
            )


def _keys_of(rows: Sequence[Any]) -> list[str]:
    return list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))


def _dialect_of(where: str, rows: Sequence[Any], names: Sequence[str], given: Given) -> Dialect:
    found = [dialect for dialect in map(detect_dialect, rows) if dialect is not None]
    if found and not given and not _is_own_table(found[0], names):
        # Rows of text alone look like LLaVA in a ShareGPT file too.
        return SHAREGPT if found[0] is LLAVA and SHAREGPT in found else found[0]
    columns = find_columns(names, given, where)
    if columns is not None:
        cells = [(row.get(columns.prompt), row.get(columns.response)) for row in rows if isinstance(row, dict)]
        has_lists = any(isinstance(answer, list) and not isinstance(question, list) for question, answer in cells)
        return own_table(columns._replace(has_lists=has_lists))
    first = rows[0]
    if not isinstance(first, dict):
        held = f"is {json_type(first)}"
    else:
        names = ", ".join(map(str, list(first)[:_MAX_KEYS_NAMED])) or "nothing"
        held = f"has {names}" + (", ..." if len(first) > _MAX_KEYS_NAMED else "")
    raise UserError(
        f'{row_place(where, 1)} {held}; a row needs "conversations", "messages", "prompt" and "completion", '
        'or an image ("file_name" or "image") with "text" or "caption"; of a table of your own, say what is what with '
        "--columns image=NAME,prompt=NAME,response=NAME."
    )


def _is_own_table(dialect: Dialect, names: Sequence[str]) -> bool:
    """Whether rows that look like that dialect have more to say than it reads."""
    if dialect is IMAGE_CAPTION:
        return asks_more_than_captions(names)
    return dialect is PROMPT_COMPLETION and has_own_picture(names)
