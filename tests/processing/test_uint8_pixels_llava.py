"""uint8 and floats afterwards are what the image processor gives by itself: no tolerance where none is said."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPVisionConfig, SiglipImageProcessorPil, SiglipVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from hf_llava_ft.processing import uint8_pixels_llava
from hf_llava_ft.processing.image_processing_llava import build_image_processor
from hf_llava_ft.processing.picture_opening_llava import as_rgb
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.processing.uint8_pixels_llava import can_hand_over_uint8, normalize_pixels, uint8_images
from tests.examples import examples

GOLDEN = Path(__file__).parents[1] / "golden"
PHOTOS = sorted((Path(__file__).parents[2] / "hf_llava_ft" / "quickstart" / "photographs").glob("*.jpg"))
MODES = ["L", "RGBA", "LA", "CMYK", "1", "P"]
ORIGINALS = np.load(GOLDEN / "b_images" / "pixels_train_56.npz")
EDGE = 56
CLIP = CLIPVisionConfig(image_size=EDGE, patch_size=14)
SIGLIP = SiglipVisionConfig(image_size=EDGE, patch_size=14)


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(-1) if channels == 1 else values, mode)


def floats(processor, image) -> torch.Tensor:
    return processor([image], return_tensors="pt")["pixel_values"]


def handed_over(processor, image) -> torch.Tensor:
    """The floats that arrive by way of uint8."""
    pixels = uint8_images(processor, [image], return_tensors="pt")["pixel_values"]
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
    normalised = normalize_pixels(processor, pixels)
    assert normalised.dtype == torch.float32 and normalised.is_contiguous()
    return normalised


@pytest.fixture
def shortcut_alone(monkeypatch):
    """Every call of an image processor fails."""

    def refuse(*args, **kwargs):
        raise AssertionError("the image processor was asked")

    for kind in (LlavaImageProcessorPil, CLIPImageProcessorPil, SiglipImageProcessorPil):
        monkeypatch.setattr(kind, "preprocess", refuse)


# ---------------------------------------------------------------------- the pictures


@pytest.mark.parametrize("vision_config", [CLIP, SIGLIP], ids=["clip", "siglip"])
@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
@examples(60)
@given(width=st.integers(1, 300), height=st.integers(1, 300), mode=st.sampled_from(["RGB", *MODES]))
def test_pictures_of_any_shape_and_mode(vision_config, aspect_ratio, width, height, mode):
    processor, image = build_image_processor(vision_config, aspect_ratio), noise(width, height).convert(mode)
    assert torch.equal(handed_over(processor, image), floats(processor, image))


def test_there_are_photographs():
    assert len(PHOTOS) == 5


@pytest.mark.parametrize("photo", PHOTOS, ids=lambda path: path.stem)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
def test_photographs_at_the_size_they_are_trained_at(photo, turned, aspect_ratio):
    processor = build_image_processor(CLIPVisionConfig(image_size=336, patch_size=14), aspect_ratio)
    with Image.open(photo) as opened:
        image = as_rgb(opened)
    if turned:
        image = image.transpose(Image.Transpose.ROTATE_90)
    assert torch.equal(handed_over(processor, image), floats(processor, image))


@pytest.mark.parametrize("name", sorted(set(ORIGINALS.files) - {"tiny_5x3|square"}))
def test_pixels_are_the_originals(name):
    stem, aspect_ratio = name.split("|")
    processor = build_image_processor(CLIP, aspect_ratio, str(GOLDEN / "tiny-clip"))
    with Image.open(GOLDEN / "b_images" / "png" / f"{stem}.png") as opened:
        ours = handed_over(processor, as_rgb(opened))
    assert np.array_equal(ours[0].numpy(), ORIGINALS[name])


@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_rgb_is_left_to_the_image_processor(aspect_ratio, mode):
    processor, image = build_image_processor(CLIP, aspect_ratio), noise(90, 61).convert(mode)
    assert torch.equal(handed_over(processor, image), floats(processor, image))
    # Among others, and also of RGB with a transparent colour, which transformers paints white.
    keyed = noise(61, 90)
    keyed.info["transparency"] = keyed.getpixel((0, 0))
    images = [noise(70, 90), image, keyed]
    pixels = uint8_images(processor, images, return_tensors="pt")["pixel_values"]
    assert torch.equal(normalize_pixels(processor, pixels), processor(images, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("vision_config", [CLIP, SIGLIP], ids=["clip", "siglip"])
@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
def test_rgb_pictures_take_the_shortcut(vision_config, aspect_ratio, shortcut_alone):
    processor = build_image_processor(vision_config, aspect_ratio)
    images = [noise(90, 61), noise(61, 90), noise(80, 80)]
    pixels = uint8_images(processor, images, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (3, 3, EDGE, EDGE)
    with pytest.raises(AssertionError, match="the image processor was asked"):
        uint8_images(processor, [*images, noise(9, 9, "RGBA")], return_tensors="pt")


def test_the_comparison_tells_padding_before_resizing_from_padding_after(shortcut_alone):
    """A control: with margins added after both passes the edges of the picture are not the same."""
    image, colour = noise(150, 60), (122, 116, 104)
    ours = uint8_images(build_image_processor(CLIP, "pad"), [image], return_tensors="pt")["pixel_values"][0]
    after = Image.new("RGB", (EDGE, EDGE), colour)
    after.paste(image.resize((EDGE, round(EDGE * 60 / 150)), Image.Resampling.BICUBIC), (0, 17))
    assert not np.array_equal(ours.permute(1, 2, 0).numpy(), np.asarray(after))


@pytest.mark.parametrize("size", [(90, 61), (61, 90), (300, 200)])
def test_where_pillow_resizes_columns_first_the_margins_are_added_before(size, monkeypatch):
    processor, image = build_image_processor(CLIP, "pad"), noise(*size)
    monkeypatch.setattr(uint8_pixels_llava, "_rows_come_first", lambda: False)
    assert torch.equal(handed_over(processor, image), floats(processor, image))


def test_which_pass_comes_first_is_seen(monkeypatch):
    """A control: with columns first the numbers are others, and the question is answered so."""
    resize = Image.Image.resize

    def columns_first(self, size, resample):
        return resize(resize(self, (self.width, size[1]), resample), size, resample)

    assert uint8_pixels_llava._rows_come_first()
    monkeypatch.setattr(Image.Image, "resize", columns_first)
    assert not uint8_pixels_llava._rows_come_first.__wrapped__()


@pytest.mark.parametrize("size", [(20_000, 10), (10, 20_000)])
def test_a_very_long_picture_never_becomes_a_square_of_its_length(size, monkeypatch):
    areas = []
    new = Image.new
    monkeypatch.setattr(
        Image, "new", lambda mode, size, *more: areas.append(size[0] * size[1]) or new(mode, size, *more)
    )
    pixels = uint8_images(build_image_processor(CLIP, "pad"), [noise(*size)], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, EDGE, EDGE) and areas and max(areas) <= 20_000 * 128


@pytest.mark.parametrize(
    "changed",
    [
        {"do_resize": False, "size": None},
        {"resample": Image.Resampling.NEAREST},
        {"resample": Image.Resampling.LANCZOS},
        {"resample": Image.Resampling.BOX},
        {"size": {"shortest_edge": 30}},  # smaller than what is cut from its middle
        {"size": {"shortest_edge": 70}},
        {"size": {"shortest_edge": 56, "longest_edge": 80}},
        {"size": {"height": 70, "width": 100}},
        {"crop_size": {"height": 31, "width": 44}},
        {"do_center_crop": False, "size": {"height": 57, "width": 43}},
        {"image_mean": [0.0, 0.5, 1.0]},
    ],
    ids=str,
)
@pytest.mark.parametrize("do_pad", [True, False])
@pytest.mark.parametrize("size", [(90, 61), (61, 90), (300, 200)])
def test_other_settings(changed, do_pad, size):
    plain = {"size": {"shortest_edge": EDGE}, "crop_size": {"height": EDGE, "width": EDGE}}
    processor = LlavaImageProcessorPil(**{**plain, "do_pad": do_pad, **changed})
    assert torch.equal(handed_over(processor, noise(*size)), floats(processor, noise(*size)))


@pytest.mark.parametrize("kind", [CLIPImageProcessorPil, SiglipImageProcessorPil])
def test_the_towers_own_processors(kind):
    assert can_hand_over_uint8(kind())
    assert torch.equal(handed_over(kind(), noise(300, 200)), floats(kind(), noise(300, 200)))


def test_crops_of_anyres():
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": EDGE},
        crop_size={"height": EDGE, "width": EDGE},
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
    )
    assert can_hand_over_uint8(processor)
    images = [noise(100, 40), noise(100, 100)]
    ours, theirs = uint8_images(processor, images, return_tensors="pt"), processor(images, return_tensors="pt")
    assert ours["pixel_values"].dtype == torch.uint8 and ours["pixel_values"].shape == (2, 5, 3, EDGE, EDGE)
    assert torch.equal(ours["image_sizes"], theirs["image_sizes"])
    normalised = normalize_pixels(processor, ours["pixel_values"])
    assert torch.equal(normalised[0, :3], theirs["pixel_values"][0, :3])  # the rest is fill
    assert torch.equal(normalised[1], theirs["pixel_values"][1])


def test_a_conversation_with_crops_of_anyres(tokenizer_for, vision_config):
    processor = LlavaProcessor.build(
        tokenizer_for("legacy"),
        vision_config,
        version="v1",
        image_aspect_ratio="anyres",
        image_grid_pinpoints=[[56, 112]],
    )
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    images = [noise(100, 40), noise(30, 60)]
    theirs = processor.encode_conversation(messages, images)
    ours = processor.encode_conversation(messages, images, uint8_pixels=True)
    assert ours["pixel_values"].dtype == torch.uint8 and theirs["pixel_values"].dtype == torch.float32
    ours["pixel_values"] = normalize_pixels(processor.image_processor, ours["pixel_values"])
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ---------------------------------------------------------------------- the floats


LEVELS = torch.arange(256, dtype=torch.uint8).view(1, 1, 256).expand(3, 2, 256).contiguous()


def by_the_processor(processor, levels: torch.Tensor) -> torch.Tensor:
    array = levels.numpy()
    if processor.do_rescale:
        array = processor.rescale(array, processor.rescale_factor)
    if processor.do_normalize:
        array = processor.normalize(array, processor.image_mean, processor.image_std)
    return torch.from_numpy(np.ascontiguousarray(array))


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"rescale_factor": 1 / 127.5},
        {"rescale_factor": 0.0123},
        {"do_normalize": False},
        {"do_rescale": False},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.2, 0.1]},
        {"image_mean": 0.5, "image_std": 0.25},
    ],
    ids=str,
)
def test_every_level_of_every_channel(changed):
    processor = LlavaImageProcessorPil(**changed)
    expected = by_the_processor(processor, LEVELS)
    ours = normalize_pixels(processor, LEVELS)
    assert torch.equal(ours, expected)
    assert torch.equal(ours.bfloat16(), expected.bfloat16())
    # However many dimensions are in front, and whatever the strides.
    assert torch.equal(normalize_pixels(processor, LEVELS.expand(2, 5, -1, -1, -1))[1, 4], expected)
    channels_last = LEVELS[None].contiguous(memory_format=torch.channels_last)
    assert torch.equal(normalize_pixels(processor, channels_last)[0], expected)


def test_the_comparison_tells_a_fused_multiplication_from_the_processors_steps():
    """A control: x * scale + shift in float32 is off by less than 4.8e-7, and `torch.equal` sees it."""
    processor = LlavaImageProcessorPil()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    fused = LEVELS.float() * (1 / (255 * std)) - mean / std
    exact = normalize_pixels(processor, LEVELS)
    assert not torch.equal(fused, exact)
    assert (fused - exact).abs().max() <= 4.8e-7
    swapped = LEVELS.flip(0)
    swapped[0] = 7
    assert not torch.equal(normalize_pixels(processor, swapped), exact)


# ---------------------------------------------------------------------- which processors


class Tinted(LlavaImageProcessorPil):
    """A subclass may do anything after the crop."""

    def normalize(self, image, mean, std, **kwargs):
        return super().normalize(image, mean, std) ** 2


@pytest.mark.parametrize(
    "processor",
    [
        Tinted(),
        LlavaImageProcessorPil(do_rescale=False, do_normalize=False),
        CLIPImageProcessorPil(do_pad=True, pad_size={"height": 300, "width": 300}),
        object(),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_which_give_floats_as_ever(processor):
    assert not can_hand_over_uint8(processor)


def test_a_conversation_with_such_a_processor_has_its_floats(processor_for):
    processor = processor_for("legacy", "v1")
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    image, known = noise(90, 61), processor.image_processor
    floats_by_default = processor.encode_conversation(messages, [image])["pixel_values"]
    assert torch.equal(floats_by_default, floats(known, image))
    levels = processor.encode_conversation(messages, [image], uint8_pixels=True)["pixel_values"]
    assert levels.dtype == torch.uint8 and torch.equal(normalize_pixels(known, levels), floats_by_default)
    try:
        processor.image_processor = Tinted(
            **{key: value for key, value in known.to_dict().items() if key in vars(known)}
        )
        squared = processor.encode_conversation(messages, [image], uint8_pixels=True)["pixel_values"]
    finally:
        processor.image_processor = known
    assert squared.dtype == torch.float32 and torch.equal(squared, floats_by_default**2)
