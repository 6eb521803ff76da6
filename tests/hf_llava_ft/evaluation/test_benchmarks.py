"""`llava-ft evaluate --tasks` with the real lmms-eval, on a task of our own that needs no Hub."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from PIL import Image

from hf_llava_ft.checkpoints.evaluation_results import read_results

TASK = """
task: which_colour
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
doc_to_visual: !function picture.pictures
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{choices}
generation_kwargs:
  max_new_tokens: 6
  temperature: 0
  until: ["\\n\\n"]
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
PICTURES = """
from PIL import Image


def pictures(row):
    return [Image.open(row["path"]).convert("RGB")] if row["path"] else []
"""


@pytest.fixture
def task_folder(tmp_path):
    """A function that writes a folder with one task, of these answers."""

    def write(answers, kind="generate_until", too_long=None):
        rows = []
        for index, answer in enumerate(answers):
            path = ""
            if index % 3 != 2:
                path = str(tmp_path / f"{index}.png")
                Image.new("RGB", (60 + index, 40), (40 * index, 90, 200)).save(path)
            question = f"What is number {index}?" * (200 if index == too_long else 1)
            rows.append({"question": question, "answer": answer, "path": path})
        folder = tmp_path / f"tasks-{kind}"
        folder.mkdir(exist_ok=True)
        data = folder / "rows.json"
        data.write_text(json.dumps(rows))
        choices = "doc_to_choice: [red, blue]" if kind == "multiple_choice" else ""
        (folder / "which_colour.yaml").write_text(TASK.format(file=data, kind=kind, choices=choices))
        (folder / "picture.py").write_text(PICTURES)
        return folder

    return write


def test_without_lmms_eval_it_is_said_what_to_install(llava_ft, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = llava_ft("evaluate", "--model", tiny_checkpoint, "--tasks", "pope")
    assert code == 2 and "pip install 'hf-llava-ft[lmms-eval]'" in err


def test_what_a_task_says_itself_can_not_be_said_beside_it(llava_ft, tiny_checkpoint):
    code, _, err = llava_ft("evaluate", "--model", tiny_checkpoint, "--tasks", "pope", "--max_new_tokens", 9)
    assert code == 2 and "--max_new_tokens is not for --tasks" in err
    code, _, err = llava_ft("evaluate", "--model", tiny_checkpoint, "--data_path", "rows.json", "--limit", 3)
    assert code == 2 and "--limit" in err


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("lmms_eval") is None, reason="lmms-eval is an extra: pip install 'hf-llava-ft[lmms-eval]'"
)
def test_a_task_of_our_own(llava_ft, own_checkpoint, task_folder, tmp_path, checkout, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    questions = [{"id": str(index), "prompt": f"What is number {index}?"} for index in range(5)]
    for index in (0, 1, 3, 4):
        questions[index]["image"] = f"{index}.png"
    folder = task_folder(["nothing"] * 5)
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, questions)))
    flags = ["--image_folder", tmp_path, "--device", "cpu", "--max_new_tokens", 6, "--output", tmp_path / "ours.jsonl"]
    code, _, err = llava_ft("generate", "--model", own_checkpoint, "--data_path", data, *flags)
    assert code == 0, err
    ours = [json.loads(line)["answer"] for line in (tmp_path / "ours.jsonl").read_text().splitlines()]

    # Three of the five expected answers are what the model says, of two of them with a picture.
    task_folder([ours[0], "nothing", ours[2], ours[3], "nothing"])
    result, into = tmp_path / "result.json", tmp_path / "found"
    flags = ["--task_folder", folder, "--device", "cpu", "--batch_size", 2, "--output_dir", into]
    command = ["evaluate", "--model", own_checkpoint, "--tasks", "which_colour", *flags]
    code, _, err = llava_ft(*command, "--json", result)
    assert code == 0, err
    found = json.loads(result.read_text())
    assert found["rows"] == {"which_colour": 5} and found["without_answer"] == 0
    assert found["tasks"]["which_colour"]["exact_match,none"] == pytest.approx(0.6)
    [samples] = into.rglob("*samples_which_colour.jsonl")
    said = {each["doc_id"]: each["filtered_resps"] for each in map(json.loads, samples.read_text().splitlines())}
    assert [said[index] for index in range(5)] == ours
    [kept] = read_results(own_checkpoint)
    assert (kept.data, kept.rows, kept.figure, kept.value) == ("which_colour", 5, "exact_match", pytest.approx(0.6))
    assert kept.low < kept.value < kept.high

    # Two processes, and one row more, which is longer than the model's context.
    task_folder([ours[0], "nothing", ours[2], ours[3], "nothing", "nothing"], too_long=5)
    flags[-1] = tmp_path / "two"
    # Not by tests/ranks.py, whose processes find another `tests`: a library that lmms-eval brings installs one.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [*launcher, "-m", "hf_llava_ft.evaluate", *command[1:5], *flags, "--json", result]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environment, cwd=checkout)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(result.read_text())
    assert found["rows"] == {"which_colour": 6} and found["without_answer"] == 1
    assert found["tasks"]["which_colour"]["exact_match,none"] == pytest.approx(0.5)
    [samples] = (tmp_path / "two").rglob("*samples_which_colour.jsonl")
    said = {each["doc_id"]: each["filtered_resps"] for each in map(json.loads, samples.read_text().splitlines())}
    assert [said[index] for index in range(6)] == [*ours, ""]

    code, _, err = llava_ft(*command[:4], "witch_colour", *flags)
    assert code == 2 and "lmms-eval has no task witch_colour" in err
    task_folder(["red", "blue"], "multiple_choice")
    code, _, err = llava_ft(*command[:5], "--task_folder", tmp_path / "tasks-multiple_choice", *flags[2:])
    assert code == 2 and "compares likelihoods" in err
