"""LLaVA-1.6: the pixels of the crops are the original's, and so many placeholders as its model has features."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPVisionConfig, SiglipVisionConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.llava.processing_llava import LlavaProcessor as NativeLlavaProcessor
from transformers.models.llava_next.modeling_llava_next import select_best_resolution, unpad_image
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor as NativeLlavaNextProcessor

from hf_llava_ft.processing.image_processing_llava import build_image_processor
from hf_llava_ft.processing.picture_opening_llava import as_rgb
from hf_llava_ft.processing.processing_llava import LlavaNextProcessor, LlavaProcessor

GOLDEN = Path(__file__).parents[1] / "golden"
ANYRES = json.loads((GOLDEN / "b_images/anyres.json").read_text())
# (width, height) in the original, as a checkpoint's config.json has them.
ORIGINAL_PINPOINTS = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]


def pinpoints(edge: int) -> list[list[int]]:
    return [[height * edge, width * edge] for width, height in ORIGINAL_PINPOINTS]


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def messages(*questions: int) -> list[dict]:
    """A conversation with so many pictures in each question."""
    turns = []
    for count in questions:
        text = {"type": "text", "text": "\nWhat is it?"}
        turns.append({"role": "user", "content": [{"type": "image", "text": None}] * count + [text]})
        turns.append({"role": "assistant", "content": [{"type": "text", "text": "A cat."}]})
    return turns


@pytest.fixture
def build(tokenizer_for, vision_config):
    """`build(**settings)`: a processor of crops of 56 x 56."""

    def built(vision=vision_config, **settings) -> LlavaNextProcessor:
        sizes = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": pinpoints(56)}
        processor = LlavaProcessor.build(tokenizer_for("llama"), vision, **sizes, **settings)
        assert isinstance(processor, LlavaNextProcessor)
        return processor

    return built


@pytest.fixture
def processor(build) -> LlavaNextProcessor:
    return build(version="v1")


def plain_crops(image: Image.Image, edge: int) -> np.ndarray:
    """`float32[crops, 3, edge, edge]` as the original makes them, with Pillow alone."""
    width, height = image.size
    rows, columns = select_best_resolution((height, width), pinpoints(edge))
    scale = min(columns / width, rows / height)
    fitted = [min(math.ceil(side * scale), most) for side, most in ((width, columns), (height, rows))]
    canvas = Image.new("RGB", (columns, rows))
    corner = ((columns - fitted[0]) // 2, (rows - fitted[1]) // 2)
    canvas.paste(image.resize(fitted, Image.Resampling.BICUBIC), corner)
    boxes = [(x, y, x + edge, y + edge) for y in range(0, rows, edge) for x in range(0, columns, edge)]
    crops = [image.resize((edge, edge), Image.Resampling.BICUBIC), *(canvas.crop(box) for box in boxes)]
    levels = np.stack([np.asarray(crop) for crop in crops])
    values = (levels.astype(np.float64) * (1 / 255)).astype(np.float32)
    values = (values - np.array(OPENAI_CLIP_MEAN, np.float32)) / np.array(OPENAI_CLIP_STD, np.float32)
    return values.transpose(0, 3, 1, 2)


@pytest.mark.parametrize("name", sorted(ANYRES["pixels_sha256"]))
def test_the_crops_are_the_originals(name):
    stem, edge = name.split("|")
    config = CLIPVisionConfig(image_size=int(edge), patch_size=14)
    built = build_image_processor(config, "anyres", image_grid_pinpoints=pinpoints(int(edge)))
    with Image.open(GOLDEN / f"b_images/png/{stem}.png") as opened:
        image = as_rgb(opened)
    crops = np.ascontiguousarray(built([image], return_tensors="np")["pixel_values"][0])
    assert crops.dtype == np.float32
    assert np.array_equal(crops, plain_crops(image, int(edge)))
    # Recorded with Pillow 13. An older one may take the two passes of a resize in the other order, and so round
    # otherwise, where height and width change by different factors.
    if int(PIL.__version__.split(".")[0]) >= 13:
        assert hashlib.sha256(crops.tobytes()).hexdigest() == ANYRES["pixels_sha256"][name]


def test_the_grid_and_the_padding_that_is_cut_away_are_the_originals():
    untransposed = 0
    for (width, height), sizes, chosen in ANYRES["select_best_resolution"]:
        ours = select_best_resolution((height, width), [[h, w] for w, h in sizes])
        assert list(ours) == chosen[::-1]
        # Negative control: with the original's (width, height) as they stand, another size is chosen for some.
        untransposed += list(select_best_resolution((height, width), sizes)) != chosen[::-1]
    assert untransposed
    for (width, height), before, after, first in ANYRES["unpad_image"]:
        plane = torch.arange(before[0] * before[1]).view(1, *before)
        found = unpad_image(plane, (height, width))
        assert list(found.shape[1:]) == after
        assert first is None or found.flatten()[0] == first


@pytest.mark.parametrize("size", [(150, 60), (45, 130), (96, 96), (56, 56), (1, 90), (90, 1), (3, 5), (400, 401)])
def test_ids_are_those_of_transformers_own_processor(processor, tmp_path, size):
    processor.save_pretrained(tmp_path)
    native = AutoProcessor.from_pretrained(tmp_path)
    assert type(native) is NativeLlavaNextProcessor
    prompt = [messages(1)[0]]
    text = native.apply_chat_template(prompt, add_generation_prompt=True)
    theirs = native(text=[text], images=[picture(*size)], return_tensors="pt")
    ours = processor(text=[text], images=[picture(*size)], return_tensors="pt")
    for name in ("input_ids", "pixel_values", "image_sizes"):
        assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])), name
    row = processor.encode_conversation(messages(1), [picture(*size)])
    count = (theirs["input_ids"] == native.image_token_id).sum()
    assert (row["input_ids"] == processor.image_token_id).sum() == count
    assert torch.equal(row["pixel_values"], theirs["pixel_values"][0])
    assert row["image_sizes"].tolist() == [[size[1], size[0]]]


def test_several_pictures_take_as_many_places_as_each_needs(processor):
    sizes = [(150, 60), (45, 130), (96, 96)]
    row = processor.encode_conversation(messages(2, 1), [picture(*size) for size in sizes])
    counts = [processor.num_image_tokens_at(height, width) for width, height in sizes]
    assert len(set(counts)) > 1
    assert (row["input_ids"] == processor.image_token_id).sum() == sum(counts)
    hw = [(height, width) for width, height in sizes]
    assert processor.num_tokens(messages(2, 1), hw) == len(row["input_ids"])
    assert processor.num_tokens(messages(2, 1), hw[:1] * 3) != len(row["input_ids"])
    assert not (row["labels"] == processor.image_token_id).any()
    with pytest.raises(AttributeError, match="num_image_tokens_at"):
        _ = processor.num_image_tokens


def test_a_batch_holds_the_crops_one_after_the_other(processor):
    rows = [
        processor.encode_conversation(messages(1), [picture(150, 60)]),
        processor.encode_conversation(
            [
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Yo"}]},
            ]
        ),
        processor.encode_conversation(messages(2), [picture(45, 130), picture(56, 56)]),
    ]
    batch = processor.pad(rows)
    assert torch.equal(batch["pixel_values"], torch.cat([rows[0]["pixel_values"], rows[2]["pixel_values"]]))
    assert batch["image_sizes"].tolist() == [[60, 150], [130, 45], [56, 56]]


@pytest.mark.parametrize("merge_type", ["flat", "spatial", "spatial_unpad"])
def test_placeholders_follow_the_merge_type(build, tmp_path, merge_type):
    built = build(patch_merge_type=merge_type)
    # 150 x 60 fills 140 x 56 of 168 x 56. Of three tiles side by side, with 4 rows of 12 features, 10 are picture.
    expected = {"flat": 4 * 16, "spatial": 4 * 16, "spatial_unpad": 16 + 4 * (10 + 1)}[merge_type]
    assert built.num_image_tokens_at(60, 150) == expected
    built.save_pretrained(tmp_path)
    again = LlavaProcessor.from_pretrained(tmp_path)
    assert isinstance(again, LlavaNextProcessor) and again.num_image_tokens_at(60, 150) == expected


def test_siglip_has_no_class_token_to_drop(build):
    built = build(SiglipVisionConfig(image_size=56, patch_size=14), patch_merge_type="flat")
    row = built.encode_conversation(messages(1), [picture(56, 112)])
    assert (row["input_ids"] == built.image_token_id).sum() == 3 * 16
    assert row["pixel_values"].shape == (3, 3, 56, 56)


def test_anyres_without_sizes_to_choose_from_is_refused(tokenizer_for, vision_config):
    with pytest.raises(ValueError, match="needs image_grid_pinpoints"):
        LlavaProcessor.build(tokenizer_for("llama"), vision_config, image_aspect_ratio="anyres")


PICTURES = [(150, 60), (45, 130), (96, 96), (56, 56), (1, 90), (90, 1), (3, 5), (400, 401), (57, 56), (640, 30)]


def placeholders_of(processor, sizes, **settings) -> list[int]:
    """How many placeholders a call really makes, picture by picture."""
    texts = [processor.image_token + " here"] * len(sizes)
    ids = processor(text=texts, images=[[picture(*size)] for size in sizes], padding=True, **settings)["input_ids"]
    return [row.count(processor.image_token_id) for row in map(list, ids)]


@pytest.mark.parametrize("merge_type", ["flat", "spatial", "spatial_unpad"])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_vllm_is_told_as_many_placeholders_as_a_call_makes(build, merge_type, strategy):
    built = build(patch_merge_type=merge_type, vision_feature_select_strategy=strategy)
    told = built._get_num_multimodal_tokens(image_sizes=[(height, width) for width, height in PICTURES])
    assert told["num_image_tokens"] == placeholders_of(built, PICTURES)
    assert told["num_image_patches"] == [1] * len(PICTURES)
    assert len(set(told["num_image_tokens"])) > 1
    # Negative control: LLaVA-1.5's count, which transformers' method gives on this class, is another.
    one_size = NativeLlavaProcessor._get_num_multimodal_tokens(built, image_sizes=[(60, 150)])
    assert one_size["num_image_tokens"] != told["num_image_tokens"][:1]
    assert built._get_num_multimodal_tokens()["num_image_tokens"] is None


@pytest.mark.parametrize("settings", [{}, {"size": {"height": 28, "width": 28}, "do_center_crop": False}])
@pytest.mark.parametrize("aspect_ratio", ["square", "pad", "anyres"])
def test_vllm_is_told_the_placeholders_of_a_call_with_other_settings(
    tokenizer_for, vision_config, aspect_ratio, settings
):
    sizes = {"image_grid_pinpoints": pinpoints(56)} if aspect_ratio == "anyres" else {}
    built = LlavaProcessor.build(tokenizer_for("llama"), vision_config, image_aspect_ratio=aspect_ratio, **sizes)
    hw = [(height, width) for width, height in PICTURES]
    told = built._get_num_multimodal_tokens(image_sizes=hw, **settings)["num_image_tokens"]
    assert told == placeholders_of(built, PICTURES, **settings)
    nested = built._get_num_multimodal_tokens(image_sizes=hw, images_kwargs=settings)["num_image_tokens"]
    assert nested == told
    if settings:
        assert told != built._get_num_multimodal_tokens(image_sizes=hw)["num_image_tokens"]


def test_vllm_is_told_what_transformers_own_processor_tells(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    native = AutoProcessor.from_pretrained(tmp_path)
    hw = [(height, width) for width, height in PICTURES]
    assert processor._get_num_multimodal_tokens(image_sizes=hw) == native._get_num_multimodal_tokens(image_sizes=hw)
