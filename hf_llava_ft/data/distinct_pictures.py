"""The pictures of a batch, each once: several rows often ask about the same one.

A picture is known by the path of its file or by its bytes, never by its pixels. Where what a frozen tower makes of it
is kept on disk, it is known by the bytes of the file alone, and is not even decoded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hf_llava_ft.data.pictures import open_picture
from hf_llava_ft.data.vision_features import StoredPicture, VisionFeatures, digest_of
from hf_llava_ft.processing.processing_llava import LlavaProcessor


@dataclass(frozen=True)
class NewPicture:
    """
    One that the tower has to see, and what is made of it is to be kept.

    Args:
        digest (`str`, *optional*): see `digest_of`; None of one that has no bytes, which can't be kept.
        height, width (`int`): in pixels, as it was opened.
        crops (`int`): rows that it has in `pixel_values`.
    """

    digest: str | None
    height: int
    width: int
    crops: int


class DistinctPictures:
    """
    Of one batch.

    Args:
        processor (`LlavaProcessor`): opens and encodes them.
        uint8_pixels (`bool`): see `LlavaProcessor.encode_images`.
        features (`VisionFeatures`, *optional*): where to look before one is decoded.
    """

    def __init__(self, processor: LlavaProcessor, uint8_pixels: bool, features: VisionFeatures | None = None):
        self.processor, self.uint8_pixels, self.features = processor, uint8_pixels, features
        self._stored: dict[Any, StoredPicture] = {}
        self._encoded: dict[Any, dict[str, torch.Tensor]] = {}
        self._open: dict[Any, Image.Image] = {}  # of one row: they are large before they are resized
        self._sizes: dict[Any, tuple[int, int]] = {}
        self._taken: list[Any] = []

    def open(self, images: Sequence[Image.Image | dict[str, Any]]) -> list[Any]:
        """The key of each picture of a row; those that are new are opened."""
        return [self._opened(image) for image in images]

    def sizes(self, keys: Sequence[Any]) -> list[tuple[int, int]]:
        """`(height, width)` of each."""
        return [self._sizes[key] for key in keys]

    def take(self, keys: Sequence[Any]) -> None:
        """Puts pictures of the row that was opened last into the batch, in order."""
        for key in keys:
            if key in self._open and key not in self._encoded:
                self._encoded[key] = self.processor.encode_images([self._open[key]], self.uint8_pixels)
        self._taken += keys
        self._open.clear()

    def tensors(self) -> dict[str, Any]:
        """
        What the batch has of pictures, empty if there are none: `vision_features` `float[C, P, F]` of those whose
        features are kept; `pixel_values` of the others, and with a place to keep them `new_pictures`
        (`list[NewPicture]`) where their bytes are known; `image_sizes` of all, as the image processor has it; and
        `picture_index` (`list[int]`), which of them, stored ones first, stands in each place of the text. The last is
        left out where it is 0, 1, 2, ...
        """
        distinct = dict.fromkeys(self._taken)
        stored = [key for key in distinct if key in self._stored]
        new = [key for key in distinct if key not in self._stored]
        order = [*stored, *new]
        places = {key: place for place, key in enumerate(order)}
        index = [places[key] for key in self._taken]
        batch: dict[str, Any] = {}
        if stored:
            batch["vision_features"] = torch.cat([self._stored[key].features for key in stored])
        if new:
            batch["pixel_values"] = torch.cat([self._encoded[key]["pixel_values"] for key in new])
        if order and "image_sizes" in self.processor.image_processor.model_input_names:
            batch["image_sizes"] = torch.tensor([self._sizes[key] for key in order])
        if index != list(range(len(index))):
            batch["picture_index"] = index
        if self.features is not None and new:
            crops = {key: len(self._encoded[key]["pixel_values"]) for key in new}
            batch["new_pictures"] = [
                NewPicture(key if isinstance(key, str) else None, *self._sizes[key], crops[key]) for key in new
            ]
        return batch

    def _opened(self, image: Image.Image | dict[str, Any]) -> Any:
        content: bytes | None = None
        if isinstance(image, dict):
            content = image.get("bytes") or None
            if self.features is not None and content is None:
                content = Path(image["path"]).read_bytes()
            key: Any = image["path"] if content is None else digest_of(content)
        else:
            key = id(image)  # which the row holds as long as the batch is made
        if any(key in known for known in (self._stored, self._encoded, self._open)):
            return key
        stored = self.features.read(key) if self.features is not None and isinstance(key, str) else None
        if stored is not None:
            self._stored[key] = stored
            self._sizes[key] = (stored.height, stored.width)
            return key
        opened = open_picture(image if content is None else {"bytes": content}, self.processor.picture_opening)
        self._open[key] = opened
        self._sizes[key] = (opened.height, opened.width)
        return key
