"""Tables of one's own: columns are found or named, the rows are those that were meant, and nothing is guessed."""

import json
import re
from pathlib import Path

import datasets
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from hf_llava_ft.checking.sound_rows import sound_rows
from hf_llava_ft.cli.application import app
from hf_llava_ft.data.export import export_dataset
from hf_llava_ft.data.formats import load_data, open_source
from hf_llava_ft.data.formats.column_choice import parse_choice
from hf_llava_ft.data.streaming import LlavaStream
from hf_llava_ft.errors import UserError
from hf_llava_ft.settings.parsing import resolve

ROWS = [
    {"img": "0.png", "question": "What is\nit, then?", "answer": 'A "cat"; or so'},
    {"img": "1.png", "question": "Which colour?", "answer": "Red"},
    {"question": "How much is 2 + 2?", "answer": "4"},
]
AS_LLAVA = [
    {
        **({"image": row["img"]} if "img" in row else {}),
        "conversations": [
            {"from": "human", "value": ("<image>\n" if "img" in row else "") + row["question"]},
            {"from": "gpt", "value": row["answer"]},
        ],
    }
    for row in ROWS
]
TOLD = "prompt from question, response from answer, image from img"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for index in range(3):
        Image.new("RGB", (8 + index, 8), (80 * index, 0, 0)).save(tmp_path / "images" / f"{index}.png")
    (tmp_path / "llava.json").write_text(json.dumps(AS_LLAVA), encoding="utf-8")
    return tmp_path


def write(folder, text, name="data"):
    (folder / name).write_text(text, encoding="utf-8", newline="")
    return str(folder / name)


def write_rows(folder, kind, rows=ROWS):
    path, table = folder / f"table.{kind}", pd.DataFrame(rows)
    if kind == "jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    elif kind == "parquet":
        table.to_parquet(path)
    elif kind == "saved":
        datasets.Dataset.from_pandas(table).save_to_disk(path)
    else:
        separator = {"csv": ",", "tsv": "\t", "semicolons": ";"}[kind]
        table.to_csv(path, sep=separator, index=False, encoding="utf-8-sig", lineterminator="\r\n")
    return str(path)


def rows_of(path, folder, **kwargs):
    (source,) = open_source(path, folder / "images", **kwargs)
    return [source.row(raw, number) for number, raw in source.iter_raw()]


def sentence(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in caught.value.sentence
    return caught.value.sentence


@pytest.mark.parametrize("kind", ["csv", "tsv", "semicolons", "jsonl", "parquet", "saved"])
def test_a_table_gives_the_rows_of_the_same_llava_json(folder, kind):
    path = write_rows(folder, kind)
    expected = rows_of(str(folder / "llava.json"), folder)
    assert rows_of(path, folder) == expected
    assert rows_of(path, folder, columns="image=img,prompt=question,response=answer") == expected
    (source,) = open_source(path, folder / "images")
    assert source.dialect.columns.told() == TOLD and source.describe().endswith(f": {TOLD}")
    stream = LlavaStream([source], shuffle_buffer_size=0)
    assert [row["messages"] for row in stream] == [row["messages"] for row in expected]
    loaded = load_data(path, folder / "images", cache_dir=folder / "cache")
    assert loaded["messages"][:] == [row["messages"] for row in expected]


def test_other_columns_are_other_rows_and_another_order(folder):
    """Caches and resumed streams know the columns that were read."""
    path = write(folder, "image,other,question,answer\n0.png,1.png,What?,Red\n")
    found = {}
    for name in ("image", "other"):
        columns = f"image={name}"
        row = load_data(path, folder / "images", cache_dir=folder / "cache", columns=columns)[0]
        order = LlavaStream(open_source(path, folder / "images", columns=columns)).order["data"]
        found[row["images"][0]["path"][-5:]] = order
    assert list(found) == ["0.png", "1.png"] and len(set(found.values())) == 2


def test_a_bad_row_of_a_table_is_left_out_as_another(folder):
    path = write(folder, "img,question,answer\n0.png,What?,Red\n1.png,What?,\n")
    rows = sound_rows(path, folder / "images", on_bad_row="skip", cache_dir=folder / "cache")
    assert [problem.kind for problem in rows.left_out] == ["empty_answer"]
    assert [problem.row for problem in rows.left_out] == [2] and len(rows.parts[0].dataset) == 1


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ("Image,Question,Answer", "prompt from Question, response from Answer, image from Image"),
        ("file_name,caption,split", "image-caption"),
        ("image_path,caption,split", "response from caption, image from image_path; not read: split"),
        (
            "image,caption,prompt,response",
            "prompt from prompt, response from response, image from image; not read: caption",
        ),
        ("img path,instruction,output", "prompt from instruction, response from output, image from img path"),
        ("img,prompt,completion", "prompt from prompt, response from completion, image from img"),
        ("query,reply,system", "prompt from query, response from reply, system from system"),
    ],
)
def test_usual_names_are_found(folder, header, told):
    values = ",".join(
        "0.png" if index == 0 and "query" not in header else "a" for index in range(header.count(",") + 1)
    )
    (source,) = open_source(write(folder, f"{header}\n{values}\n"), folder / "images")
    assert told in source.describe()
    row = source.row(*[*source.iter_raw()][0][::-1])
    assert len(row["images"]) == ("query" not in header)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (
            "image,img,question,answer",
            "image and img could each be the picture; say which it is with --columns image=image",
        ),
        ("image,question,answer,response", "answer and response could each be the answer"),
        ("image,question,prompt,answer", "prompt could each be the question"),
        (
            "image,question,caption",
            "no name of them is known for the answer; say which it is with --columns response=NAME",
        ),
        ("image,answer,text", "answer and text could each be the answer"),
        ("a,b,c", "of a table of your own, say what is what with --columns"),
    ],
)
def test_what_could_mean_two_things_is_refused_with_all_columns(folder, header, says):
    said = sentence(open_source, write(folder, f"{header}\n{','.join('x' * (header.count(',') + 1))}\n"))
    assert says in said and header.replace(",", ", ") in said


def test_columns_are_named_as_one_likes(folder):
    path = write(folder, "left,right,a b,c=d\n0.png,1.png,Same?,No\n")
    by_mapping = {"image": ["left", "right"], "prompt": "a b", "response": "c=d"}
    for columns in (
        "image=left+right,prompt=a b,response=c=d",
        by_mapping,
        json.dumps(by_mapping),
        ["image=left+right", f"{path}:prompt=a b,response=c=d"],
    ):
        (row,) = rows_of(path, folder, columns=columns)
        assert [image["path"][-5:] for image in row["images"]] == ["0.png", "1.png"]
        assert (
            "".join(part["text"] or "<image>" for part in row["messages"][0]["content"]) == "<image>\n<image>\nSame?"
        )
        assert row["messages"][1]["content"][0]["text"] == "No"
    assert not rows_of(path, folder, columns=by_mapping | {"image": None})[0]["images"]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ("image=imgs", "has the columns img, question, answer; did you mean img?"),
        ("question=question", "'question' is none of prompt, response, image, system; write prompt= for 'question'"),
        ("img", "'img' names no column; write image=img,prompt=question,response=answer"),
        ("response=question+answer", "response is one column and not question, answer"),
        ("response=", "response has no column"),
        ("image=img,image=answer", "image is given twice"),
        ('{"image": 3}', "image is a number"),
        ("{image", "is no JSON"),
        ("other.csv:image=img", "speaks of 'other.csv'"),
    ],
)
def test_wrong_choices_are_one_sentence(folder, columns, says):
    assert says in sentence(open_source, write_rows(folder, "csv"), folder / "images", columns=columns)


def test_in_a_mixture_each_table_has_its_own(folder):
    mine, llava = write(folder, "foo,bar\nWhat?,Red\n", "mine.csv"), str(folder / "llava.json")
    mixture = f"{llava},{write_rows(folder, 'csv')}:2,{mine}"
    for columns in (
        f"{mine}:prompt=foo,response=bar",
        "prompt=foo,response=bar",
        {mine: "prompt=foo,response=bar"},
        {mine: {"prompt": "foo", "response": "bar"}},
    ):
        found = [source.dialect.columns for source in open_source(mixture, folder / "images", columns=columns)]
        assert [each and each.told() for each in found] == [None, TOLD, "prompt from foo, response from bar"]
    assert "has all the columns" in sentence(open_source, f"{llava},{mine}", columns="prompt=fo,response=bar")
    assert "holds whole conversations" in sentence(open_source, llava, columns="image=image")
    # Said of the data to train on, it need not fit those to evaluate on.
    inherited = parse_choice("prompt=foo,response=bar")._replace(is_inherited=True)
    assert open_source(llava, columns=inherited)[0].format == "LLaVA JSON"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "Q", "answer": 3}, "row 2: column 'answer' holds a number; write it as text."),
        ({"question": True, "answer": "A"}, "row 2: column 'question' holds true or false; write it as text."),
        ({"question": "Q", "answer": float("nan")}, "row 2: column 'answer' is NaN, which is written for"),
        ({"question": "Q", "answer": "nan"}, "row 2: column 'answer' is nan, which is written for"),
        ({"question": "<NA>", "answer": "A"}, "row 2: column 'question' is <NA>, which"),
        ({"question": "Q", "answer": "A", "img": "nan"}, "row 2: column 'img' is nan, which"),
        ({"question": "Q", "answer": "A", "img": float("nan")}, "row 2: column 'img' is NaN, which"),
        (
            {"question": "Q", "answer": "A", "img": 7},
            "row 2: column 'img' holds a number; give the image's path as text.",
        ),
        ({"question": "Q", "answer": " \n"}, "row 2: column 'answer' is empty; write the answer"),
        ({"question": "", "answer": "A"}, "row 2: column 'question' is empty; write the question"),
        ({"question": "Q", "answer": []}, "row 2: column 'answer' is empty"),
        (
            {"question": ["a", "b"], "answer": ["c"]},
            "row 2: 2 questions under 'question' and 1 answers under 'answer'",
        ),
        ({"question": ["a", "b"], "answer": "c"}, "row 2: 2 questions under 'question' and one answer under 'answer'"),
        ({"question": "Q", "answer": "see <image>", "img": "0.png"}, "row 2: turn 2, an answer, holds <image>"),
        ({"question": "<image> <image>", "answer": "A", "img": "0.png"}, "row 2: 2 <image> placeholders and 1 image"),
        ({"question": "Q", "answer": "A", "picture": "0.png"}, "row 2 has 'picture', which the first rows have not"),
        ({"question": "Q", "answer": {"a": 1}}, "row 2: column 'answer' holds an object"),
    ],
)
def test_hostile_cells_are_one_sentence_with_file_and_row(folder, row, says):
    """And the row before, which is good, is not refused."""
    (good, *_), table = ROWS, folder / "table.jsonl"
    lines = [good] * 40 + [row]
    table.write_text("".join(f"{json.dumps(each)}\n" for each in lines), encoding="utf-8")
    said = sentence(rows_of, str(table), folder)
    assert said.startswith(f"{table}: row 41") and says.replace("row 2", "row 41") in said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "img,question,answer\n0.png,Why, then,A\n",
            "row 1 has 4 values under 3 names; write a value that holds a comma",
        ),
        (
            "img;question;answer\n0.png;a;b\n0.png;Why; then;A\n",
            "row 2 has 4 values under 3 names; write a value that holds a semicolon",
        ),
        ('img\tquestion\tanswer\n0.png\t"Why\tA\n', "row 1 is not valid TSV"),
        ("img;question,answer\n0.png;Q,A\n", "its first line could be cut at commas or at semicolons"),
        ("img,img,answer\n0.png,a,b\n", "two columns called 'img'"),
        ("img,question,answer\n0.png,Q,nan\n", "row 1: column 'answer' is nan"),
        ("img,question,answer\n0.png,,A\n", "row 1: column 'question' is empty"),
        ("img,question,answer\n", "has no rows"),
    ],
)
def test_hostile_tables_are_one_sentence(folder, text, says):
    path = write(folder, text)
    said = sentence(rows_of, path, folder)
    assert says in said and said.startswith(path)


def test_of_several_answers_the_most_frequent_is_learned_and_it_is_said(folder):
    of_vqa = [{"answer": "b", "answer_confidence": "yes"}, {"answer": "c"}, {"answer": "c"}]
    rows = [{"img": "0.png", "question": "Q", "answers": answers} for answers in (["no", "yes", "yes", "no"], of_vqa)]
    path = write_rows(folder, "jsonl", rows)
    assert [row["messages"][1]["content"][0]["text"] for row in rows_of(path, folder)] == ["no", "c"]
    assert "response from answers (of several answers the most frequent)" in open_source(path)[0].describe()


def test_lists_of_questions_and_answers_are_turns(folder):
    path = write_rows(folder, "jsonl", [{"img": "0.png", "questions": ["A?", "B?"], "answers": ["a", "b"]}] * 2)
    row, _ = rows_of(path, folder)
    texts = ["".join(part["text"] or "<image>" for part in message["content"]) for message in row["messages"]]
    assert texts == ["<image>\nA?", "a", "B?", "b"]


def test_the_commands_take_columns(folder):
    path = write(folder, "foo,bar,baz\n0.png,What?,Red\n", "mine.csv")
    words = ["check", path, "--image_folder", str(folder / "images"), "--num_proc", "1", "--columns"]
    result = CliRunner().invoke(app, [*words, "image=foo,prompt=bar,response=baz"])
    assert result.exit_code == 0, result.output
    assert ": prompt from bar, response from baz, image from foo" in " ".join(result.output.split())
    assert CliRunner().invoke(app, [*words, "image=fo"]).exit_code == 2
    (source,) = open_source(path, folder / "images", columns=["image=foo,prompt=bar,response=baz"])
    assert export_dataset([source], folder / "exported").num_images == 1


def test_a_recipe_holds_columns(folder):
    recipe, data = folder / "recipe.yaml", "model_name_or_path: m\noutput_dir: out\ndata_path: a.csv,b.tsv\n"
    for written, expected in (
        ("columns: image=img,prompt=q,response=a", ({"image": ("img",), "prompt": ("q",), "response": ("a",)}, {})),
        ("columns: {image: img, prompt: no}", ({"image": ("img",), "prompt": ("no",)}, {})),
        ("columns:\n  - prompt=q\n  - b.tsv:prompt=p", ({"prompt": ("q",)}, {"b.tsv": {"prompt": ("p",)}})),
        (
            "columns:\n  a.csv: prompt=q\n  b.tsv:\n    image: [l, r]",
            ({}, {"a.csv": {"prompt": ("q",)}, "b.tsv": {"image": ("l", "r")}}),
        ),
    ):
        recipe.write_text(f"{data}{written}\n", encoding="utf-8")
        choice = parse_choice(resolve([str(recipe)]).by_name["columns"].value)
        assert (choice.everywhere, choice.of_dataset) == expected
    line = resolve([str(recipe), "--columns", "prompt=q", "a.csv:prompt=p"]).by_name["columns"]
    assert line.value == ["prompt=q", "a.csv:prompt=p"]


def test_every_example_of_the_documentation_is_a_choice():
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    examples = re.findall(r"--columns (\S+)", text)
    assert len(examples) >= 2 and all(parse_choice(example.rstrip("`")) for example in examples)
