"""The pictures of a conversation: their pixels, and how many placeholders each takes in the text."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from PIL import Image
from transformers import LlavaNextProcessor as NativeLlavaNextProcessor
from transformers import ProcessorMixin
from transformers.image_processing_utils import select_best_resolution
from transformers.image_utils import SizeDict
from transformers.processing_utils import MultiModalData

from .uint8_pixels_llava import can_hand_over_uint8, uint8_images

PatchMergeType = Literal["flat", "spatial", "spatial_unpad"]

# What may be set for one call of the image processor and changes the size of its crops.
_CROP_SETTINGS = ("size", "crop_size", "do_resize", "do_center_crop")


class ConversationPictures(ProcessorMixin):
    """The part of [`LlavaProcessor`] that deals with pictures alone: each is one square."""

    image_processor: Any
    image_token: str

    def encode_images(self, images: list[Image.Image], uint8_pixels: bool = False) -> dict[str, torch.Tensor]:
        """
        `pixel_values` `float32[N, 3, H, W]` of N pictures.

        Args:
            uint8_pixels (`bool`): give them as uint8, for `normalize_pixels`, if the image processor is of a kind that
                allows it.
        """
        return {"pixel_values": self._processed_pictures(images, uint8_pixels, return_tensors="pt")["pixel_values"]}

    def _processed_pictures(self, images: list[Image.Image], uint8_pixels: bool, **options) -> Mapping[str, Any]:
        if uint8_pixels and can_hand_over_uint8(self.image_processor):
            return uint8_images(self.image_processor, images, **options)
        return self.image_processor(images, **options)

    def num_placeholders(self, encoded_images: dict[str, torch.Tensor]) -> list[int]:
        """How many placeholders each picture of an `encode_images` result takes."""
        indices = range(len(encoded_images["pixel_values"]))
        return [len(self.replace_image_token(encoded_images, index)) // len(self.image_token) for index in indices]

    @property
    def depends_on_image_size(self) -> bool:
        """Whether pictures of different sizes take different numbers of placeholders."""
        return False

    def num_image_tokens_at(self, height: int, width: int) -> int:
        """Placeholders of a picture of `height` x `width` pixels."""
        return self.num_image_tokens

    @cached_property
    def num_image_tokens(self) -> int:
        """Placeholders per image: one number, because LLaVA-1.5 makes every picture the same square."""
        return self.num_placeholders(self.encode_images([Image.new("RGB", (8, 8))]))[0]

    # A private name of transformers', but the one by which vLLM asks.
    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[tuple[int, int]] | None = None, **kwargs
    ) -> MultiModalData:
        """
        How many placeholders a call makes of pictures of these sizes.

        Args:
            image_sizes: `(height, width)` of each picture.
            kwargs: settings of the image processor that the call would be given too, such as `size`.

        Returns:
            `MultiModalData` with `num_image_tokens` by picture, and `num_image_patches`, the rows that each has in
            `pixel_values`: 1, because transformers counts the crops of LLaVA-1.6 in another dimension.
        """
        if image_sizes is None:
            return MultiModalData()
        given = {**kwargs, **kwargs.get("images_kwargs", {})}
        settings = {name: given[name] for name in _CROP_SETTINGS if given.get(name) is not None}
        counts = [self._num_image_tokens_with(settings, height, width) for height, width in image_sizes]
        return MultiModalData(num_image_tokens=counts, num_image_patches=[1] * len(counts))

    def _num_image_tokens_with(self, settings: dict, height: int, width: int) -> int:
        """`num_image_tokens_at` where the image processor is given `settings`."""
        if not settings:
            return self.num_image_tokens_at(height, width)
        return self.num_placeholders(
            self.image_processor([Image.new("RGB", (8, 8))], return_tensors="pt", **settings)
        )[0]


class ConversationCrops(ConversationPictures):
    """The same of [`LlavaNextProcessor`]: each is cut into crops, and takes as many placeholders as they have
    features."""

    patch_size: int
    vision_feature_select_strategy: str
    num_additional_image_tokens: int
    patch_merge_type: PatchMergeType

    def encode_images(self, images: list[Image.Image], uint8_pixels: bool = False) -> dict[str, torch.Tensor]:
        """`pixel_values` `float32[C, 3, H, W]` of the C crops of all pictures, each picture as a whole first, and
        `image_sizes` `int64[N, 2]`, height and width of the N pictures."""
        encoded = self._processed_pictures(images, uint8_pixels, do_pad=False)
        crops = [torch.as_tensor(crop) for image in encoded["pixel_values"] for crop in image]
        sizes = [[int(edge) for edge in size] for size in encoded["image_sizes"]]
        return {"pixel_values": torch.stack(crops), "image_sizes": torch.tensor(sizes)}

    def num_placeholders(self, encoded_images) -> list[int]:
        edge = encoded_images["pixel_values"][0][0].shape[-1]  # of the crops that there are, whatever made them
        sizes = torch.as_tensor(encoded_images["image_sizes"]).tolist()
        return [self._num_features(height, width, edge) for height, width in sizes]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self.num_placeholders(image_inputs)[image_idx]

    @property
    def depends_on_image_size(self) -> bool:
        return True

    @property
    def num_image_tokens(self) -> int:  # type: ignore[override]
        raise AttributeError("the number of placeholders depends on the picture: ask num_image_tokens_at.")

    def num_image_tokens_at(self, height: int, width: int) -> int:
        return self._num_image_tokens_with({}, height, width)

    def _num_image_tokens_with(self, settings: dict, height: int, width: int) -> int:
        def setting(name):
            return settings.get(name, getattr(self.image_processor, name))

        size = setting("crop_size") if setting("do_center_crop") else setting("size")
        size = size if isinstance(size, SizeDict) else SizeDict(**size)
        edge = size.height or size.shortest_edge
        assert edge is not None
        return self._num_features(height, width, edge)

    def _num_features(self, height: int, width: int, edge: int) -> int:
        """Placeholders of a picture of `height` x `width` pixels that is cut into crops of `edge`."""
        drops_class_token = self.vision_feature_select_strategy == "default"
        if self.patch_merge_type == "spatial_unpad":
            return self._get_number_of_features(height, width, edge, edge) - drops_class_token  # type: ignore[misc]
        rows, columns = (
            side // edge for side in select_best_resolution((height, width), self.image_processor.image_grid_pinpoints)
        )
        num_features = (edge // self.patch_size) ** 2 + self.num_additional_image_tokens - drops_class_token
        return (rows * columns + 1) * num_features

    # transformers' own count, so that it cannot come apart from what its model does.
    _get_number_of_features = NativeLlavaNextProcessor._get_number_of_features
    _get_unpadded_features = NativeLlavaNextProcessor._get_unpadded_features
