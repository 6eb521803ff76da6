"""Where the crops of LLaVA-1.6 lie: equal to transformers' own functions, over many sizes."""

import random

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.models.llava_next import modeling_llava_next as native

import hf_llava_ft
from hf_llava_ft.modeling.anyres_llava import best_pinpoint, num_crops, tile_grid, unpadded

PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]


@pytest.fixture(scope="module")
def config():
    return hf_llava_ft.LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=56, patch_size=14),
        text_config=LlamaConfig(),
        image_aspect_ratio="anyres",
        patch_merge_type="spatial_unpad",
        image_grid_pinpoints=PINPOINTS,
    )


def sizes() -> list[tuple[int, int]]:
    rng = random.Random(0)
    odd = [(1, 1), (1, 4000), (4000, 1), (56, 56), (112, 112), (57, 111), (3, 5)]
    return odd + [(rng.randint(1, 3000), rng.randint(1, 3000)) for _ in range(3000)]


def test_the_grid_of_every_size_is_that_of_transformers(config):
    for size in sizes():
        assert best_pinpoint(size, PINPOINTS) == native.select_best_resolution(size, PINPOINTS), size
        assert tile_grid(size, config) == native.get_anyres_image_grid_shape(size, PINPOINTS, 56), size
        assert num_crops(torch.tensor([size]), config) == [native.image_size_to_num_patches(size, PINPOINTS, 56)]
    # Not every rule would do: one by area alone chooses otherwise.
    by_area = [max(PINPOINTS, key=lambda pinpoint: pinpoint[0] * pinpoint[1])] * len(sizes())
    assert any(tuple(a) != best_pinpoint(size, PINPOINTS) for a, size in zip(by_area, sizes(), strict=True))


def test_what_is_cut_away_as_padding_is_what_transformers_cuts():
    for size in sizes():
        for rows, columns in ((4, 8), (8, 4), (8, 8), (12, 4), (24, 48)):
            plane = torch.arange(rows * columns, dtype=torch.float32).view(1, rows, columns)
            assert torch.equal(unpadded(plane, size), native.unpad_image(plane, size)), (size, rows, columns)
