"""Cutting a row: exactly the original's prefix, never through an image, never without something to learn."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.processing.truncation_llava import CannotTruncate, num_kept

SIZES = [(56, 56), (150, 60), (60, 200)]  # (width, height)


@pytest.fixture(params=["pad", "anyres"])
def processor(request, tokenizer_for, vision_config):
    pinpoints = {"image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]]} if request.param == "anyres" else {}
    return LlavaProcessor.build(
        tokenizer_for("llama"), vision_config, version="v1", image_aspect_ratio=request.param, **pinpoints
    )


def conversation():
    """Three turns with a picture each."""
    messages = []
    for index in range(3):
        question = [{"type": "image", "text": None}, {"type": "text", "text": f"\nWhat is number {index}?"}]
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": f"It is the number {index}."}]})
    pictures = [Image.new("RGB", size, (80 * index, 90, 10)) for index, size in enumerate(SIZES)]
    return messages, pictures


def test_every_cut_is_a_prefix_with_its_own_pictures_or_refused(processor):
    messages, pictures = conversation()
    whole = processor.encode_conversation(messages, pictures)
    ids, labels = whole["input_ids"], whole["labels"]
    is_image = ids == processor.image_token_id
    learned = (labels != -100).nonzero().flatten()
    following = torch.cat([is_image[1:], torch.tensor([False])])
    ends = ((is_image & ~following).nonzero().flatten() + 1).tolist()
    assert len(ends) == 3
    num_cut, reasons = 0, set()
    for length in range(1, len(ids) + 3):
        inside = length < len(ids) and bool(is_image[length - 1]) and bool(is_image[length])
        try:
            cut = processor.encode_conversation(messages, pictures, max_length=length)
        except CannotTruncate as error:
            reasons.add(str(error))
            assert inside or learned[0] >= length, length
            continue
        assert not inside and learned[0] < length
        num_cut += 1
        assert torch.equal(cut["input_ids"], ids[:length]) and torch.equal(cut["labels"], labels[:length])
        assert cut["attention_mask"].tolist() == [1] * min(length, len(ids))
        left = sum(end <= length for end in ends)
        # Pixels of the pictures that are left, and of no other: the model counts them against the placeholders.
        alone = processor.encode_images(pictures[:left])
        assert torch.equal(cut["pixel_values"], alone["pixel_values"])
        assert sum(processor.num_placeholders(alone)) == (cut["input_ids"] == processor.image_token_id).sum()
    assert num_cut > 20
    assert reasons == {"the cut would go through an image", "the cut would leave nothing to learn"}


def test_without_a_limit_nothing_is_cut(processor):
    messages, pictures = conversation()
    whole = processor.encode_conversation(messages, pictures)
    for limit in (None, len(whole["input_ids"]), 10_000):
        again = processor.encode_conversation(messages, pictures, max_length=limit)
        assert again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("limit", "kept"), [(2, 2), (3, None), (6, None), (7, 3), (8, 4), (9, 5), (12, None), (13, 6), (14, 7), (99, 7)]
)
def test_by_hand(limit, kept):
    # Two words, an image of 5, a word, an answer, an image of 4, an answer.
    ids = np.array([5, 6, 9, 7, 8, 9, 8])
    supervised = np.array([True, False, False, False, True, False, True])
    if kept is None:
        with pytest.raises(CannotTruncate, match="through an image"):
            num_kept(ids, supervised, 9, [5, 4], limit)
    else:
        assert num_kept(ids, supervised, 9, [5, 4], limit) == kept


def test_nothing_to_learn_in_front_of_the_cut():
    ids, supervised = np.arange(10), np.arange(10) >= 6
    assert num_kept(ids, supervised, 99, [], 7) == 7
    with pytest.raises(CannotTruncate, match="nothing to learn"):
        num_kept(ids, supervised, 99, [], 6)
