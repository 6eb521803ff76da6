"""Rows translated as columns are those that are translated one by one; what is wrong or unusual is left to that."""

import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_llava_ft.data.json import columns
from hf_llava_ft.data.json.columns import columns_of, names_of_images, rows_of_json, rows_of_part
from hf_llava_ft.data.schema import count_words, parse_llava_row
from hf_llava_ft.errors import UserError
from tests.examples import examples

TEXTS = st.lists(
    st.sampled_from(
        ["cat", "<image>", "<image>", "\n", " ", "\t", "\x1c", "\x85", "\u3000", "\u200b", "Bär", "\U0001f431", "."]
    )
    | st.text(max_size=3),
    max_size=5,
).map("".join)
ANSWERS = st.sampled_from(["A cat.", " two\n\nlines ", "Ein Bär\u3000\U0001f431", "\x1c.", "</s>"])
QUESTIONS = st.sampled_from(["What is it?", "", " a\u2028b "])
WITH_IMAGE = st.sampled_from(["<image>\nWhat?", "What?\n<image>", "a <image> b", "<image>", " <image> "])


def turn(speaker, text):
    return {"from": speaker, "value": text}


@st.composite
def usual_rows(draw):
    turns = [turn("system", draw(QUESTIONS))] if draw(st.booleans()) else []
    image = draw(st.sampled_from([None, "a.jpg", "sub/b.png", ["c.jpg"], []]))
    for place in range(draw(st.integers(1, 3))):
        question = draw(WITH_IMAGE) if image and place == 0 else draw(QUESTIONS)
        turns += [turn(draw(st.sampled_from(["human", "user"])), question), turn("gpt", draw(ANSWERS))]
    row = {"conversations": turns, "model": draw(st.sampled_from(["", "gpt4", None]))}
    if image is not None or draw(st.booleans()):
        row["images" if isinstance(image, list) else "image"] = image
    return row | draw(st.sampled_from([{}, {"id": "r1"}, {"id": 7}, {"id": None}, {"id": "2020-01-01"}]))


CHANGES = st.sampled_from(
    [
        *({"id": value} for value in (1.5, True, "x\0", [], 2**70)),
        *(
            {"image": value}
            for value in (
                7,
                " ",
                "\x1c",
                "x\0",
                {"path": "a.jpg"},
                ["a.jpg", None],
                ["a.jpg", "b.jpg"],
                [[]],
                "data:,",
            )
        ),
        *({"images": value} for value in ("a.jpg", ["a.jpg", "a.jpg"], {"path": "a.jpg"})),
        *({"conversations": value} for value in (None, [], "x", [7], [[]], [None], [{"from": "human"}])),
        *({key: value} for key in ("video", "audios") for value in ("", "a.mp4", [], None)),
        *({"system": value} for value in ("Be brief.", "", None, 7, "<image>")),
    ]
)


@st.composite
def any_rows(draw):
    """Rows of which some are wrong in one way or another."""
    row = draw(usual_rows())
    if draw(st.booleans()):
        return row
    if draw(st.booleans()):
        return row | draw(CHANGES)
    turns = row["conversations"]
    place = draw(st.integers(0, len(turns) - 1))
    how = draw(st.sampled_from(["text", "speaker", "drop", "twice", "role", "more", "missing", "null"]))
    if how == "text":
        turns[place]["value"] = draw(TEXTS)
    elif how == "speaker":
        turns[place]["from"] = draw(st.sampled_from(["human", "gpt", "system", "Human", "assistant", ""]))
    elif how == "drop":
        del turns[place]
    elif how == "twice":
        turns.insert(place, dict(turns[place]))
    elif how == "role":
        turns[place] = {"role": "assistant" if place % 2 else "user", "content": "x"}
    elif how == "more":
        turns[place]["weight"] = 1
    else:
        turns[place].update({"value": 7 if how == "missing" else None})
    return row


def plainly(rows):
    """What the road of one by one makes of them; None if it refuses one."""
    try:
        parsed = [parse_llava_row(row, "data.json", number) for number, row in enumerate(rows, start=1)]
    except UserError:
        return None
    return [
        (each["id"], each["messages"], each["images"], count_words(row))
        for each, row in zip(parsed, rows, strict=True)
    ]


def by_columns(text, is_list=True):
    rows = rows_of_json(text.encode("utf-8", "surrogatepass"), is_list)
    found = None if rows is None else columns_of(rows)
    if found is None:
        return None
    ids = [row_id or str(number) for number, row_id in enumerate(found.ids.to_pylist(), start=1)]
    return list(
        zip(ids, found.messages.to_pylist(), found.image_names.to_pylist(), found.num_words.tolist(), strict=True)
    )


@examples(400)
@given(st.lists(any_rows(), min_size=1, max_size=3), st.booleans(), st.booleans())
def test_columns_say_what_rows_say_or_nothing(rows, ascii_only, is_list):
    texts = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    found = by_columns("[" + ", ".join(texts) + "]" if is_list else "\n".join(texts), is_list)
    assert found is None or found == plainly(rows)


@examples(100)
@given(st.lists(usual_rows().filter(lambda row: row.get("id") != 7), min_size=1, max_size=4))
def test_usual_rows_are_translated_as_columns(rows):
    rows = [row for row in rows if not isinstance(row.get("images"), list)] or [rows[0]]
    for row in rows:
        row["id"] = "r"
    assert by_columns(json.dumps(rows)) == plainly(rows) is not None


@pytest.mark.parametrize(
    "turns",
    [
        [turn("system", "Be brief.")],
        [turn("human", "a")],
        [turn("gpt", "b")],
        [turn("human", "a"), turn("gpt", "b"), turn("human", "c")],
        [turn("human", "a"), turn("gpt", "b"), turn("gpt", "c")],
        [turn("human", "a"), turn("system", "s"), turn("gpt", "b")],
        [turn("human", "a"), turn("gpt", " \u3000")],
        [turn("human", "a"), turn("gpt", "<image>")],
        [turn("system", "<image>"), turn("human", "a"), turn("gpt", "b")],
        [turn("human", "<image>"), turn("gpt", "b")],
    ],
)
def test_wrong_turns_are_left_to_the_other_road(turns):
    sound = {"conversations": [turn("human", "a"), turn("gpt", "b")]}
    rows = [sound, {"conversations": turns}, sound]
    assert plainly(rows) is None and by_columns(json.dumps(rows)) is None


@pytest.mark.parametrize("ids", [["r", None, "s"], [3, -4, 5], [None, None, None], ["1", "2", "3"]])
def test_ids_of_one_kind_are_taken(ids):
    rows = [{"id": row_id, "conversations": [turn("human", "a"), turn("gpt", "b")]} for row_id in ids]
    assert by_columns(json.dumps(rows)) == plainly(rows) is not None


@pytest.mark.parametrize(
    "text",
    [
        '[{"a": 1}], "x": [{"a": 2}]',
        '[{"a": 1}]}{"rows": [{"a": 2}]',
        '[{"a": 1}], "rows": [{"a": 2}]',
        '[{"a": 1}, null]',
        '[{"a": 1}, 7]',
        '[{"a": 1, "a": 2}]',
        '[{"a": "\\ud83d"}]',
        '[{"a": "\udcff"}]',
        '[{"a": 1},]',
        '[{"a": 1}',
        "[7]",
        "[]",
    ],
)
def test_what_is_no_list_of_objects_is_left_to_the_other_road(text):
    assert by_columns(text) is None


@pytest.mark.parametrize("brackets", ["[]", '{"x":}'])
def test_brackets_without_end_are_not_given_to_the_parser(brackets):
    """It would not come back."""
    opening, closing = brackets[:-1], brackets[-1:]
    deep = opening * 200_000 + "1" + closing * 200_000
    assert rows_of_json(f'[{{"a": {deep}}}]'.encode(), True) is None
    hidden = f'[{{"b": "]]]}}}}\\\\", "c": "\\"]]}}", "a": {opening * 101}1{closing * 101}}}]'
    assert columns._depth(hidden.encode()) == 103
    assert columns._depth(b'[{"a": "[[[[[[{{{{ \\" [[[[["}, {"a": [[]]}]') == 4


@pytest.mark.parametrize("said", ["Inf", "-Inf", "[1, Inf ]", '{"a":\nInf}'])
def test_a_number_that_arrow_alone_knows_is_left_to_the_other_road(said):
    with pytest.raises(ValueError):
        json.loads(said)
    assert rows_of_part(f'[{{"score": {said}, "id": 1}}]'.encode(), True) is None
    for known in ("-Infinity", '"see: Information"', '"Inf"'):
        assert rows_of_part(f'[{{"score": {known}, "id": 1}}]'.encode(), True) is not None


def test_names_of_images_are_given_once_in_order():
    rows = rows_of_json(
        b'[{"image": "b"}, {"image": "a"}, {"image": null}, {"image": "b"}, {"image": "data:,"}]', True
    )
    assert names_of_images(rows) == ["b", "a"]
    assert names_of_images(rows_of_json(b'[{"images": ["b", "a"]}, {"images": []}, {"images": ["c"]}]', True)) == list(
        "bac"
    )
    assert names_of_images(rows_of_json(b'[{"x": 1}]', True)) == []
    assert names_of_images(rows_of_json(b'[{"image": {"path": "a"}}]', True)) is None


def test_blanks_are_the_same_for_arrow_and_python():
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    trimmed = pc.utf8_trim_whitespace(pa.array(characters))
    empty = pc.equal(trimmed, "").to_numpy(zero_copy_only=False)
    assert np.array_equal(empty, [not character.strip() for character in characters])


@examples(200)
@given(st.lists(TEXTS, min_size=1, max_size=6), st.integers(0, 2))
def test_words_are_counted_as_split_counts_them(texts, skipped):
    column = pa.array(["x y", "ä ö"][:skipped] + texts)[skipped:]
    assert columns._num_words(column).tolist() == [len(text.split()) for text in texts]
