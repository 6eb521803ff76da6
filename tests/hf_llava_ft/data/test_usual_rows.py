"""Rows that are read with their types told beforehand are those that are read one by one, and what is not read is
nothing that a row could be refused for."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_llava_ft.data.json import columns
from hf_llava_ft.data.json.columns import columns_of, rows_of_part
from hf_llava_ft.data.json.usual_rows import loose_brackets, usual_rows
from tests.examples import examples
from tests.hf_llava_ft.data.test_json_columns import any_rows, plainly, turn
from tests.hf_llava_ft.data.test_json_columns import usual_rows as drawn_rows

SOUND = {"conversations": [turn("human", "a"), turn("gpt", "b")]}
FORMS = {
    "list": lambda rows: json.dumps(rows),
    "indented": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False),
    "lines": lambda rows: "\n".join(map(json.dumps, rows)),
}


def read(text, is_list=True, reader=usual_rows):
    rows = reader(text.encode("utf-8", "surrogatepass"), is_list)
    found = None if rows is None else columns_of(rows)
    if found is None:
        return None
    ids = [row_id or str(number) for number, row_id in enumerate(found.ids.to_pylist(), start=1)]
    return list(
        zip(ids, found.messages.to_pylist(), found.image_names.to_pylist(), found.num_words.tolist(), strict=True)
    )


@examples(400)
@given(st.lists(any_rows(), min_size=1, max_size=3), st.sampled_from(list(FORMS)))
def test_they_say_what_rows_say_or_nothing(rows, form):
    text = FORMS[form](rows)
    found = read(text, form != "lines", rows_of_part)
    assert found is None or found == plainly(rows)


@examples(100)
@given(st.lists(drawn_rows(), min_size=1, max_size=4), st.sampled_from(list(FORMS)))
def test_rows_of_one_kind_are_read(rows, form):
    for row in rows:
        row["id"] = "r"
        row["more"] = {"any": [1, {"thing": None}]}
        if isinstance(row.get("images"), list):
            row["image"] = (row.pop("images") or [None])[0]
    assert read(FORMS[form](rows), form != "lines") == plainly(rows) is not None


@pytest.mark.parametrize(
    "more",
    [
        {"id": "2020-01-01"},  # no date
        {"id": -7},
        {"image": ["a.jpg"], "conversations": [turn("human", "<image>"), turn("gpt", "b")]},
        {"images": "a.jpg", "conversations": [turn("human", "<image>"), turn("gpt", "b")]},
        {"model": 1.5, "bbox": [[1, 2], [3, 4]]},
        {"system": None, "video": None},
    ],
)
def test_the_first_row_tells_the_types(more):
    rows = [SOUND | more, SOUND | more]
    assert read(json.dumps(rows)) == plainly(rows) is not None


@pytest.mark.parametrize(
    "text",
    [
        '[{"a": 1}], "x": [{"a": 2}]',
        '[{"a": 1}]}{"rows": [{"a": 2}]',
        '[{"a": 1}], "rows": [{"a": 2}]',
        '[{"a": 1}, {"last-": 1}], "x": [{"a": 2}]',
        '[{"a": 1}, null]',
        '[{"a": 1}, 7]',
        '[{"id": "a", "id": "b"}]',
        '[{"a": "\\ud83d"}]',
        '[{"a": 1},]',
        '[{"a": 1}',
        "[7]",
        "[]",
        "",
    ],
)
def test_a_list_that_is_none_or_ends_early_is_not_read(text):
    assert usual_rows(text.encode(), True) is None


def test_a_key_that_nobody_reads_may_be_nested_but_not_without_end():
    deep = f'[{{"x": {"[" * 5000}{"]" * 5000}}}]'.encode()
    assert loose_brackets(deep, usual_rows(deep, True)) == 5000
    assert rows_of_part(deep, True) is None
    said = json.dumps([{"conversations": [turn("human", "[{" * 400), turn("gpt", "}]")], "boxes": [[1]]}] * 40)
    assert loose_brackets(said.encode(), usual_rows(said.encode(), True)) == 1 + 2 * 40
    nested = json.dumps([SOUND | {"boxes": [[1], {"a": []}]}] * 40).encode()
    assert loose_brackets(nested, usual_rows(nested, True)) == 1 + 4 * 40 > columns._MAX_DEPTH
    assert len(rows_of_part(nested, True)) == 40


@pytest.mark.parametrize(
    "text",
    [
        "<image>\nWhat?",
        "What?\n<image>",
        "\n <image> What?",
        "What? <image> \n",
        "a <image> b",
        "<image>",
        " <image>",
        "<image><image>",
        "<image> a <image>",
        "a <image",
        "<<image>> <image",
        "image> <image>\u3000Bär",
    ],
)
def test_images_stand_where_a_row_that_is_read_alone_has_them(text):
    names = ["a.jpg"] * text.count("<image>")
    row = {
        "id": "r",
        "images": names,
        "conversations": [turn("human", text), turn("gpt", "<image"[: len(text) % 7] or "b")],
    }
    rows = [SOUND | {"id": "q"}, row, SOUND | {"id": "s"}]
    assert read(json.dumps(rows, ensure_ascii=False)) == plainly(rows) is not None
