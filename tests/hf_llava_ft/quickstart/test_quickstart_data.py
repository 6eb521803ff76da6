"""The quickstart's data keep the promises that the quickstart, and a small model with a minute to learn, rely on."""

import json
from pathlib import Path

import pytest
from PIL import Image

from hf_llava_ft.quickstart import photographs as quickstart_data

FOLDER = Path(quickstart_data.__file__).parent
ROWS = json.loads((FOLDER / "conversations.json").read_text(encoding="utf-8"))
TURNS = [turn for row in ROWS for turn in row["conversations"]]
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])


def answers_of(row):
    return [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"]


def test_every_photograph_has_one_row_and_every_row_its_photograph():
    assert sorted(row["image"] for row in ROWS) == sorted(path.name for path in FOLDER.glob("*.jpg"))
    assert [row["id"] for row in ROWS] == [Path(row["image"]).stem for row in ROWS]


@each_row
def test_the_photograph_opens_and_has_its_rights_noted(row):
    with Image.open(FOLDER / row["image"]) as photo:
        photo.load()
        assert photo.mode == "RGB" and max(photo.size) <= 512
        assert not photo.getexif()
    assert f"| {row['image']} |" in (FOLDER / "README.md").read_text(encoding="utf-8")


@each_row
def test_three_questions_are_asked_and_answered_in_turn(row):
    assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"] * 3


@each_row
def test_the_first_question_is_the_same_and_holds_the_only_placeholder(row):
    assert row["conversations"][0]["value"] == "<image>\nWhat is in the picture?"
    assert sum(turn["value"].count("<image>") for turn in row["conversations"]) == 1


def test_follow_up_questions_are_asked_of_one_photograph_only():
    questions = [turn["value"] for row in ROWS for turn in row["conversations"][2::2]]
    assert len(set(questions)) == len(questions) == 2 * len(ROWS)


@each_row
def test_answers_are_single_plain_short_sentences(row):
    first, *others = answers_of(row)
    assert 8 <= len(first.split()) <= 14
    assert all(3 <= len(answer.split()) <= 10 for answer in others)
    for answer in [first, *others]:
        assert answer.isascii() and answer == " ".join(answer.split())
        assert answer.endswith(".") and answer.count(".") == 1


def test_first_answers_differ_from_the_first_word_on():
    # So that a right first word already shows that the model has looked at the picture.
    assert len({answers_of(row)[0].split()[0] for row in ROWS}) == len(ROWS)
