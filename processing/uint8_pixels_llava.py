"""Pictures as uint8, and what makes the model's floats of them afterwards.

The last two steps of an image processor, rescaling and normalising, turn each of the 256 levels of a channel into one
float. So a worker need not take them: it hands over a quarter of the bytes, and a table of 3 x 256 floats, filled by
the image processor itself, is read where the model is. What comes out is its own result, bit for bit.

The steps before, padding, resizing and cropping, are Pillow's on whole numbers. Here they run on the picture itself
rather than on arrays made from it and back. Margins are added between the two passes that Pillow resizes in, so that a
picture of 20,000 x 10 never becomes a square of 20,000 x 20,000. Whatever these shortcuts do not cover, the image
processor does.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    SiglipImageProcessorPil,
)

# Those of them that make one square of a picture.
_SQUARE = (LlavaImageProcessorPil, CLIPImageProcessorPil, SiglipImageProcessorPil)
# Filters that Pillow applies in two passes, with whole numbers between.
_TWO_PASSES = tuple(Image.Resampling[name] for name in ("BOX", "HAMMING", "BILINEAR", "BICUBIC", "LANCZOS"))
_BAND_ROWS = 128


def can_hand_over_uint8(image_processor) -> bool:
    """
    Whether `image_processor` is of a kind whose last steps are those of `normalize_pixels`.

    A subclass may have others, and so has the torchvision backend; a processor that neither rescales nor normalises
    gives uint8 as it is.
    """
    kind = type(image_processor)
    if kind not in (*_SQUARE, LlavaNextImageProcessorPil):
        return False
    if not (image_processor.do_rescale or image_processor.do_normalize):
        return False
    # For the towers' own processors `do_pad` is another step, after normalising, and pads with its zero.
    return kind in (LlavaImageProcessorPil, LlavaNextImageProcessorPil) or not image_processor.do_pad


def uint8_images(image_processor, images: list[Image.Image], **options) -> Mapping[str, Any]:
    """
    As `image_processor(images, **options)`, except that nothing is rescaled or normalised.

    Args:
        image_processor: one for which `can_hand_over_uint8` is true.
        options: as the image processor takes them. Where anyres fills up the number of crops (`do_pad`), the fill is
            black and not the zero of the floats; a model reads neither.

    Returns:
        With `pixel_values`, whose elements are uint8.
    """
    if type(image_processor) in _SQUARE and options == {"return_tensors": "pt"}:
        cut = [_cut(image_processor, image) for image in images]
        arrays = [np.asarray(image).transpose(2, 0, 1) for image in cut if image is not None]
        if arrays and len(arrays) == len(images):
            # Into an array made before: by itself `stack` would keep the channels last.
            stacked = np.empty((len(arrays), *arrays[0].shape), dtype=np.uint8)
            return {"pixel_values": torch.from_numpy(np.stack(arrays, out=stacked))}
    return image_processor(images, do_rescale=False, do_normalize=False, **options)


def normalize_pixels(image_processor, pixels: torch.Tensor) -> torch.Tensor:
    """`uint8[..., 3, H, W]` of `uint8_images` to the `float32` that `image_processor` gives, on the same device."""
    levels = np.tile(np.arange(256, dtype=np.uint8), (3, 1, 1))
    if image_processor.do_rescale:
        levels = image_processor.rescale(levels, image_processor.rescale_factor)
    if image_processor.do_normalize:
        levels = image_processor.normalize(levels, image_processor.image_mean, image_processor.image_std)
    table = torch.from_numpy(levels.astype(np.float32).reshape(-1)).to(pixels.device)
    channel = torch.arange(0, 3 * 256, 256, dtype=torch.int32, device=pixels.device).view(3, 1, 1)
    # Not `table[index]`, which takes seven times as long on CPU.
    index = pixels.to(torch.int32).add_(channel)
    return table.index_select(0, index.reshape(-1)).view(pixels.shape)


def _cut(image_processor, image: Image.Image) -> Image.Image | None:
    """The RGB picture that the image processor would rescale next; `None` where it has to do it itself."""
    if image.mode != "RGB" or image.info.get("transparency") is not None:
        return None
    if not image_processor.do_resize or image_processor.resample not in _TWO_PASSES:
        return None
    pads = image_processor.do_pad and image.width != image.height
    edge = max(image.size)
    size = _resized_size(image_processor.size, (edge, edge) if pads else image.size)
    crop = image_processor.crop_size if image_processor.do_center_crop else None
    if size is None or crop is not None and (crop.width > size[0] or crop.height > size[1]):
        return None
    if pads:
        mean = image_processor.image_mean
        colour = tuple(int(value * 255) for value in mean) if mean else (0, 0, 0)
        image = _padded_and_resized(image, size, colour, image_processor.resample)
    else:
        image = image.resize(size, image_processor.resample)
    if crop is not None and (crop.width, crop.height) != size:
        left, top = (size[0] - crop.width) // 2, (size[1] - crop.height) // 2
        image = image.crop((left, top, left + crop.width, top + crop.height))
    return image


def _resized_size(size, image_size: tuple[int, int]) -> tuple[int, int] | None:
    """Width and height that `size`, an image processor's, asks for; `None` for the kinds that LLaVA does not use."""
    given = {name for name, value in dict(size).items() if value is not None}
    if given == {"height", "width"}:
        return size.width, size.height
    if given != {"shortest_edge"}:
        return None
    short, long = size.shortest_edge, int(size.shortest_edge * max(image_size) / min(image_size))
    return (short, long) if image_size[0] <= image_size[1] else (long, short)


def _padded_and_resized(image: Image.Image, size: tuple[int, int], colour, resample) -> Image.Image:
    """As if `image` stood in the middle of a square of `colour` and that were resized to `size`."""
    edge, width = max(image.size), size[0]
    if size != (width, width) or not _rows_come_first():
        square = Image.new("RGB", (edge, edge), colour)
        square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
        return square.resize(size, resample)
    rows_done = Image.new("RGB", (width, edge), colour)
    if image.width == edge:
        rows_done.paste(image.resize((width, image.height), resample), (0, (edge - image.height) // 2))
    else:
        # Between the same margins always; what of a picture lies outside of where it is pasted is left out.
        band = Image.new("RGB", (edge, min(_BAND_ROWS, edge)), colour)
        for top in range(0, edge, band.height):
            band.paste(image, ((edge - image.width) // 2, -top))
            rows_done.paste(band.resize((width, band.height), resample), (0, top))
    return rows_done.resize(size, resample)


@cache
def _rows_come_first() -> bool:
    """Whether this Pillow resizes the rows of a square before its columns: Pillow 13 chooses by the shape, and rows
    where that leaves it open; Pillow 11 knows no other order, which shows in how the numbers between are rounded."""
    noise = np.random.default_rng(0).integers(0, 256, (61, 61, 3), dtype=np.uint8)
    square, bicubic = Image.fromarray(noise), Image.Resampling.BICUBIC
    return all(
        square.resize((edge, edge), bicubic) == square.resize((edge, 61), bicubic).resize((edge, edge), bicubic)
        for edge in (29, 97)
    )
