"""One dataset that can be trained on: where its rows are, what they look like, and where their images are."""

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from hf_llava_ft.data.formats.containers import Container
from hf_llava_ft.data.formats.dialects import LLAVA, SHAREGPT, Dialect, detect_dialect
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

    def describe(self, num_rows: int | None = None) -> str:
        """`a.json: detected ShareGPT JSON, 1,203 rows`; the number is left out where it is not known."""
        num_rows = self.num_rows if num_rows is None else num_rows
        rows = "" if num_rows is None else f", {num_rows:,} row{'' if num_rows == 1 else 's'}"
        return f"{self.where}: detected {self.format}{rows}"

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

    Raises:
        UserError: if one can't be read, or its first rows are written in no known dialect.
    """
    sources = []
    for path, is_hub, split, weight in parse_data_path(data_path):
        container = load_hub_dataset(path, split) if is_hub else open_container(path, split)
        images = ImageStore(container.image_folder or image_folder, allow_outside, allow_urls, cache_dir)
        sources.append(Source(container, _dialect_of(container), images, weight))
    return sources


def _dialect_of(container: Container) -> Dialect:
    rows = [row for _, row in islice(container.iter_raw(), _ROWS_LOOKED_AT)]
    found = [dialect for dialect in map(detect_dialect, rows) if dialect is not None]
    if found:
        # Rows of text alone look like LLaVA in a ShareGPT file too.
        return SHAREGPT if found[0] is LLAVA and SHAREGPT in found else found[0]
    first = rows[0]
    if not isinstance(first, dict):
        held = f"is {json_type(first)}"
    else:
        names = ", ".join(map(str, list(first)[:_MAX_KEYS_NAMED])) or "nothing"
        held = f"has {names}" + (", ..." if len(first) > _MAX_KEYS_NAMED else "")
    raise UserError(
        f'{row_place(container.where, 1)} {held}; a row needs "conversations", "messages", "prompt" and "completion", '
        'or an image ("file_name" or "image") with "text" or "caption".'
    )
