"""From a row as its file has it to one that is trained on: translated, checked, with its pictures decoded."""

import io
import warnings
from collections.abc import Callable
from typing import Any

from PIL import Image

from hf_llava_ft.data.formats import Source
from hf_llava_ft.data.pictures import DEEPER_THAN_8_BITS, decode_failure, undecodable
from hf_llava_ft.data.unchanged import refuse_younger
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.picture_opening_llava import PictureOpening, rgb_picture


def decoded_row(
    source: Source,
    number: int,
    raw: Any,
    *,
    since: int,
    opening: PictureOpening,
    check: Callable[[dict[str, Any]], None] | None,
) -> dict[str, Any]:
    """
    The row with `images` as RGB pictures.

    Args:
        number (`int`): of the row in its source, from 1.
        raw: the row as it is there.
        since (`int`): when the run began, in nanoseconds since 1970: image files may not be younger.
        check (`Callable`, *optional*): called with the row; a `ValueError` from it makes the row a bad one.

    Raises:
        UserError: if the row can't be trained on.
    """
    row, place = source.row(raw, number), source.place(raw, number)
    for image in row["images"]:
        if image["path"] and not image["bytes"]:
            refuse_younger(image["path"], since, place)
    row["images"] = [_decoded(image, place, opening) for image in row["images"]]
    if check is not None:
        try:
            check(row)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{place}: {error}") from error
    return row


def _decoded(image: dict[str, Any], place: str, opening: PictureOpening) -> Image.Image:
    content = image["bytes"] or image["path"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content) if image["bytes"] else content) as opened:
                reason = decode_failure(content) if opened.mode in DEEPER_THAN_8_BITS else None
                if reason is None:
                    return rgb_picture(opened, opening)  # as `open_picture` does
    except Exception as error:  # a damaged file may surface as nearly anything
        reason = decode_failure(content) or " ".join(str(error).split())
    raise undecodable(place, image["path"], reason)
