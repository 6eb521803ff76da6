"""LLaVA-1.6 (anyres): a picture is seen as several crops, whose features are merged into one sequence.

The first crop is the whole picture squeezed into a square; the others, row by row, are the tiles of the picture fitted
into the best of `config.image_grid_pinpoints`. Where the tiles lie and what padding is cut away is computed as in
transformers' `llava_next`, to the last rounding; here are the original's three ways of merging, of which that has one.

Sources: LLaVA-NeXT blog post (January 2024); haotian-liu/LLaVA, `prepare_inputs_labels_for_multimodal` and
`mm_utils.py`.

Legend: N images, C crops of all images, P features per crop, D text width.
"""

from collections.abc import Sequence

import torch

from .configuration_llava import LlavaConfig


def best_pinpoint(image_size: Sequence[int], pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The pinpoint, (height, width), in which a picture of `image_size` (height, width) keeps most of its pixels; of
    equals the one with the least left empty, then the first."""
    height, width = image_size

    def rank(pinpoint: Sequence[int]) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - pinpoint[0] * pinpoint[1]

    best = max(pinpoints, key=rank)  # the first of equals
    return best[0], best[1]


def tile_grid(image_size: Sequence[int], config: LlavaConfig) -> tuple[int, int]:
    """Rows and columns of the tiles that a picture of `image_size` (height, width) is cut into."""
    height, width = best_pinpoint(image_size, config.image_grid_pinpoints or [])
    edge = config.vision_config.image_size
    return height // edge, width // edge


def num_crops(image_sizes: torch.Tensor, config: LlavaConfig) -> list[int]:
    """How many crops each of N images has, by `image_sizes` `int64[N, 2]` (height, width)."""
    grids = [tile_grid(size, config) for size in image_sizes.tolist()]
    return [1 + rows * columns for rows, columns in grids]


def unpadded(plane: torch.Tensor, image_size: Sequence[int]) -> torch.Tensor:
    """`plane` `float[D, rows, columns]` without what lies outside a picture of `image_size` (height, width) that was
    fitted into its middle."""
    height, width = image_size
    rows, columns = plane.shape[1:]
    if width / height > columns / rows:
        # Rounded first, as in transformers: a row must not be lost to 5.9999999.
        border = (rows - int(round(height * (columns / width), 7))) // 2
        return plane[:, border : rows - border, :]
    border = (columns - int(round(width * (rows / height), 7))) // 2
    return plane[:, :, border : columns - border]


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
    side = config.vision_config.image_size // config.vision_config.patch_size
    merged = []
    for image, size in zip(crops, image_sizes.tolist(), strict=True):
        rows, columns = tile_grid(size, config)
        tiles = image[1:].view(rows, columns, side, side, -1).permute(4, 0, 2, 1, 3)
        plane = tiles.flatten(3, 4).flatten(1, 2)  # (D, rows * side, columns * side)
        if newline is not None:
            plane = unpadded(plane, size)
            ends = newline.to(plane)[:, None, None].expand(-1, plane.shape[1], 1)
            plane = torch.cat((plane, ends), dim=-1)
        merged.append(torch.cat((image[0], plane.flatten(1).T)))
    return merged
