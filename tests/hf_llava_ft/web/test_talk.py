"""What a visitor says is answered on one side or two, and kept as rows to train on."""

import pytest
from PIL import Image

from hf_llava_ft.answering.conversation import Conversation
from hf_llava_ft.answering.loading import load_for_answering
from hf_llava_ft.answering.shared_base import BASE, SharedBase
from hf_llava_ft.checkpoints.inspection import inspect_checkpoint
from hf_llava_ft.data.builder import load_llava_json
from hf_llava_ft.errors import UserError
from hf_llava_ft.web.talk import Talk

PICTURE = Image.linear_gradient("L").convert("RGB")
SHORT = {"max_new_tokens": 5}


@pytest.fixture(scope="module")
def models(adapters_of_one_base):
    first = str(adapters_of_one_base / "one")
    models = SharedBase(*load_for_answering(first, device="cpu"), inspect_checkpoint(first))
    models.add(str(adapters_of_one_base / "two"))
    return models


@pytest.fixture
def talk(models):
    return Talk(models)


def ask(talk, question, pictures=(), files=(), **generation):
    for _ in talk.ask(question, list(pictures), list(files), **(SHORT | generation)):
        pass


def texts(talk):
    return [[said.text for said in column] for column in talk.columns()]


def alone(models, name, *questions):
    conversation = Conversation(models.model, models.processor(name))
    with models.active(name):
        return [conversation.ask(question, **SHORT) for question in questions]


def test_two_sides_are_asked_the_same_and_answer_as_each_does_alone(talk, models):
    talk.choose("one", "two")
    ask(talk, "Hello")
    ask(talk, "And you?")
    left, right = texts(talk)
    assert left[1::2] == alone(models, "one", "Hello", "And you?")
    assert right[1::2] == alone(models, "two", "Hello", "And you?") != left[1::2]
    assert left[::2] == right[::2] == ["Hello", "And you?"]


def test_another_model_goes_on_with_what_was_said(talk, models):
    ask(talk, "Hello", [PICTURE], ["a.png"])
    first = texts(talk)[0]
    talk.choose(BASE, "two")
    assert texts(talk) == [first, first] and talk.columns()[1][0].files == ["a.png"]
    ask(talk, "And you?")
    assert [column[:2] for column in texts(talk)] == [first, first]
    talk.choose("one", None)
    assert len(talk.sides) == 1 and len(texts(talk)[0]) == 4
    with pytest.raises(UserError, match="no such model here"):
        talk.choose("one", "three")
    talk.begin()
    assert texts(talk) == [[]] and talk.files == []


def test_while_it_is_answered_each_side_shows_the_question_once(talk):
    talk.choose("one", BASE)
    seen = []
    for _ in talk.ask("Hello", [PICTURE], ["a.png"], **SHORT):
        seen.append(texts(talk))
        assert [[said.is_whole for said in column] for column in talk.columns()] == [[True, False]] * 2
        assert [[said.files for said in column] for column in talk.columns()] == [[["a.png"], []]] * 2
        for not_now in (talk.begin, lambda: talk.choose("two", None)):
            with pytest.raises(UserError, match="an answer is being written"):
                not_now()
    assert all(len(column) == 2 for step in seen for column in step)
    assert all(said.is_whole for column in talk.columns() for said in column)
    assert seen[0][1][1] == "" and seen[-1][0][1].strip() == texts(talk)[0][1]


def test_what_is_not_answered_on_all_sides_is_as_if_not_asked(talk):
    talk.choose("one", BASE)
    ask(talk, "Hello", [PICTURE], ["a.png"])
    before = texts(talk), list(talk.files)

    answering = talk.ask("And you?", [PICTURE], ["b.png"], max_new_tokens=500)
    next(answering)
    talk.end()
    with pytest.raises(UserError, match="the answer was ended"):
        list(answering)
    assert (texts(talk), talk.files) == before

    for stops_after in (1, 6):  # the second is in the answer on the right
        abandoned = talk.ask("And you?", [], [], **SHORT)
        for _ in range(stops_after):
            next(abandoned)
        abandoned.close()
        assert (texts(talk), talk.files) == before
    with pytest.raises(UserError, match="leaves no room for an answer"):
        ask(talk, "many words " * 300)
    with pytest.raises(UserError, match="characters, more than the model's context takes"):
        ask(talk, "x" * 100_000)
    with pytest.raises(UserError, match="takes 8 pictures at most"):
        ask(talk, "All?", [PICTURE] * 8, ["b.png"] * 8)
    assert (texts(talk), talk.files) == before
    ask(talk, "And you?")
    assert len(texts(talk)[0]) == 4


def test_the_last_question_is_asked_again_of_whoever_is_chosen_now(talk, models):
    with pytest.raises(UserError, match="nothing was asked yet"):
        list(talk.retry(**SHORT))
    ask(talk, "Hello", [PICTURE], ["a.png"])
    ask(talk, "And you?", [PICTURE], ["b.png"])
    before = texts(talk)
    list(talk.retry(**SHORT))
    assert texts(talk) == before and talk.files == ["a.png", "b.png"] and len(talk.sides[0].images) == 2
    talk.choose("two", None)
    answering = talk.retry(max_new_tokens=500)
    next(answering)
    answering.close()
    assert texts(talk) == before and talk.files == ["a.png", "b.png"] and len(talk.sides[0].images) == 2
    list(talk.retry(**SHORT))
    assert texts(talk)[0][:3] == before[0][:3] and texts(talk)[0][3] != before[0][3]


def test_what_is_kept_can_be_trained_on(talk, models, tmp_path):
    with pytest.raises(UserError, match="nothing to save"):
        talk.keep(tmp_path / "talks.json")
    ask(talk, "Hello", [PICTURE], ["a.png"])
    assert "has 1 conversation; train takes it as --data_path" in talk.keep(tmp_path / "talks.json")
    ask(talk, "And you?")
    assert "has 1 conversation;" in talk.keep(tmp_path / "talks.json")
    other = Talk(models, "Be short.")
    ask(other, "Hello")
    assert "has 2 conversations;" in other.keep(tmp_path / "talks.json")
    assert len(other.columns()[0]) == 2  # the system message is not shown
    rows = load_llava_json(tmp_path / "talks.json", tmp_path, cache_dir=tmp_path / "cache")
    assert [len(row["messages"]) for row in rows] == [4, 3] and [len(row["images"]) for row in rows] == [1, 0]
