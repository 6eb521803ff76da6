"""The rows of a source, translated, with images that decode: one after another, or an error at the first wrong one."""

import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any, NamedTuple

from hf_llava_ft.data.formats.source import Source
from hf_llava_ft.data.pictures import decode_failure
from hf_llava_ft.errors import UserError

_ROWS_AT_ONCE = 64  # whose pictures are decoded in parallel
_BYTES_AT_ONCE = 64 * 2**20
_FETCHES_AT_ONCE = 16


class SkippedRows(NamedTuple):
    """
    Args:
        sentences (`list[str]`): what is wrong with each row that was left out.
        images (`list[str]`): files that these rows name.
    """

    sentences: list[str]
    images: list[str]


def checked_rows(source: Source, skipped: SkippedRows | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """
    Yields (number from 1, row as `FEATURES` has it) of a source, every distinct picture decoded once.

    Args:
        source (`Source`): what is read.
        skipped (`SkippedRows`, *optional*): where rows that are wrong are noted.

    Raises:
        `UserError`: at the first row or image that is wrong, unless there is `skipped`; if no row is sound.
    """
    seen: set[bytes] = set()
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    raw_rows = source.iter_raw()
    any_sound = False
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
                error = row if isinstance(row, UserError) else _undecodable(source, number, raw, row, failures)
                if error is None:
                    any_sound = True
                    yield number, row
                elif skipped is None:
                    raise error
                else:
                    skipped.sentences.append(error.sentence)
                    skipped.images.extend(_files_named(source, raw, number))
            seen.update(digest for digest, reason in failures.items() if reason is None)
    if not any_sound:
        raise UserError(
            f"{source.where} has no row that can be trained on: {skipped.sentences[0] if skipped else 'it is empty.'}"
        )


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
    try:
        return source.row(raw, number)
    except UserError as error:
        return error


def _undecodable(source: Source, number: int, raw: Any, row: Any, failures: dict[bytes, str | None]):
    for image in row["images"]:
        reason = failures.get(_digest(image))
        if reason is not None:
            name = "an image" if image["path"] is None else f"image {os.path.basename(image['path'])!r}"
            return UserError(
                f"{source.place(raw, number)}: {name} can't be decoded ({reason}); replace it or remove the row."
            )
    return None


def _files_named(source: Source, raw: Any, number: int) -> list[str]:
    """Where the images of a skipped row would be: once one of them is there or changes, the row is tried again."""
    try:
        images = source.parse(raw, number)["images"]
    except UserError:
        return []
    names = [image for image in images if isinstance(image, str) and not image.startswith("data:")]
    return [os.path.join(source.images.folder or "", name) for name in names]


def _digest(image: dict[str, Any]) -> bytes:
    content = image["bytes"] or os.fsencode(image["path"])
    return blake2b(content, digest_size=8).digest()
