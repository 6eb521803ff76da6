"""A run that held rows out is evaluated on just those, beside its base; and what it says of what it forgot."""

import json

import pytest

from hf_llava_ft.checkpoints.run_files import RETENTION_FILE
from hf_llava_ft.evaluation.metrics.given import Given
from hf_llava_ft.evaluation.retention import METRICS, retention_scores, told_of_retention
from hf_llava_ft.settings.parsing import resolve
from hf_llava_ft.train import train
from hf_llava_ft.training.evaluation import held_out
from hf_llava_ft.training.rows import open_all_rows

FLAGS = {"use_cpu": True, "max_steps": 2, "lora_r": 4, "learning_rate": 3e-2, "per_device_train_batch_size": 2}
FLAGS |= {"save_strategy": "no", "eval_split": 0.4, "num_eval_answers": 0, "seed": 7}


def arguments(**flags):
    return resolve([str(word) for name, value in (FLAGS | flags).items() for word in (f"--{name}", value)]).build()


def test_the_rows_that_a_run_held_out_are_found_again(llava_ft, tiny_checkpoint, llava_json, tmp_path, capfd):
    data, folder = llava_json(9, with_text_rows=True)
    out = tmp_path / "out"
    flags = {"model_name_or_path": tiny_checkpoint, "data_path": data, "image_folder": folder, "output_dir": out}
    built = arguments(**flags, retention_probe=True)
    result = train(*built)
    assert "forg" in capfd.readouterr().err
    kept = json.loads((out / RETENTION_FILE).read_text())
    assert len(kept["before"]) == len(kept["after"]) == 40 and len(kept["figures"]) == 2
    assert kept["before"] != kept["after"]  # it did train in between

    words = ("--model", out, "--eval_split", out, "--max_new_tokens", 4, "--output_dir", tmp_path / "found")
    code, _, err = llava_ft("evaluate", *words)
    assert code == 0, err
    rows = open_all_rows(built[1], built[3]).rows
    _, expected = held_out(rows, rows.that_fit(_processor(tiny_checkpoint), 512), 0.4, 7)
    lines = [json.loads(line) for line in (tmp_path / "found" / "answers-tuned.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == expected["id"] and len(lines) == 4
    found = json.loads((tmp_path / "found" / "result.json").read_text())
    assert found["base"] == str(tiny_checkpoint) and found["data"] == "data.json, held out"
    [loss] = [each for each in found["figures"] if each["figure"] == "loss"]
    # The same weights and rows as at the end of training, where a batch is padded otherwise.
    assert loss["tuned"]["value"] == pytest.approx(result.summary["eval_loss"]["last"]["loss"], rel=1e-4)
    assert loss["base"]["value"] != pytest.approx(loss["tuned"]["value"], rel=1e-3)
    card = (out / "README.md").read_text()
    assert "data.json, held out" in card and "model-index" in card

    data.write_text(data.read_text().replace("number 1", "number one"))
    code, _, err = llava_ft("evaluate", "--model", out, "--eval_split", out, "--output_dir", tmp_path / "other")
    assert code == 2 and "is not what" in err
    code, _, err = llava_ft("evaluate", "--model", out, "--eval_split", tiny_checkpoint)
    assert code == 2 and "is not the folder of a finished run" in err


def _processor(path):
    from hf_llava_ft.checkpoints.opening import load_processor

    return load_processor(str(path))


def test_what_was_forgotten_is_said_with_what_helps():
    right = [Given("a", ("a",), ("a", "b"), choice_losses=(1.0, 2.0))] * 40
    wrong = [Given("b", ("a",), ("a", "b"), choice_losses=(2.0, 1.0))] * 40
    said = told_of_retention(retention_scores(wrong[:15] + right[15:], right))
    assert said.startswith(
        "It forgot: 62.5% of the likeliest choices are right, 100.0% before and 62.5% of the answers"
    )
    assert "--lora_r" in said and "mixed in" in said and "--num_train_epochs" in said
    kept = told_of_retention(retention_scores(wrong[:1] + right[1:], right))
    assert kept.startswith("Nothing forgotten beyond noise") and "--lora_r" not in kept
    assert [metric.name for metric in METRICS] == ["choice_likelihood", "exact_match"]


def test_the_probe_needs_the_model_in_one_process(llava_ft, tiny_checkpoint, llava_json, tmp_path):
    data, folder = llava_json(3)
    flags = ["--model_name_or_path", tiny_checkpoint, "--data_path", data, "--image_folder", folder, "--use_cpu", True]
    flags += ["--output_dir", tmp_path / "out", "--retention_probe", True, "--fsdp", "full_shard"]
    code, _, err = llava_ft("train", *flags)
    assert code == 2 and "evaluate --retention" in err
