"""The rows of a source, translated, with images that decode: one after another, or an error at the first wrong one."""

import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any

from hf_llava_ft.data.formats.images import StoredImage
from hf_llava_ft.data.formats.source import Source
from hf_llava_ft.data.pictures import decode_failure, undecodable
from hf_llava_ft.errors import UserError

_ROWS_AT_ONCE = 64  # whose pictures are decoded in parallel
_BYTES_AT_ONCE = 64 * 2**20
_FETCHES_AT_ONCE = 16


def checked_rows(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    """
    Yields (number from 1, row as `FEATURES` has it) of a source, every distinct picture decoded once.

    Raises:
        UserError: at the first row or image that is wrong.
    """
    seen: set[bytes] = set()
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    raw_rows = source.iter_raw()
    with (
        ThreadPoolExecutor(num_cores) as decoders,
        ThreadPoolExecutor(_FETCHES_AT_ONCE if source.images.allow_urls else 1) as readers,
    ):
        while group := _next_group(raw_rows):
            read = list(readers.map(lambda numbered: _row_or_error(source, *numbered), group))
            pictures: dict[bytes, str | bytes] = {}
            for row in read:
                if not isinstance(row, UserError):
                    pictures.update((_digest(image), image["bytes"] or image["path"]) for image in row["images"])
            new = {digest: picture for digest, picture in pictures.items() if digest not in seen}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what Pillow only warns of is a failure here, or survived
                failures = dict(zip(new, decoders.map(decode_failure, new.values()), strict=True))
            for (number, raw), row in zip(group, read, strict=True):
                if isinstance(row, UserError):
                    raise row
                _refuse_undecodable(source.place(raw, number), row["images"], failures)
                yield number, row
            seen.update(new)


def _next_group(raw_rows: Iterator[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """Rows whose pictures are decoded in parallel: as many as fit in little memory, and at least one."""
    group: list[tuple[int, Any]] = []
    num_bytes = 0
    for numbered in raw_rows:
        group.append(numbered)
        num_bytes += _size(numbered[1])
        if len(group) == _ROWS_AT_ONCE or num_bytes > _BYTES_AT_ONCE:
            break
    return group


def _size(value: Any) -> int:
    if isinstance(value, (str, bytes)):
        return len(value)
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_size, values))


def _row_or_error(source: Source, number: int, raw: Any) -> Any:
    """The row, or its `UserError`, which is raised when the rows before it have been given."""
    try:
        return source.row(raw, number)
    except UserError as error:
        return error


def _refuse_undecodable(place: str, images: list[StoredImage], failures: dict[bytes, str | None]) -> None:
    for image in images:
        reason = failures.get(_digest(image))
        if reason is not None:
            raise undecodable(place, image["path"], reason)


def _digest(image: StoredImage) -> bytes:
    content = image["bytes"] or os.fsencode(str(image["path"]))
    return blake2b(content, digest_size=8).digest()
