"""`llava-ft init`: a data file of pictures with captions beside them, whole or not at all."""

import json
import os

import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from hf_llava_ft.checking import init_folder
from hf_llava_ft.cli.application import app
from hf_llava_ft.data.captioned_folder import captioned_folder
from hf_llava_ft.data.formats import open_source
from hf_llava_ft.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """`a.png`, `cats/b.PNG` and one that is hidden."""
    folder = tmp_path / "photos"
    for name in ("a.png", "cats/b.PNG", ".hidden/c.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (len(name), 0, 0)).save(folder / name)
    return folder


def write(folder, **texts):
    for name, text in texts.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


def init(folder, *words):
    result = CliRunner().invoke(app, ["init", str(folder), *words])
    return result.exit_code, result.output, " ".join(result.output.split())


def llava(name, question, answer):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": os.path.splitext(name)[0], "image": name, "conversations": turns}


def test_text_files_beside_the_pictures(folder):
    write(
        folder,
        a_txt=b"\xef\xbb\xbfA \xe2\x80\x9cred\xe2\x80\x9d square\r\n",
        cats__b_txt="Line 1\nline 2\n",
        z_txt="lost",
    )
    Image.new("RGB", (8, 8)).save(folder / "empty.jpg")
    write(folder, empty_txt=" \n")
    code, output, said = init(folder)
    assert code == 0, output
    assert json.loads((folder / "data.json").read_text(encoding="utf-8")) == [
        llava("a.png", "<image>\nDescribe the picture.", "A \u201cred\u201d square"),
        llava("cats/b.PNG", "<image>\nDescribe the picture.", "Line 1\nline 2"),
    ]
    assert "1 picture has no caption and is left out: empty.jpg" in said
    assert "1 caption has no picture and is left out: z.txt" in said
    assert "2 rows, each asked 'Describe the picture.'" in said and "Every row can be trained on." in said
    assert said.rindex("Next: llava-ft check") > said.index("Every row")
    assert f"--data_path {folder}/data.json --image_folder {folder} --output_dir my-adapter" in said


@pytest.mark.parametrize("prompt", ["", "What is it?"])
def test_the_question_is_ones_own_or_none(folder, prompt):
    write(folder, a_txt="A")
    (row,) = captioned_folder(folder, prompt).rows
    assert row["conversations"][0]["value"] == ("<image>\nWhat is it?" if prompt else "<image>")


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("has_questions", [False, True])
def test_a_table_in_the_folder(folder, kind, has_questions):
    rows = [
        {"image": "a.png", "answer": 'A, "b"\nc'},
        {"image": "b.PNG", "answer": "B"},
        {"image": "z.png", "answer": "C"},
    ]
    table = pd.DataFrame([row | {"question": f"Q{index}"} for index, row in enumerate(rows)])
    if not has_questions:
        table = table.drop(columns="question").rename(columns={"answer": "caption", "image": "file_name"})
    path = folder / f"captions.{kind}"
    if kind == "parquet":
        table.to_parquet(path)
    elif kind == "jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_csv(path, sep="," if kind == "csv" else "\t", index=False)
    code, output, said = init(folder)
    assert code == 0, output
    written = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    questions = ["<image>\nQ0", "<image>\nQ1"] if has_questions else ["<image>\nDescribe the picture."] * 2
    expected = [llava("a.png", questions[0], 'A, "b"\nc'), llava("cats/b.PNG", questions[1], "B")]
    assert written == [row | {"id": str(number)} for number, row in enumerate(expected, start=1)]
    assert "1 caption has no picture and is left out: row 3 (z.png)" in said
    assert "1 named without their folder, and found by the name alone" in said
    (source,) = open_source(str(folder / "data.json"), folder)
    assert all(source.row(raw, number)["num_images"] == 1 for number, raw in source.iter_raw())


def test_a_name_that_two_pictures_have_is_not_guessed(folder):
    (folder / "dogs").mkdir()
    (folder / "cats" / "b.PNG").rename(folder / "cats" / "a.png")
    write(folder, captions_csv="image,caption\na.png,A\nb.png,B\n", cats__b_png=b"", dogs__b_png=b"")
    found = captioned_folder(folder)
    assert [row["image"] for row in found.rows] == ["a.png"]
    assert found.without_picture == ["row 2 (b.png)"]
    assert found.without_caption == ["cats/a.png", "cats/b.png", "dogs/b.png"]


def test_columns_are_named_as_in_training(folder):
    write(folder, captions_csv="x,y,z\na.png,Q,A\n")
    assert "--columns" in refusal(folder)
    (row,) = captioned_folder(folder, columns="image=x,prompt=y,response=z").rows
    assert row["conversations"][0]["value"] == "<image>\nQ"


def refusal(folder, **kwargs):
    with pytest.raises(UserError) as caught:
        captioned_folder(folder, **kwargs)
    return caught.value.sentence


@pytest.mark.parametrize(
    ("texts", "kwargs", "says"),
    [
        ({}, {}, "has no captions beside its 2 pictures: write a.txt beside a.png, or one captions.csv"),
        ({"a_txt": "A", "captions_csv": "image,caption\na.png,A\n"}, {}, "captions in captions.csv and in text files"),
        (
            {"a_csv": "x", "b_tsv": "y"},
            {},
            "captions in a.csv and in b.tsv; say which are meant with --captions a.csv",
        ),
        ({"captions_csv": "image,caption\nx.png,A\n"}, {}, "the first caption without one is row 1 (x.png)"),
        (
            {"captions_csv": "image,caption\na.png,nan\n"},
            {"columns": "response=caption"},
            "row 1: column 'caption' is nan",
        ),
        ({"captions_csv": "image,caption\na.png,A\nb.PNG,\n"}, {}, "row 2 has no caption"),
        ({"captions_csv": "image,question,answer\na.png,Q,A\n"}, {"prompt": "P"}, "has questions of its own"),
        ({"captions_csv": "image,caption\n../a.png,A\n"}, {}, "leaves the image folder"),
        ({"a_txt": b"caf\xe9"}, {}, "a.txt is not UTF-8 text (unexpected end of data at byte 3); save it as UTF-8."),
        ({"a_txt": "an <image> tag"}, {}, "a.txt: turn 2, an answer, holds <image>; remove it"),
        ({"a_txt": "a\0b"}, {}, "a.txt holds a NUL character"),
        ({"a_txt": "A"}, {"columns": "image=img"}, "--columns is for a table of captions"),
        ({"a_txt": "A"}, {"captions": "x.csv"}, "--captions x.csv is no file"),
        ({"captions_json": '[{"image": "a.png", "conversations": []}]'}, {}, "is LLaVA JSON already"),
    ],
)
def test_what_can_not_be_a_data_file_is_one_sentence_and_writes_nothing(folder, texts, kwargs, says):
    write(folder, **texts)
    before = sorted(folder.rglob("*"))
    assert says in refusal(folder, **kwargs) and "\n" not in refusal(folder, **kwargs)
    with pytest.raises(UserError):
        init_folder.run_init(folder, **kwargs)
    assert sorted(folder.rglob("*")) == before


def test_a_text_file_of_two_pictures_is_refused(folder):
    write(folder, a_txt="A", a_jpg=b"")
    assert "a.txt could be of a.jpg or of a.png; rename or remove one of them." in refusal(folder)


def test_two_kinds_of_captions_are_chosen_between(folder):
    write(folder, a_txt="of the text", captions_csv="image,caption\na.png,of the table\n")
    answers = [
        captioned_folder(folder, captions=which).rows[0]["conversations"][1]["value"]
        for which in ("txt", "captions.csv")
    ]
    assert answers == ["of the text", "of the table"]


def test_nothing_is_written_over(folder, monkeypatch):
    write(folder, a_txt="A", data_json="mine")
    code, _, said = init(folder)
    assert code == 2 and "data.json is there already, and is not written over" in said
    # Nor what appears meanwhile.
    monkeypatch.setattr(init_folder.os.path, "lexists", lambda path: False)
    code, _, said = init(folder)
    assert code == 2 and "is there already" in said
    assert (folder / "data.json").read_text() == "mine" and not list(folder.glob(".data*"))
    monkeypatch.undo()
    code, output, _ = init(folder, "--output", str(folder / "other.json"))
    assert code == 0 and json.loads((folder / "other.json").read_text()), output


def test_a_full_disk_leaves_nothing(folder, monkeypatch):
    write(folder, a_txt="A")

    def write_half(path, text, **kwargs):
        path.write_bytes(text[:5].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(init_folder.Path, "write_text", write_half)
    code, _, said = init(folder)
    assert code == 2 and "there is no room" in said and not list(folder.glob("*data*")) + list(folder.glob(".data*"))


def test_what_the_first_check_finds_is_said_and_is_the_exit_code(folder):
    write(folder, a_txt="A", cats__b_txt="B", cats__b_PNG=b"no picture")
    code, _, said = init(folder)
    assert code == 1 and "can't be decoded" in said and "(when these are corrected)" in said
