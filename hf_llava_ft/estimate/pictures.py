"""Crops and tokens of a picture by its size, without the picture."""

import re
from dataclasses import dataclass

import torch

from hf_llava_ft.modeling.anyres_llava import merged_crops, num_crops
from hf_llava_ft.modeling.configuration_llava import LlavaConfig

# In LLaVA-1.5 all pictures cost the same.
TYPICAL_SIZE = (480, 640)


@dataclass(frozen=True)
class Picture:
    """
    Args:
        size (`tuple[int, int]`): height and width in pixels.
        crops (`int`): squares of it that the tower sees.
        tokens (`int`): positions that it takes in a row.
    """

    size: tuple[int, int]
    crops: int
    tokens: int


def picture_of(config: LlavaConfig, size: tuple[int, int] = TYPICAL_SIZE) -> Picture:
    """What a picture of `size`, height and width, is for the model of `config`."""
    vision = config.vision_config
    features = (vision.image_size // vision.patch_size) ** 2
    has_class_token = vision.model_type == "clip_vision_model"
    features += int(has_class_token and config.vision_feature_select_strategy == "full")
    if config.image_aspect_ratio != "anyres":
        return Picture(size, 1, features)
    image_sizes = torch.tensor([size])
    (crops,) = num_crops(image_sizes, config)
    newline = torch.zeros(1) if config.has_image_newline else None
    (merged,) = merged_crops([torch.zeros(crops, features, 1)], image_sizes, config, newline)
    return Picture(size, crops, len(merged))


def worst_picture(config: LlavaConfig) -> Picture:
    """The one of most tokens: in LLaVA-1.6 it fills one of the sizes that pictures are fitted into, so that nothing of
    it is padding, which would be cut away."""
    if config.image_aspect_ratio != "anyres":
        return picture_of(config)
    pictures = [picture_of(config, (height, width)) for height, width in config.image_grid_pinpoints]
    return max(pictures, key=lambda picture: (picture.tokens, picture.crops))


def parsed_size(text: str) -> tuple[int, int]:
    """Height and width of `640x480`, width first.

    Raises:
        ValueError: if it is no size.
    """
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not found:
        raise ValueError(f"{text} is no size of a picture: write WIDTHxHEIGHT in pixels, such as 640x480, or worst.")
    return int(found[2]), int(found[1])
