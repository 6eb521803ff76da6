"""Pictures that a question names: at a path, or on the web."""

import io
import urllib.error
import urllib.request
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.picture_opening_llava import PictureOpening, rgb_picture

URL_TIMEOUT_SECONDS = 30
MAX_URL_BYTES = 64 * 2**20


def open_image(source: str | Path, opening: PictureOpening = "upright") -> Image.Image:
    """
    The picture at a path or an http(s) URL, decoded, in RGB.

    Args:
        opening (`"upright"` or `"original"`): a model's own is `processor.picture_opening`.

    Raises:
        UserError: if it is not there or no picture.
    """
    try:
        if str(source).startswith(("http://", "https://")):
            with urllib.request.urlopen(str(source), timeout=URL_TIMEOUT_SECONDS) as response:
                content = response.read(MAX_URL_BYTES + 1)
            if len(content) > MAX_URL_BYTES:
                raise UserError(f"the image at {source} is larger than {MAX_URL_BYTES >> 20} MiB.")
            return rgb_picture(Image.open(io.BytesIO(content)), opening)
        with Image.open(source) as image:
            return rgb_picture(image, opening)
    except FileNotFoundError as error:
        raise UserError(f"the image {source} does not exist.") from error
    except urllib.error.URLError as error:
        raise UserError(f"the image {source} cannot be fetched: {error.reason}.") from error
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"the image {source} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
