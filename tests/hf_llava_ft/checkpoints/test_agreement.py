"""LLaVA-NeXT's words for how a picture is cut are compared with the model's own."""

import pytest

from hf_llava_ft.checkpoints.starting.agreement import check_agreement
from hf_llava_ft.errors import UserError
from hf_llava_ft.settings.arguments import ModelArguments


def config_of(tiny, columns: int, rows: int):
    """Of a LLaVA-1.6 whose pictures have up to so many tiles of 56 pixels."""
    sizes = [[56 * row, 56 * column] for column in range(1, columns + 1) for row in range(1, rows + 1)]
    return tiny.config(image_aspect_ratio="anyres", image_grid_pinpoints=sizes, patch_merge_type="spatial")


def asked(**fields) -> ModelArguments:
    return ModelArguments("some-llava", image_aspect_ratio="anyres", **fields)


def test_a_range_of_grids_names_all_between_its_ends(tiny):
    check_agreement(asked(image_grid_pinpoints="(1x1),...,(3x2)"), config_of(tiny, columns=3, rows=2))
    check_agreement(asked(image_grid_pinpoints="(1x1)"), config_of(tiny, columns=1, rows=1))
    for other in ("(1x1),...,(2x3)", "(1x1),...,(2x2)", "[(56, 112)]"):
        with pytest.raises(UserError, match="which no flag can change"):
            check_agreement(asked(image_grid_pinpoints=other), config_of(tiny, columns=3, rows=2))
    with pytest.raises(UserError, match=r"nor a range of grids such as \(1x1\),...,\(2x2\)"):
        check_agreement(asked(image_grid_pinpoints="1x1 to 6x6"), config_of(tiny, columns=3, rows=2))


def test_anyres_max_is_anyres_where_no_picture_has_more_tiles(tiny):
    check_agreement(asked(anyres_max=6), config_of(tiny, columns=3, rows=2))
    with pytest.raises(UserError, match="anyres_max_5: pictures of some-llava have up to 6 tiles, .* use a model of"):
        check_agreement(asked(anyres_max=5), config_of(tiny, columns=3, rows=2))
