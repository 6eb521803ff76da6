"""The answers to a dataset: what stands in the file, and what a command that was killed leaves to the next."""

import json

import pytest
import torch
from PIL import Image
from rich.console import Console

from hf_llava_ft.answering import files
from hf_llava_ft.answering.conversation import Conversation
from hf_llava_ft.answering.loading import load_for_answering
from hf_llava_ft.answering.pictures import open_image
from hf_llava_ft.answering.rows import asked_rows, open_questions
from hf_llava_ft.errors import UserError

LOADING = {"device": "cpu"}


@pytest.fixture
def told():
    return Console(record=True, quiet=True, width=200)


def answered(model, data, folder, output, console=None, **more):
    settings = {"batch_size": 2, "max_new_tokens": 5, "loading": LOADING, "console": console} | more
    return files.answer_file(str(model), str(data), output, str(folder), **settings)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_row_has_its_answer_in_order(llava_ft, tiny_checkpoint, llava_json, tmp_path):
    data, folder = llava_json(5, with_text_rows=True)
    output = tmp_path / "new" / "answers.jsonl"
    flags = ["--data_path", data, "--image_folder", folder, "--output", output, "--max_new_tokens", 5]
    code, _, err = llava_ft("generate", "--model", tiny_checkpoint, *flags, "--batch_size", 2, "--device", "cpu")
    assert code == 0 and f"5 rows are in {output}." in " ".join(err.split())
    found = lines(output)
    assert [line["row"] for line in found] == [1, 2, 3, 4, 5] and found[2]["images"] == []
    assert list(found[0]) == ["row", "id", "prompt", "images", "expected", "answer", "finish_reason"]
    assert found[1]["expected"] == "It is the number 7."
    parts = load_for_answering(str(tiny_checkpoint), device="cpu")
    for index, line in enumerate(found):
        pictures = [open_image(folder / name) for name in line["images"]]
        question = f"What is number {index}?"
        assert line["prompt"] == ("<image>\n" if pictures else "") + question
        assert line["answer"] == Conversation(*parts).ask(question, pictures, max_new_tokens=5)
    assert [path.name for path in output.parent.iterdir()] == ["answers.jsonl"]

    code, _, err = llava_ft("generate", "--model", tiny_checkpoint, *flags)
    assert code == 2 and "is there already" in err


def test_a_killed_command_goes_on_where_it_was(tiny_checkpoint, llava_json, tmp_path, monkeypatch, told):
    data, folder = llava_json(6)
    unbroken, output = tmp_path / "unbroken.jsonl", tmp_path / "answers.jsonl"
    answered(tiny_checkpoint, data, folder, unbroken)
    whole = files.answer_all
    asked = []

    def killed(model, processor, questions, **settings):
        asked.append(len(questions))
        for number, found in enumerate(whole(model, processor, questions, **settings)):
            if number == 3:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(files, "answer_all", killed)
    with pytest.raises(KeyboardInterrupt):
        answered(tiny_checkpoint, data, folder, output)
    assert len(lines(output)) == 3
    with output.open("a") as file:
        file.write('{"row": 4, "id"')  # as a full disk leaves it
    with pytest.raises(UserError, match="was begun with another max_new_tokens"):
        answered(tiny_checkpoint, data, folder, output, max_new_tokens=6)
    assert answered(tiny_checkpoint, data, folder, output, told).num_answered == 6
    assert asked == [6, 3]
    assert output.read_bytes() == unbroken.read_bytes()


def test_other_data_are_not_added_to_a_file(tiny_checkpoint, llava_json, tmp_path, monkeypatch):
    data, folder = llava_json(3)
    output = tmp_path / "answers.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(files, "answer_all", lambda *args, **settings: iter([(0, files.Answer("a", "stop")), 1 / 0]))
        with pytest.raises(ZeroDivisionError):
            answered(tiny_checkpoint, data, folder, output)
    output.write_text('{"row": 1}\n')
    data.write_text(data.read_text().replace("number 1", "number one"))
    with pytest.raises(UserError, match="was begun with another data"):
        answered(tiny_checkpoint, data, folder, output)


def test_a_wrong_row_is_said_before_anything_is_asked(tiny_checkpoint, llava_json, tmp_path):
    data, folder = llava_json(3)
    (folder / "2.png").unlink()
    with pytest.raises(UserError, match="row 3 .*2.png"):
        answered(tiny_checkpoint, data, folder, tmp_path / "answers.jsonl")
    assert not (tmp_path / "answers.jsonl").exists()


def test_a_picture_that_cannot_be_read_is_said_in_its_line(llava_ft, tiny_checkpoint, llava_json, tmp_path):
    data, folder = llava_json(3)
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    output = tmp_path / "answers.jsonl"
    flags = ["--data_path", data, "--image_folder", folder, "--output", output, "--max_new_tokens", 2]
    code, _, err = llava_ft("generate", "--model", tiny_checkpoint, *flags, "--json", tmp_path / "done.json")
    assert code == 1 and "1 without an answer" in " ".join(err.split())
    assert [line["answer"] is None for line in lines(output)] == [False, True, False]
    assert lines(output)[1]["finish_reason"] == "error" and lines(output)[1]["error"]
    assert json.loads((tmp_path / "done.json").read_text()) == {"output": str(output), "answered": 2, "failed": 1}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "What is it?", "image": "a.png"},
        {"prompt": [{"role": "user", "content": "<image>\nWhat is it?"}], "image": "a.png"},
        {"conversations": [{"from": "human", "value": "<image>\nWhat is it?"}], "image": "a.png"},
        {"messages": [{"role": "user", "content": "<image>\nWhat is it?"}], "images": ["a.png"]},
        {"question_id": 7, "image": "a.png", "text": "What is it?"},
        {"image": "a.png", "prompt": "What is it?", "completion": "A square."},
    ],
)
def test_a_row_may_leave_its_answer_open(tmp_path, row):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    [asked] = asked_rows(open_questions(str(tmp_path / "rows.jsonl"), str(tmp_path)), system="Be brief.")
    kinds = [(message["role"], [part["type"] for part in message["content"]]) for message in asked.question.messages]
    assert kinds == [("system", ["text"]), ("user", ["image", "text"])]
    assert asked.line["prompt"] == "<image>\nWhat is it?" and asked.line["images"] == ["a.png"]
    assert asked.line["id"] == ("7" if "question_id" in row else "1")
    assert asked.line.get("expected") == row.get("completion")


@pytest.mark.parametrize("columns", [None, "image=image,prompt=prompt,response=reply"])
def test_the_answer_of_a_table_is_known_by_its_column(tmp_path, columns):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    answer = "response" if columns is None else "reply"
    (tmp_path / "rows.csv").write_text(f"image,prompt,{answer}\na.png,What is it?,A square.\n")
    [asked] = asked_rows(open_questions(str(tmp_path / "rows.csv"), str(tmp_path), columns=columns))
    assert asked.line["expected"] == "A square." and asked.line["prompt"] == "<image>\nWhat is it?"


def test_the_first_question_of_a_long_conversation_is_asked(tmp_path):
    turns = [("human", "A?"), ("gpt", "a"), ("human", "<image>B?"), ("gpt", "b")]
    row = {"image": "a.png", "conversations": [{"from": who, "value": text} for who, text in turns]}
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    [asked] = asked_rows(open_questions(str(tmp_path / "rows.json"), str(tmp_path)))
    assert asked.line == {"row": 1, "id": "1", "prompt": "A?", "images": [], "expected": "a"}
    assert asked.question.images == [] and torch.is_inference_mode_enabled() is False


def test_a_weight_has_no_meaning_for_questions(llava_json):
    data, folder = llava_json(2)
    with pytest.raises(UserError, match="every row is asked once"):
        open_questions(f"{data}:0.5", str(folder))
