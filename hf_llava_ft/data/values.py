"""What a value of a row is, before it means anything: a type in words, a text, an image."""

import io
import re
from typing import Any, TypedDict

from PIL import Image

from hf_llava_ft.errors import UserError

_SURROGATE = re.compile("[\ud800-\udfff]")


class EmbeddedImage(TypedDict):
    """An encoded picture (JPEG, PNG, ...) that the row itself holds, and the file name it once had, if any."""

    path: str | None
    bytes: bytes


ImageRef = str | EmbeddedImage


def json_type(value: Any) -> str:
    """The JSON name of a Python value's type, with its article, for messages."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a Python {type(value).__name__}")


def clean_text(text: str, place: str) -> str:
    """`text` itself; a `UserError` if it holds a character that no text has."""
    # Both pass through json and then break a C string, a file name or Arrow's UTF-8, far from the row that holds them.
    if "\x00" in text:
        raise UserError(f"{place} holds a NUL character (\\u0000); remove it.")
    if not text.isascii() and _SURROGATE.search(text):
        raise UserError(
            f"{place} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character; remove it."
        )
    return text


def row_images(row: dict[str, Any], place: str, keys: tuple[str, ...] = ("image", "images")) -> list[ImageRef]:
    """The images under `keys`, of which two may be there only if they agree; none for null and empty lists, as data
    frames export rows of text alone."""
    given: list[tuple[str, list[ImageRef]]] = []
    for key in keys:
        value = row.get(key)
        if value is not None:
            values = value if isinstance(value, list) else [value]
            given.append((key, [image_ref(image, f'{place}: "{key}"') for image in values]))
    for key, images in given[1:]:
        if images != given[0][1]:
            raise UserError(f'{place} has both "{given[0][0]}" and "{key}", and they differ; keep one of them.')
    return given[0][1] if given else []


def image_ref(value: Any, place: str) -> ImageRef:
    """
    Args:
        value: a path or address, bytes, `{"path": ..., "bytes": ...}` as `datasets` stores it, or a PIL picture, which
            is embedded as a PNG.
        place (`str`): row and key, for messages.
    """
    if isinstance(value, dict) and ("bytes" in value or "path" in value):
        name, content = value.get("path"), value.get("bytes")
        if isinstance(content, bytes):
            return EmbeddedImage(path=name if isinstance(name, str) else None, bytes=content)
        if content is not None:
            raise UserError(f'{place} holds "bytes" that are {json_type(content)}; write data:image/png;base64,... .')
        value = name
    if isinstance(value, bytes):
        return EmbeddedImage(path=None, bytes=value)
    if isinstance(value, Image.Image):
        stream = io.BytesIO()
        value.save(stream, format="PNG")
        return EmbeddedImage(path=None, bytes=stream.getvalue())
    if not isinstance(value, str):
        raise UserError(f"{place} holds {json_type(value)}; give the image's path as text.")
    if not value.strip():
        raise UserError(f"{place} holds an empty path; write the image's path, or remove it.")
    return clean_text(value, place)
