"""What a check says of pictures: whether they can be decoded, and whether their shape suits a model.

The header gives size and format. Only decoding shows that a file is truncated, so each is decoded once.
"""

import io
import warnings
from typing import NamedTuple

from PIL import Image

from hf_llava_ft.data.pictures import decode_failure
from hf_llava_ft.processing.picture_opening_llava import (
    PictureOpening,
    is_transparent,
    is_turned,
    size_when_opened,
)
from hf_llava_ft.processing.processing_llava import LlavaProcessor

# One side this many times the other: padded to a square, a picture is then nearly all margin.
EXTREME_RATIO = 20


class ImageFacts(NamedTuple):
    """
    Args:
        width, height (`int`): pixels as they lie, 0 where the header can't be read.
        format (`str`): Pillow's name, "JPEG"; empty where it can't be read.
        is_turned (`bool`): an EXIF orientation asks for turning it.
        is_transparent (`bool`): it has an alpha channel or a transparent colour.
        failure (`str`, *optional*): why it can't be decoded.
        is_bomb (`bool`): it has more pixels than are safe to decode, which is then the failure.
    """

    width: int = 0
    height: int = 0
    format: str = ""
    is_turned: bool = False
    is_transparent: bool = False
    failure: str | None = None
    is_bomb: bool = False

    @property
    def is_extreme(self) -> bool:
        """One pixel wide or high, or longer than [`EXTREME_RATIO`] to 1."""
        if not self.width or not self.height:
            return False
        long, short = max(self.width, self.height), min(self.width, self.height)
        return short == 1 or long > EXTREME_RATIO * short

    @property
    def is_remarkable(self) -> bool:
        """Whether the rows that show it are to be named."""
        return self.failure is not None or self.is_extreme


def image_facts(picture: str | bytes) -> ImageFacts:
    """
    Args:
        picture (`str` or `bytes`): path of a file, or an encoded picture. It is decoded completely, unless its header
            says that it is too large for that.
    """
    limit = Image.MAX_IMAGE_PIXELS
    facts = ImageFacts()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow only warns of is a failure here, or the picture survives it
        try:
            with Image.open(_opened(picture)) as image:
                width, height = image.size
                is_bomb = limit is not None and width * height > limit
                facts = ImageFacts(
                    width, height, image.format or "", is_turned(image), is_transparent(image), is_bomb=is_bomb
                )
        except Image.DecompressionBombError:
            facts = ImageFacts(is_bomb=True)
        # A damaged header may surface as nearly anything; decoding it says it in words.
        except Exception:
            pass
        return facts._replace(failure=decode_failure(picture))


def image_size(picture: str | bytes, opening: PictureOpening = "upright") -> tuple[int, int] | None:
    """`(height, width)` that the picture has when it is opened, by the header alone; None if that can't be read."""
    try:
        with warnings.catch_warnings(), Image.open(_opened(picture)) as image:
            warnings.simplefilter("ignore")
            return size_when_opened(image, opening)
    except Exception:  # as above
        return None


def stored_sizes(processor: LlavaProcessor, images: list) -> list[tuple[int, int]]:
    """`(height, width)` of undecoded images, `{"path": ..., "bytes": ...}`, by their headers, and only where the
    processor asks for it; (1, 1) for one whose header can't be read."""
    if not processor.depends_on_image_size:
        return [(1, 1)] * len(images)
    return [image_size(image["bytes"] or image["path"], processor.picture_opening) or (1, 1) for image in images]


def _opened(picture: str | bytes):
    return io.BytesIO(picture) if isinstance(picture, bytes) else picture
