"""LLaVA-1.6 (anyres): a picture is seen as several crops, whose features are merged into one sequence.

The first crop is the whole picture squeezed into a square; the others, row by row, are the tiles of the picture fitted
into the best of `config.image_grid_pinpoints`. Where the tiles lie and what padding is cut away is transformers' own
computation, that of its `llava_next`; here are the original's three ways of merging, of which that has one.

Sources: LLaVA-NeXT blog post (January 2024); haotian-liu/LLaVA, `prepare_inputs_labels_for_multimodal`.

Legend: N images, C crops of all images, P features per crop, D text width.
"""

from collections.abc import Sequence

import torch
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from .configuration_llava import LlavaConfig


def num_crops(image_sizes: torch.Tensor, config: LlavaConfig) -> list[int]:
    """How many crops each of N images has, by `image_sizes` `int64[N, 2]` (height, width)."""
    edge = config.vision_config.image_size
    return [image_size_to_num_patches(size, config.image_grid_pinpoints, edge) for size in image_sizes.tolist()]


def merged_crops(
    crops: Sequence[torch.Tensor], image_sizes: torch.Tensor, config: LlavaConfig, newline: torch.Tensor | None
) -> list[torch.Tensor]:
    """
    The features of each image as one sequence.

    Args:
        crops: for each of N images, the features of its crops, `float[crops, P, D]`.
        image_sizes (`int64[N, 2]`): height and width of the images.
        newline (`float[D]`, *optional*): for `spatial_unpad`, ends each row of features.

    Returns:
        N tensors `float[features, D]`.
    """
    if config.patch_merge_type == "flat":
        return [image.flatten(0, 1) for image in crops]
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    merged = []
    for image, size in zip(crops, image_sizes.tolist(), strict=True):
        rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, vision.image_size)
        tiles = image[1:].view(rows, columns, side, side, -1).permute(4, 0, 2, 1, 3)
        plane = tiles.flatten(3, 4).flatten(1, 2)  # (D, rows * side, columns * side)
        if newline is not None:
            plane = unpad_image(plane, size)
            ends = newline.to(plane)[:, None, None].expand(-1, plane.shape[1], 1)
            plane = torch.cat((plane, ends), dim=-1)
        merged.append(torch.cat((image[0], plane.flatten(1).T)))
    return merged
