"""Pictures become the very numbers the original's became: no tolerance anywhere in this file."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPVisionConfig, Dinov2Config, SiglipVisionConfig

from hf_llava_ft.processing.image_processing_llava import build_image_processor
from hf_llava_ft.processing.picture_opening_llava import as_rgb

GOLDEN = Path(__file__).parents[1] / "golden"
PIXELS = np.load(GOLDEN / "b_images" / "pixels_train_56.npz")
# The original mistook the axes of this one, which is 5 wide and 3 high.
MISTAKEN = "tiny_5x3|square"

EDGE = 56
CLIP = CLIPVisionConfig(image_size=EDGE, patch_size=14)
SIGLIP = SiglipVisionConfig(image_size=EDGE, patch_size=14)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)


def pixels(processor, image) -> np.ndarray:
    return processor([image], return_tensors="np")["pixel_values"][0]


def opaque(image: Image.Image) -> Image.Image:
    """In RGB, with what was transparent left as its colour: as the original opens a picture."""
    image = image.convert("RGB")
    # Pillow keeps the colour that a palette marks as transparent, and transformers would lay it over white.
    image.info.pop("transparency", None)
    return image


def picture(mode: str, width: int, height: int) -> Image.Image:
    """Noise, with every value of every channel."""
    channels = 4 if mode == "RGBA" else 3
    noise = np.random.default_rng(width * height).integers(0, 256, (height, width, channels), dtype=np.uint8)
    image = Image.fromarray(noise, "RGBA" if mode == "RGBA" else "RGB")
    return image.quantize(64) if mode == "P" else image.convert(mode)


def expand_to_square(image: Image.Image, mean) -> Image.Image:
    width, height = image.size
    edge = max(width, height)
    square = Image.new("RGB", (edge, edge), tuple(int(value * 255) for value in mean))
    square.paste(image, ((edge - width) // 2, (edge - height) // 2))
    return square


def reference(image: Image.Image, aspect_ratio: str, mean=CLIP_MEAN, std=CLIP_STD, crops: bool = True) -> np.ndarray:
    """Plainly: square, bicubic to the edge, middle, then floats in float32."""
    if aspect_ratio == "pad":
        image = expand_to_square(image, mean)
    width, height = image.size
    if crops:
        scale = EDGE / min(width, height)
        width, height = [EDGE if side == min(width, height) else int(side * scale) for side in (width, height)]
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - EDGE) // 2, (height - EDGE) // 2
        image = image.crop((left, top, left + EDGE, top + EDGE))
    else:
        image = image.resize((EDGE, EDGE), Image.Resampling.BICUBIC)
    values = (np.asarray(image).astype(np.float64) * (1 / 255)).astype(np.float32)
    values = (values - np.array(mean, dtype=np.float32)) / np.array(std, dtype=np.float32)
    return values.transpose(2, 0, 1)


@pytest.mark.parametrize("name", sorted(set(PIXELS.files) - {MISTAKEN}))
def test_pixels_are_the_originals(name):
    stem, aspect_ratio = name.split("|")
    processor = build_image_processor(CLIP, aspect_ratio, str(GOLDEN / "tiny-clip"))
    with Image.open(GOLDEN / "b_images" / "png" / f"{stem}.png") as image:
        ours = pixels(processor, opaque(image))
    assert ours.dtype == np.float32
    assert np.array_equal(ours, PIXELS[name])


def test_of_every_picture_both_shapes_are_compared():
    stems = {path.stem for path in (GOLDEN / "b_images" / "png").glob("*.png")}
    names = {f"{stem}|{aspect_ratio}" for stem in stems for aspect_ratio in ("pad", "square")}
    # The original fails on a picture one pixel high.
    assert len(stems) == 17 and names - set(PIXELS.files) == {"thin_h1|square"}


@pytest.mark.parametrize("stem", ["thin_h1", "tiny_5x3"])
def test_where_the_original_errs_small_pictures_are_like_any_other(stem):
    with Image.open(GOLDEN / "b_images" / "png" / f"{stem}.png") as image:
        ours = pixels(build_image_processor(CLIP, "square"), image)
        assert np.array_equal(ours, reference(image.convert("RGB"), "square"))
    assert stem != "tiny_5x3" or not np.array_equal(ours, PIXELS[MISTAKEN])


@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK"])
@pytest.mark.parametrize("width, height", [(150, 60), (61, 133), (96, 96), (56, 56), (30, 17)])
def test_pixels_are_those_of_the_plain_computation(aspect_ratio, mode, width, height):
    image = picture(mode, width, height)
    ours = pixels(build_image_processor(CLIP, aspect_ratio), image)
    assert np.array_equal(ours, reference(image.convert("RGB"), aspect_ratio))


def test_a_transparent_colour_is_dropped_as_the_original_drops_it():
    with Image.open(GOLDEN / "b_images" / "png" / "palette_trns.png") as image:
        opened = as_rgb(image)
        # What newer transformers read it from, and paint the colour white.
        assert "transparency" in image.convert("RGB").info and "transparency" not in opened.info
    assert np.array_equal(pixels(build_image_processor(CLIP, "pad"), opened), PIXELS["palette_trns|pad"])


@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
@pytest.mark.parametrize("width, height", [(150, 60), (61, 133)])
def test_siglip_is_stretched_rather_than_cropped_and_has_its_own_colours(aspect_ratio, width, height):
    image = picture("RGB", width, height)
    ours = pixels(build_image_processor(SIGLIP, aspect_ratio), image)
    assert np.array_equal(ours, reference(image, aspect_ratio, SIGLIP_MEAN, SIGLIP_STD, crops=False))


def test_the_margin_is_the_mean_colour_which_becomes_nearly_zero():
    ours = pixels(build_image_processor(CLIP, "pad"), Image.new("RGB", (112, 28), "white"))
    assert np.abs(ours[:, :14]).max() < 1 / 255 / min(CLIP_STD)  # int() takes off less than a level
    assert ours[:, 28].min() > 1


def test_pad_and_square_differ_unless_the_picture_is_square():
    pad, square = build_image_processor(CLIP, "pad"), build_image_processor(CLIP, "square")
    wide, even = picture("RGB", 150, 60), picture("RGB", 96, 96)
    assert not np.array_equal(pixels(pad, wide), pixels(square, wide))
    assert np.array_equal(pixels(pad, even), pixels(square, even))


def test_the_towers_own_preprocessing_is_used_and_its_kinds_where_it_has_none(tmp_path):
    image = picture("RGB", 150, 60)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    settings = json.loads((GOLDEN / "tiny-clip" / "preprocessor_config.json").read_text())
    nothing, own = tmp_path / "nothing", tmp_path / "own"
    for folder in (nothing, own):
        folder.mkdir()
        (folder / "config.json").write_text((GOLDEN / "tiny-clip" / "config.json").read_text())
    (own / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": mean, "image_std": std}))
    with_own = pixels(build_image_processor(CLIP, "pad", str(own)), image)
    assert np.array_equal(with_own, reference(image, "pad", mean, std))
    without = pixels(build_image_processor(CLIP, "pad", str(nothing)), image)
    assert np.array_equal(without, reference(image, "pad"))


def test_the_resolution_is_the_towers():
    config = CLIPVisionConfig(image_size=28, patch_size=14)
    # tiny-clip's own preprocessing says 56, but its positions would not fit.
    assert pixels(build_image_processor(config, "pad", str(GOLDEN / "tiny-clip")), picture("RGB", 9, 5)).shape[1:] == (
        28,
        28,
    )


def test_what_is_not_known_is_refused():
    with pytest.raises(ValueError, match="'stretch': use 'square', 'pad' or 'anyres'"):
        build_image_processor(CLIP, "stretch")
    with pytest.raises(ValueError, match="type 'dinov2' is none of the kinds this package knows"):
        build_image_processor(Dinov2Config(image_size=EDGE))
