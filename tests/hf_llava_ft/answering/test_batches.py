"""Answers in batches are those that one by one would get."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from hf_llava_ft.answering import batches
from hf_llava_ft.answering.batches import Question, answer_all, generated_ids, padded_left
from hf_llava_ft.answering.conversation import Conversation
from hf_llava_ft.answering.prompts import encode_prompt, encode_row
from hf_llava_ft.checkpoints.opening import fit_to_processor

LONG = "Please tell me in many words what it is that you see there, and why."
# Words, and the sizes of the pictures in front of them.
ASKED = [
    ("What is it?", [(60, 40)]),
    ("Say something.", []),
    (LONG, [(40, 90)]),
    ("Are they alike?", [(30, 30), (120, 30)]),
    (LONG * 3, []),
    ("So?", [(56, 56)]),
]


@pytest.fixture
def model(processor, tiny):
    fields = {}
    if processor.depends_on_image_size:
        pinpoints = [[56, 112], [112, 56]]
        fields = {
            "image_aspect_ratio": "anyres",
            "patch_merge_type": "spatial_unpad",
            "image_grid_pinpoints": pinpoints,
        }
    model = tiny.model(**fields)
    fit_to_processor(model, processor)
    return model


@pytest.fixture
def questions():
    asked = []
    for number, (words, sizes) in enumerate(ASKED):
        pictures = [Image.radial_gradient("L").resize(size).convert("RGB") for size in sizes]
        for picture in pictures:
            picture.paste((40 * number, 90, 200), (0, 0, 15, 15))
        content = [{"type": "image"}] * len(sizes) + [{"type": "text", "text": words}]
        asked.append(Question([{"role": "user", "content": content}], pictures))
    return asked


def one_by_one(model, processor, questions, **options):
    for question in questions:
        inputs = encode_prompt(model, processor, question.messages, question.images)
        ids = model.generate(**inputs, do_sample=False, **options)
        yield ids[0, inputs["input_ids"].shape[1] :].tolist()


def in_a_batch(model, processor, questions, **options):
    rows = [encode_row(processor, question.messages, question.images) for question in questions]
    return generated_ids(model, rows, processor.tokenizer.pad_token_id, do_sample=False, **options).tolist()


def test_a_batch_of_all_kinds_of_rows_gives_the_ids_of_one_by_one(model, processor, questions):
    expected = list(one_by_one(model, processor, questions, max_new_tokens=12))
    assert len({tuple(ids) for ids in expected}) == len(expected)
    found = in_a_batch(model, processor, questions, max_new_tokens=12)
    for ids, alone in zip(found, expected, strict=True):
        assert ids[: len(alone)] == alone
        assert set(ids[len(alone) :]) <= {processor.tokenizer.pad_token_id}


def to_the_right(rows, pad_token_id):
    batch = padded_left(rows, pad_token_id)
    for name in ("input_ids", "attention_mask"):
        width = batch[name].shape[1]
        fill = pad_token_id if name == "input_ids" else 0
        batch[name] = torch.stack(
            [torch.nn.functional.pad(row[name][0], (0, width - row[name].shape[1]), value=fill) for row in rows]
        )
    return batch


def without_a_mask(rows, pad_token_id):
    batch = padded_left(rows, pad_token_id)
    return batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}


def with_wrong_positions(rows, pad_token_id):
    batch = padded_left(rows, pad_token_id)
    return batch | {"position_ids": 2 * torch.arange(batch["input_ids"].shape[1]).expand(len(rows), -1)}


@pytest.mark.parametrize("wrongly", [to_the_right, without_a_mask, with_wrong_positions])
def test_other_padding_masks_and_positions_give_other_ids(model, processor, questions, monkeypatch, wrongly):
    expected = list(one_by_one(model, processor, questions, max_new_tokens=8))
    monkeypatch.setattr(batches, "padded_left", wrongly)
    found = in_a_batch(model, processor, questions, max_new_tokens=8)
    assert any(ids[: len(alone)] != alone for ids, alone in zip(found, expected, strict=True))


def test_all_questions_are_answered_the_longest_first(model, processor, questions):
    found = list(answer_all(model, processor, questions, batch_size=4, max_new_tokens=6))
    order = [place for place, _ in found]
    lengths = [encode_row(processor, each.messages, each.images)["input_ids"].shape[1] for each in questions]
    assert sorted(order) == list(range(6))
    assert max(lengths[place] for place in order[4:]) <= min(lengths[place] for place in order[:4])
    for place, answer in found:
        words, _ = ASKED[place]
        assert answer.text == Conversation(model, processor).ask(words, questions[place].images, max_new_tokens=6)
        assert answer.finish_reason in ("stop", "length")


def test_an_answer_says_whether_it_is_finished(model, processor, questions):
    model.generation_config.eos_token_id = [1087]
    [alone] = one_by_one(model, processor, questions[:1], max_new_tokens=4)
    assert alone[2] not in alone[:2]
    model.generation_config.eos_token_id = [alone[2]]
    for longest, reason in ((4, "stop"), (3, "stop"), (2, "length")):
        [(_, answer)] = answer_all(model, processor, questions[:1], max_new_tokens=longest)
        assert answer.finish_reason == reason


def test_a_row_with_little_room_keeps_its_own_and_no_row_loses_any(model, processor, questions):
    rows = [encode_row(processor, each.messages, each.images)["input_ids"].shape[1] for each in questions]
    model.config.text_config.max_position_embeddings = max(rows) + 2
    found = dict(answer_all(model, processor, questions, max_new_tokens=5))
    rooms = [min(5, max(rows) + 2 - length) for length in rows]
    assert min(rooms) == 2 and rooms.count(5) > 1
    for place, (question, room) in enumerate(zip(questions, rooms, strict=True)):
        [alone] = one_by_one(model, processor, [question], max_new_tokens=room)
        assert found[place].text == processor.tokenizer.decode(alone, skip_special_tokens=True).strip()

    model.config.text_config.max_position_embeddings = max(rows)
    found = dict(answer_all(model, processor, questions, max_new_tokens=5))
    assert "no room for an answer" in found[rows.index(max(rows))].error
    assert [answer.finish_reason == "error" for answer in found.values()].count(True) == 1


def test_a_question_may_have_a_longest_answer_of_its_own(model, processor, questions):
    asked = [replace(question, max_new_tokens=1 + place) for place, question in enumerate(questions)]
    found = dict(answer_all(model, processor, asked))
    for place, question in enumerate(questions):
        [alone] = one_by_one(model, processor, [question], max_new_tokens=1 + place)
        assert found[place].text == processor.tokenizer.decode(alone, skip_special_tokens=True).strip()


def test_a_picture_that_does_not_decode_stops_no_other_row(model, processor, questions, tmp_path):
    (tmp_path / "half.png").write_bytes(b"\x89PNG\r\n")
    broken = Question(questions[0].messages, [{"path": str(tmp_path / "half.png"), "bytes": None}])
    found = dict(answer_all(model, processor, [questions[1], broken, questions[2]], max_new_tokens=2))
    assert found[1].finish_reason == "error" and "half.png" in found[1].error
    assert not found[0].error and not found[2].error
