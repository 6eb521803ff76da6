"""LLaVA rows become conversations without losing text, and every row that would train wrongly is named."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_llava_ft.data.schema import IMAGE_PLACEHOLDER, count_words, parse_llava_row, row_place
from hf_llava_ft.errors import UserError
from tests.examples import examples

IMAGE = {"type": "image", "text": None}


def text(value):
    return {"type": "text", "text": value}


def turns(*values, roles=("human", "gpt")):
    return [{"from": roles[i % 2], "value": value} for i, value in enumerate(values)]


def row(*values, **fields):
    return {"id": "cat", "conversations": turns(*values), **fields}


def parse(raw, number=3):
    return parse_llava_row(raw, "data.json", number)


def message_of(raw):
    with pytest.raises(UserError) as caught:
        parse(raw)
    message = str(caught.value)
    assert message.startswith("data.json: row 3")
    assert "\n" not in message and message.endswith(".")
    return message


def first_turn(value, num_images=1):
    return parse(row(value, "A cat.", image=["1.jpg"] * num_images))["messages"][0]["content"]


def test_a_row_in_memory():
    raw = row("<image>\nWhat is it?", "A cat.", "Sure?", "Yes.", image="cats/1.jpg", model="ignored")
    assert parse(raw) == {
        "id": "cat",
        "messages": [
            {"role": "user", "content": [IMAGE, text("\nWhat is it?")]},
            {"role": "assistant", "content": [text("A cat.")]},
            {"role": "user", "content": [text("Sure?")]},
            {"role": "assistant", "content": [text("Yes.")]},
        ],
        "images": ["cats/1.jpg"],
    }


@pytest.mark.parametrize(
    "value",
    ["<image>\nWhat?", "What?\n<image>", "<image>What?", "What?<image>", " \n<image>  What? \n", "What? <image>\n"],
)
def test_a_lone_image_at_either_end_goes_to_the_front_as_the_original_trains(value):
    assert first_turn(value) == [IMAGE, text("\nWhat?")]


@pytest.mark.parametrize("value", ["<image>", "\n <image>\n"])
def test_a_lone_image_without_text_is_an_image_only(value):
    assert first_turn(value) == [IMAGE]


def test_other_images_stay_in_their_places():
    assert first_turn("Is <image> a cat?\n") == [text("Is "), IMAGE, text(" a cat?\n")]
    assert first_turn("<image>\n<image>\nCompare.", 2) == [IMAGE, text("\n"), IMAGE, text("\nCompare.")]
    assert first_turn("<image><image>", 2) == [IMAGE, IMAGE]
    later = parse(row("Hello ", "Hi.", "and <image>?", "A cat.", image="1.jpg"))["messages"]
    assert later[0]["content"] == [text("Hello ")]
    assert later[2]["content"] == [text("and "), IMAGE, text("?")]


pieces = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)


@examples(100)
@given(st.lists(pieces, min_size=1, max_size=4), pieces)
def test_text_survives_word_for_word(parts, answer):
    value, num_images = IMAGE_PLACEHOLDER.join(parts), len(parts) - 1
    if value.count(IMAGE_PLACEHOLDER) != num_images or IMAGE_PLACEHOLDER in answer:
        return
    parsed = parse(row(value, f"{answer}.", images=["1.jpg"] * num_images))
    user, assistant = [
        "".join(part["text"] or IMAGE_PLACEHOLDER for part in turn["content"]) for turn in parsed["messages"]
    ]
    assert assistant == f"{answer}."
    if num_images == 1 and not (parts[0].strip() and parts[1].strip()):
        value = f"<image>\n{''.join(parts).strip()}".strip()
    assert user == value
    assert all(part["text"] != "" for turn in parsed["messages"] for part in turn["content"])


def test_both_spellings_of_roles_and_a_system_turn():
    conversations = [
        {"from": "system", "value": "Be brief."},
        {"from": "user", "value": "Hi"},
        {"from": "assistant", "value": " Ho\n"},
    ]
    messages = parse({"conversations": conversations})["messages"]
    assert [turn["role"] for turn in messages] == ["system", "user", "assistant"]
    assert messages[2]["content"] == [text(" Ho\n")]  # verbatim


@pytest.mark.parametrize(("fields", "row_id"), [({"id": 7}, "7"), ({"id": None}, "3"), ({"id": "x"}, "x")])
def test_ids_become_text(fields, row_id):
    assert parse({**row("a", "b"), **fields})["id"] == row_id


def test_a_row_without_an_id_takes_its_number():
    assert parse({"conversations": turns("a", "b")})["id"] == "3"


@pytest.mark.parametrize("fields", [{"image": None}, {"images": []}, {"image": None, "images": None}])
def test_null_and_empty_lists_say_no_image(fields):
    assert parse(row("a", "b", **fields))["images"] == []


def test_an_empty_human_turn_is_kept():
    assert parse(row("", "b"))["messages"][0] == {"role": "user", "content": []}


@pytest.mark.parametrize(
    ("values", "fields", "numbers"),
    [
        (("<image><image>", "b"), {"image": "1.jpg"}, "2 <image> placeholders and 1 image;"),
        (("What?", "b"), {"image": "1.jpg"}, "0 <image> placeholders and 1 image;"),
        (("<image> and <image>", "b", "<image>", "c"), {"images": ["1", "2"]}, "3 <image> placeholders and 2 images;"),
        (("<image>", "b"), {}, "1 <image> placeholder and 0 images;"),
    ],
)
def test_a_wrong_number_of_images_names_both_numbers(values, fields, numbers):
    assert message_of(row(*values, **fields)).startswith(
        f"data.json: row 3 (id 'cat'): {numbers} make the numbers equal"
    )


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ("text", "is text, not an object"),
        (["a"], "is a list, not an object"),
        ({"id": "cat"}, 'has no "conversations"'),
        ({"conversations": {"from": "human"}}, '"conversations" is an object'),
        ({"conversations": []}, "a conversation without an answer"),
        ({"conversations": ["hi"]}, "turn 1 is text"),
        ({"conversations": [{"value": "hi"}]}, 'turn 1 has no "from"'),
        ({"conversations": [{"from": "human", "text": "hi"}]}, 'turn 1 has no "value"'),
        ({"conversations": [{"from": 1, "value": "hi"}]}, 'turn 1: "from" is a number'),
        (row("a", None), 'turn 2: "value" is null'),
        (row("a", ["b"]), 'turn 2: "value" is a list'),
        ({"conversations": turns("a", "b", roles=("Human", "gpt"))}, "turn 1 has the unknown role 'Human'"),
        (row("a"), "a conversation without an answer"),
        ({"conversations": turns("a", "b", roles=("human", "human"))}, "a conversation without an answer"),
        ({"conversations": turns("a", "b", roles=("gpt", "human"))}, "begins with an assistant turn"),
        ({"conversations": [{"from": "system", "value": "s"}, *turns("a", "b")[1:]]}, "begins with an assistant turn"),
        (row("a", "b", "c"), "ends with a human turn that has no answer"),
        (row("a", " \n"), "turn 2 is an empty answer"),
        (row("a", "", "b", "c"), "turn 2 is an empty answer"),
        (row("a", "An <image>."), "turn 2, an answer, holds <image>; remove it"),
        (
            {"conversations": [{"from": "system", "value": "<image>"}, *turns("a", "b")]},
            "the system turn, holds <image>",
        ),
        ({"conversations": [*turns("a", "b"), {"from": "system", "value": "s"}]}, "turn 3 is a system turn"),
        ({"conversations": turns("a", "b")[:1] + turns("a", "b")}, "turns 1 and 2 are both human turns"),
        ({"conversations": turns("a", "b") + turns("c", "d")[1:]}, "turns 2 and 3 are both assistant turns"),
        (row("a\0", "b"), "turn 1 holds a NUL character"),
        (row("a", "b\ud83d"), "turn 2 holds half of a surrogate pair"),
        (row("a", "b", id="c\0"), 'the "id" holds a NUL character'),
        (row("a", "b", id=True), 'the "id" is true or false'),
        (row("a", "b", id=1.5), 'the "id" is a number; make it text or a whole number'),
        (row("<image>", "b", image=5), '"image" holds a number'),
        (row("<image>", "b", images=[{"file": "1.jpg"}]), '"images" holds an object'),
        (row("<image>", "b", image="1\0.jpg"), '"image" holds a NUL character'),
        (row("<image>", "b", image=""), '"image" holds an empty path'),
        (row("<image>", "b", image="1.jpg", images=["2.jpg"]), "they differ"),
    ],
)
def test_each_wrong_row_has_its_own_sentence(raw, says):
    assert says in message_of(raw)


def test_image_and_images_may_agree():
    assert parse(row("<image>", "b", image="1.jpg", images=["1.jpg"]))["images"] == ["1.jpg"]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["human", "gpt", "<image>"]),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "image", "images", "conversations", "from", "value"]), children)
    ),
    max_leaves=12,
)


@examples(100)
@given(json_values)
def test_anything_else_is_a_user_error_too(raw):
    try:
        parse(raw)
    except UserError as error:
        assert re.match(r"data\.json: row 3\b", str(error))


def test_words_are_counted_as_the_original_does():
    # Of the original's `modality_lengths`: `<image>` is a word, and sticks to one that it touches.
    assert count_words(row("<image>\nWhat is in the picture?", "A cat sitting on a mat.")) == 12
    assert count_words(row("a<image>b", "c")) == 2


def test_a_long_id_is_shortened_in_messages():
    assert len(row_place("data.json", 1, "x" * 10_000)) < 120
