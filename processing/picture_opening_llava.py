"""How a file becomes the RGB that a model sees: which way is up, and what becomes of transparency.

`upright` is what transformers' `load_image` does, and with it pipelines, chat templates and `transformers serve`: a
picture is turned as its EXIF or XMP data say, and an alpha channel is dropped. Of a palette's transparent colour
Pillow leaves a note behind, and the image processors of newer releases (not 5.20, but 5.23) paint that colour white.
`original` is what the original LLaVA does: nothing is turned, and all transparency is dropped.
"""

from typing import Literal, get_args

from PIL import ExifTags, Image, ImageOps

PictureOpening = Literal["upright", "original"]
PICTURE_OPENINGS: tuple[str, ...] = get_args(PictureOpening)

_UPRIGHT, _TURNED = 1, range(2, 9)
_ON_ITS_SIDE = range(5, 9)
_OF_TEXT = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")  # what in a PNG can hold an orientation


def rgb_picture(image: Image.Image, opening: PictureOpening = "upright") -> Image.Image:
    """The picture, decoded and in RGB, opened in the way `opening`. Opening it twice changes nothing."""
    return as_rgb(image) if opening == "original" else _as_load_image_does(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """
    The picture in RGB, as the original converts it: transparency is dropped. Pillow leaves a note of a palette's
    transparent colour behind, by which transformers would paint that colour white.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image  # and no copy of it
    image = image.convert("RGB")
    image.info.pop("transparency", None)
    return image


def _as_load_image_does(image: Image.Image) -> Image.Image:
    # Not `load_image` itself, which copies every picture twice, and fails where EXIF data are damaged.
    image.load()
    if orientation(image) in _TURNED:
        image = ImageOps.exif_transpose(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def orientation(image: Image.Image) -> int:
    """1 to 8, of a picture that `Image.open` has opened; 1 where nothing readable is said of it. Decodes nothing, but
    for a PNG with notes behind its pixels."""
    try:
        if image.format == "PNG" and "exif" not in image.info and not _has_notes_behind(image):
            said = Image.Image.getexif(image)  # that of a PNG would decode it, to see what comes behind
        else:
            said = image.getexif()
        return int(said.get(ExifTags.Base.Orientation, _UPRIGHT))
    except Exception:  # of damaged data nearly anything; the pixels may be sound
        return _UPRIGHT


def recorded_opening(config) -> PictureOpening:
    """What the configuration of a model of the original says, in a field that only this package writes and reads."""
    said = (getattr(config, "original_config", None) or {}).get("picture_opening")
    return "original" if said == "original" else "upright"


def size_when_opened(image: Image.Image, opening: PictureOpening = "upright") -> tuple[int, int]:
    """`(height, width)` that `rgb_picture` of it has, from the header alone."""
    # Pillow itself turns a TIFF, and its size is already that.
    on_its_side = opening == "upright" and image.format != "TIFF" and orientation(image) in _ON_ITS_SIDE
    return (image.width, image.height) if on_its_side else (image.height, image.width)


def is_turned(image: Image.Image) -> bool:
    """Whether the two ways of opening make different pictures of it, because of its orientation."""
    return image.format != "TIFF" and orientation(image) in _TURNED


def is_transparent(image: Image.Image) -> bool:
    """Whether it has an alpha channel or a transparent colour, by its header; it may all the same be opaque."""
    return "A" in image.getbands() or image.info.get("transparency") is not None


def _has_notes_behind(image: Image.Image) -> bool:
    """Whether a PNG that was opened and not decoded has text or EXIF data behind its pixels."""
    file = getattr(image, "fp", None)
    if file is None:
        return False  # decoded: what there is was read
    place, found = file.tell(), False
    file.seek(8)  # its signature
    seen_pixels = False
    while len(head := file.read(8)) == 8:
        size, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind == b"IEND" or found:
            break
        found = seen_pixels and kind in _OF_TEXT
        seen_pixels = seen_pixels or kind == b"IDAT"
        file.seek(size + 4, 1)  # and its checksum
    file.seek(place)
    return found
