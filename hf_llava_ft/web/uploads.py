"""Pictures that came through the page, within the limits of the endpoint's requests: they may be anybody's."""

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.picture_opening_llava import PictureOpening, rgb_picture
from hf_llava_ft.serving.endpoint_handler import MAX_PICTURE_BYTES, MAX_PICTURE_PIXELS, PICTURE_FORMATS

SUFFIXES = [".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"]


def opened_upload(file: str, folder: Path, opening: PictureOpening) -> Image.Image:
    """
    The picture in RGB, opened as in training.

    Args:
        file (`str`): as the page gives it.
        folder (`Path`): that uploads go to.
        opening: the model's `processor.picture_opening`.

    Raises:
        UserError: if it is not in `folder`, too large, or no picture of the formats that are taken.
    """
    path = Path(file).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise UserError("a picture is not among those that were sent to this page: choose it again.")
    if path.stat().st_size > MAX_PICTURE_BYTES:
        raise UserError(f"{path.name} has more than {MAX_PICTURE_BYTES >> 20} MiB, the most for a picture here.")
    try:
        with Image.open(path, formats=PICTURE_FORMATS) as image:
            if image.width * image.height > MAX_PICTURE_PIXELS:  # before any of them is unpacked
                raise UserError(
                    f"{path.name} is {image.width} x {image.height}, and {MAX_PICTURE_PIXELS // 1_000_000} megapixels "
                    f"are the most here: make it smaller."
                )
            return rgb_picture(image, opening)
    except UnidentifiedImageError as error:
        raise UserError(f"{path.name} is none of {', '.join(PICTURE_FORMATS)}, or damaged.") from error
    # Pillow's readers raise all of these for damaged files, and one of its own for bombs.
    except (OSError, SyntaxError, IndexError, OverflowError, Image.DecompressionBombError) as error:
        raise UserError(f"{path.name} cannot be read: it is damaged, or more than a picture.") from error
