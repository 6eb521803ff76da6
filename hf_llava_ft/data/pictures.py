"""Pictures of rows, opened; and whether they can be decoded, and safely.

Decoding every image before training costs minutes on a large set, once. Meeting a truncated one in hour nine costs
more.
"""

import io
import os
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from hf_llava_ft.data.decoded import NO_FILE, DecodedPictures
from hf_llava_ft.data.worker_pool import results_in_order
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.picture_opening_llava import PictureOpening, rgb_picture

# Gray of 16 or 32 bits. Pillow, and so the original LLaVA and every server of models, makes them RGB by cutting off
# whatever is above 255: most such pictures would be trained as a white square. Colour of 16 bits is read as 8.
DEEPER_THAN_8_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")

_DECODED_AT_ONCE = 64


def open_picture(image: Image.Image | dict[str, Any], opening: PictureOpening = "upright") -> Image.Image:
    """
    A decoded RGB picture, from one or from `{"path": ..., "bytes": ...}` as an undecoded `datasets.Image` column has
    it, opened in the way `opening`; the processor of a model says which is its own.
    """
    if isinstance(image, dict):
        with Image.open(io.BytesIO(image["bytes"]) if image.get("bytes") else image["path"]) as opened:
            return rgb_picture(opened, opening)
    return rgb_picture(image, opening)


def decode_failure(picture: str | bytes) -> str | None:
    """
    Decode a picture completely, and see whether it survives as RGB.

    One of more than `PIL.Image.MAX_IMAGE_PIXELS` pixels fails by its header alone: kilobytes can unpack to gigabytes.

    Args:
        picture (`str` or `bytes`): path of a file, or an encoded picture.

    Returns:
        `str`, *optional*: why Pillow can't decode it; None if it can.
    """
    limit = Image.MAX_IMAGE_PIXELS
    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            width, height = image.size
            if limit is not None and width * height > limit:
                return f"{width} x {height} pixels are more than the {limit} that are safe to decode"
            # A JPEG at an eighth of its size: all of it is read, with the same verdict, in half the time.
            image.draft(image.mode, (1, 1))
            image.load()
            if image.mode in DEEPER_THAN_8_BITS:
                extrema: Any = image.getextrema()  # of the one channel
                lowest, highest = extrema
                if highest > 255 or image.mode == "F":
                    return (
                        f"its values, {lowest} to {highest}, would be cut at 255, so turn them into 8 bits a channel"
                    )
    except UnidentifiedImageError:
        size = len(picture) if isinstance(picture, bytes) else os.path.getsize(picture)
        return "no image format that Pillow knows" if size else "the file is empty"
    except Image.DecompressionBombError:
        return f"more than the {limit} pixels that are safe to decode"
    # OSError and SyntaxError are usual, but a damaged header may surface as nearly anything (struct.error, ValueError,
    # KeyError, zlib.error, MemoryError), and each means the same to the user.
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error)  # of a file that may not be read
        return " ".join(reason.split()) or type(error).__name__
    return None


def undecodable(place: str, path: str | None, reason: str) -> UserError:
    """What is said of a row at `place` whose picture fails; `path` is that of its file, or the name it once had."""
    name = "an image" if path is None else f"image {os.path.basename(path)!r}"
    return UserError(f"{place}: {name} can't be decoded ({reason}); replace it or remove the row.")


def unreadable_images(
    paths: Iterable[str], decoded: DecodedPictures | None = None, states: np.ndarray | None = None
) -> dict[str, str]:
    """
    Decode every distinct image completely and keep those that fail, on all cores, behind a progress bar.

    A picture of more than `PIL.Image.MAX_IMAGE_PIXELS` pixels counts as unreadable: kilobytes can unpack to gigabytes.

    Args:
        paths (`Iterable[str]`): image files; repeated ones are decoded once, under whatever names.
        decoded (`DecodedPictures`, *optional*): what need not be decoded again; learns what could be.
        states (`ndarray[N]` of `STATE`, *optional*): of the files, if they are known; `paths` has each once then.

    Returns:
        `dict[str, str]`: path -> reason, in the order given; empty when all is well.
    """
    from datasets.utils import tqdm  # the bar that datasets' disable_progress_bars() silences

    paths = list(dict.fromkeys(paths))
    new = list(range(len(paths)))
    keys = np.zeros(len(paths), dtype=np.uint64)
    if decoded is not None:
        keys = decoded.keys(paths) if states is None else decoded.keys_of_states(states)
        _, firsts = np.unique(keys, return_index=True)
        is_new = np.zeros(len(paths), dtype=bool)
        is_new[firsts] = True
        new = np.flatnonzero((is_new & ~decoded.are_known(keys)) | (keys == NO_FILE)).tolist()
    groups = [[paths[place] for place in new[start : start + _DECODED_AT_ONCE]] for start in _starts(len(new))]
    unreadable: dict[str, str] = {}
    with tqdm(total=len(paths), initial=len(paths) - len(new), desc="Checking images", unit=" images") as bar:
        for group, failures in zip(groups, results_in_order(_decode_failures, groups), strict=True):
            unreadable.update(failures)
            bar.update(len(group))
    if decoded is None:
        return unreadable
    sound = [place for place in new if paths[place] not in unreadable]
    decoded.remember([paths[place] for place in sound], keys[sound])
    if unreadable:  # under their other names as well
        reasons = {int(keys[place]): unreadable[paths[place]] for place in new if paths[place] in unreadable}
        reasons.pop(NO_FILE, None)
        for path, key in zip(paths, keys.tolist(), strict=True):
            if key in reasons:
                unreadable.setdefault(path, reasons[key])
        unreadable = {path: unreadable[path] for path in paths if path in unreadable}
    return unreadable


def _starts(number: int) -> range:
    return range(0, number, _DECODED_AT_ONCE)


def _decode_failures(paths: list[str]) -> dict[str, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow only warns of, decode_failure reports or the picture survives
        reasons = ((path, decode_failure(path)) for path in paths)
        return {path: reason for path, reason in reasons if reason is not None}
