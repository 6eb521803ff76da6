"""The image processor of a LLaVA: that of its vision tower, with the original's ways of making squares of a picture.

Nothing is computed here: transformers' own `LlavaImageProcessor` does it, with `do_pad` for `pad`, and its
`LlavaNextImageProcessor` for `anyres`. Always the PIL
backend where we build one: it is bit-equal to the original, while the torchvision backend differs by one level of 255
in places.
"""

from transformers import (
    CLIPImageProcessorPil,
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    SiglipImageProcessorPil,
)

# The resolution and colours a tower was trained with, where it comes without a preprocessor_config.json.
_DEFAULTS = {"clip_vision_model": CLIPImageProcessorPil, "siglip_vision_model": SiglipImageProcessorPil}


def build_image_processor(
    vision_config,
    image_aspect_ratio: str = "square",
    tower_name: str | None = None,
    *,
    image_grid_pinpoints: list[list[int]] | None = None,
):
    """
    Args:
        vision_config: configuration of a CLIP or SigLIP tower; gives the resolution.
        image_aspect_ratio (`"square"`, `"pad"` or `"anyres"`): resize and centre-crop; pad with the mean colour first;
            or cut the picture, fitted into the best of `image_grid_pinpoints`, into crops, after the whole squeezed
            into a square. Source: haotian-liu/LLaVA, `process_images`, `expand2square` and `process_anyres_image`.
        tower_name (`str`, *optional*): folder or Hub id whose preprocessor_config.json gives colours and resampling.
        image_grid_pinpoints (`list[list[int]]`): `[height, width]` of the sizes to choose from, for `anyres`.

    Raises:
        ValueError: for a tower kind without known colours, or an unknown aspect ratio rule.
    """
    if image_aspect_ratio not in ("square", "pad", "anyres"):
        raise ValueError(f"unknown image_aspect_ratio {image_aspect_ratio!r}: use 'square', 'pad' or 'anyres'.")
    tower = _tower_processor(vision_config, tower_name)
    edge = vision_config.image_size
    crops = bool(getattr(tower, "do_center_crop", False))
    settings = {
        "do_resize": True,
        "size": {"shortest_edge": edge} if crops else {"height": edge, "width": edge},
        "resample": tower.resample,
        "do_center_crop": crops,
        "crop_size": {"height": edge, "width": edge},
        "do_rescale": True,
        "rescale_factor": tower.rescale_factor,
        "do_normalize": True,
        "image_mean": list(tower.image_mean),
        "image_std": list(tower.image_std),
        "do_convert_rgb": True,
    }
    if image_aspect_ratio == "anyres":
        if not image_grid_pinpoints:
            raise ValueError("image_aspect_ratio 'anyres' needs image_grid_pinpoints, the sizes to choose from.")
        return LlavaNextImageProcessorPil(
            image_grid_pinpoints=[list(size) for size in image_grid_pinpoints], **settings
        )
    return LlavaImageProcessorPil(do_pad=image_aspect_ratio == "pad", **settings)


def _tower_processor(vision_config, tower_name):
    if vision_config.model_type not in _DEFAULTS:
        raise ValueError(
            f"a vision tower of type {vision_config.model_type!r} is none of the kinds this package knows: "
            f"{', '.join(_DEFAULTS)}."
        )
    # Not AutoImageProcessor: that of transformers 5.17 demands torchvision even for the PIL backend.
    kind = _DEFAULTS[vision_config.model_type]
    if tower_name is not None:
        try:
            return kind.from_pretrained(tower_name)
        except OSError:
            pass  # a tower folder may hold no preprocessor_config.json: its kind then tells
    return kind()
