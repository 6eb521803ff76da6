"""What a run leaves behind about itself: summary, report and plot; and what it says while it goes."""

import io
import json
import os
from importlib.metadata import version

import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import TrainerControl, TrainerState

from hf_llava_ft.checkpoints.run_files import SUMMARY_FILE
from hf_llava_ft.data.collator import LlavaCollator
from hf_llava_ft.data.formats import load_data, open_source
from hf_llava_ft.settings.arguments import DataArguments, ModelArguments
from hf_llava_ft.settings.parsing import resolve
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.train import train
from hf_llava_ft.training.progress import LiveProgress, duration
from hf_llava_ft.training.summary import data_facts, settings_of
from hf_llava_ft.training.throughput import Counts, Throughput


@pytest.fixture
def run(tiny_checkpoint, llava_json, tmp_path):
    """`run(**flags)` trains one epoch of 5 rows and gives the result, what was printed, and the data."""
    path, folder = llava_json(5, with_text_rows=True)

    def trained(**flags):
        flags = {
            "model_name_or_path": tiny_checkpoint,
            "data_path": path,
            "image_folder": folder,
            "output_dir": tmp_path / "out",
            "use_cpu": True,
            "num_train_epochs": 1,
            "lora_r": 4,
            "lora_target_modules": "q_proj",
            "per_device_train_batch_size": 2,
            "save_strategy": "no",
            **flags,
        }
        argv = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        printed = io.StringIO()
        result = train(*resolve(argv).build(), console=Console(file=printed, width=200))
        return result, printed.getvalue(), (path, folder)

    return trained


def test_the_summary_tells_of_the_run(run, tiny_processor, tmp_path):
    result, printed, (path, folder) = run(eval_split=0.2, eval_max_new_tokens=4, seed=7)
    summary = json.loads((tmp_path / "out" / SUMMARY_FILE).read_text())
    assert summary == result.summary
    assert (summary["steps"], summary["epochs"], summary["samples"]) == (2, 1.0, 4)
    assert summary["loss"] == {"first": result.losses[0], "last": result.losses[-1]}
    assert summary["settings"]["seed"] == 7 and summary["settings"]["lora_r"] == 4
    assert summary["settings"]["lora_target_modules"] == ["q_proj"]
    assert summary["settings"]["data_path"] == str(path)
    assert "weight_decay" not in summary["settings"]  # as transformers has it
    assert summary["versions"]["torch"] == version("torch")
    assert summary["data"]["sources"][0]["bytes"] == path.stat().st_size
    assert summary["data"]["sources"][0]["name"] == "data.json"
    # Of five rows the third is of text alone; four are trained on, and one is evaluated.
    evaluated_text = summary["data"]["rows_with_images"] == 4
    assert (summary["data"]["rows"], summary["data"]["images"]) == (4, 4 if evaluated_text else 3)
    assert summary["seed"] == 7 and summary["rows_per_step"] == 2 and summary["base"] == []  # a folder has no commit
    assert summary["supervised_share"] == round(summary["supervised_tokens"] / summary["tokens"], 4) > 0
    assert {part["part"]: part["learning_rate"] for part in summary["trained"]}["language_model"] == "0.0002"
    assert {part["part"]: part["learning_rate"] for part in summary["trained"]}["vision_tower"] == "-"
    assert [part["part"] for part in summary["trained"] if part["num_trainable"]] == [
        *("multi_modal_projector", "language_model"),
    ]
    assert 0 < summary["seconds_without_evaluation"] <= summary["seconds"]
    assert summary["peak_memory"]["bytes"] > 50 * 2**20
    assert "evaluation loss" in printed and "samples/s" in printed and "tokens/s" in printed and "0:00 left" in printed
    assert not [name for name in os.listdir(tmp_path / "out") if "tmp" in name or "partial" in name]


def test_the_tokens_are_those_of_the_rows_without_padding(run, tiny_processor):
    result, _, (path, folder) = run()
    collate = LlavaCollator(tiny_processor)
    rows = [collate([row]) for row in load_data(path, folder)]  # one by one: no padding
    assert result.summary["samples"] == 5
    assert result.summary["tokens"] == sum(row["input_ids"].numel() for row in rows)
    assert result.summary["supervised_tokens"] == sum(int((row["labels"] != -100).sum()) for row in rows)
    padded = collate(list(load_data(path, folder)))["input_ids"].numel()
    assert padded > result.summary["tokens"]


def test_report_and_plot_show_answers_escaped_and_ask_for_nothing(run, tmp_path, llava_json):
    prompts = tmp_path / "prompts.json"
    rows = [
        {"images": ["0.png", "1.png"], "prompt": "<script>alert(1)</script>"},
        {"image": "3.png", "conversations": [{"from": "human", "value": "<image>\nWhat is number 3?"}]},
    ]
    prompts.write_text(json.dumps(rows))
    _, printed, _ = run(eval_prompts=prompts, eval_max_new_tokens=4, eval_split=0.2, eval_strategy="epoch")
    lines = [json.loads(line) for line in (tmp_path / "out" / "eval_answers.jsonl").read_text().splitlines()]
    assert [(line["step"], line["index"]) for line in lines] == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert lines[1]["prompt"] == "What is number 3?" and lines[1]["images"] == ["3.png"]
    assert "What is number 3? (3.png)" in printed
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page
    assert page.count("data:image/jpeg;base64,") == 3 and "http" not in page.replace("http-equiv", "")
    assert "Evaluation" in page and "before training" in page and "step 2" in page
    with Image.open(tmp_path / "out" / "loss.png") as plot:
        assert plot.size == (900, 450)


def test_the_answers_are_those_of_the_model_before_and_after(run, tmp_path, tiny_checkpoint):
    """In a run without evaluations, the answers are those of the model before it, and of the saved result."""
    from peft import PeftModel

    from hf_llava_ft.answering.conversation import Conversation
    from hf_llava_ft.checkpoints.opening import load_model, load_processor

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"image": "1.png", "prompt": "What is it?"}\n')
    flags = {"eval_prompts": prompts, "eval_max_new_tokens": 8, "learning_rate": 0.01, "num_train_epochs": 6}
    result, _, (_, folder) = run(**flags)
    before, after = map(json.loads, (tmp_path / "out" / "eval_answers.jsonl").read_text().splitlines())
    processor = load_processor(str(result.adapter_dir))
    base = load_model(str(tiny_checkpoint), processor).eval()
    with Image.open(folder / "1.png") as picture:
        ask = {"images": [picture.convert("RGB")], "max_new_tokens": 8}
        untrained = Conversation(base, processor).ask("What is it?", **ask)
        trained = PeftModel.from_pretrained(base, str(result.adapter_dir)).eval()
        assert before["answer"] == untrained
        assert after["answer"] == Conversation(trained, processor).ask("What is it?", **ask) != untrained
    assert (before["step"], after["step"]) == (0, result.summary["steps"])


def test_settings_hide_secrets_and_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    arguments = (
        ModelArguments("/home/someone/models/llava"),
        DataArguments(data_path="a.json,/home/someone/b.json:0.5"),
        LlavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, hub_token="hf_secret", weight_decay=0.1),
    )
    settings = settings_of(*arguments)
    text = json.dumps(settings)
    assert "hf_secret" not in text and "someone" not in text
    assert settings["model_name_or_path"] == "~/models/llava"
    assert settings["data_path"] == "a.json,~/b.json:0.5"
    assert settings["weight_decay"] == 0.1 and settings["image_folder"] == "."
    assert "adam_beta1" not in settings and "accelerator_config" not in settings


def test_the_fingerprint_is_of_the_contents(llava_json, tmp_path):
    path, folder = llava_json(3)
    facts = data_facts(open_source(path, folder))
    copy = tmp_path / "copy.json"
    copy.write_bytes(path.read_bytes())
    assert data_facts(open_source(copy, folder))["fingerprint"] == facts["fingerprint"]
    assert data_facts(open_source(f"{copy}:0.5", folder))["fingerprint"] != facts["fingerprint"]
    copy.write_bytes(path.read_bytes().replace(b"number 1?", b"number 9?"))
    assert data_facts(open_source(copy, folder))["fingerprint"] != facts["fingerprint"]


def test_counts_are_of_one_run():
    throughput = Throughput()
    batch = {"input_ids": torch.ones(2, 4), "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}
    batch["labels"] = torch.tensor([[-100, 1, 1, -100], [-100, 1, 1, 1]])
    throughput.count(batch)
    throughput.count({"pixels": torch.ones(2)})  # of another collator
    assert throughput.local() == throughput.total(torch.device("cpu")) == Counts(2, 7, 5)
    throughput.start()
    assert throughput.local() == Counts(0, 0, 0)


def test_the_time_left_goes_by_the_steps_of_this_run(tmp_path):
    printed = io.StringIO()
    progress = LiveProgress(Console(file=printed, width=200))

    class Half(Throughput):
        def local(self):
            return Counts(20, 4000, 10)

        def training_seconds(self):
            return 50.0

    progress.throughput = Half()
    args = LlavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    state, control = TrainerState(max_steps=110, global_step=100), TrainerControl()
    state.is_world_process_zero = True
    progress.on_train_begin(args, state, control)  # resumed at step 100
    state.global_step = 105
    progress.on_log(args, state, control, logs={"loss": 1.5})
    progress.on_train_end(args, state, control)
    assert printed.getvalue().strip() == "step 105/110  loss 1.5000  0.4 samples/s  80 tokens/s  0:50 left"
    assert [duration(seconds) for seconds in (7, 750, 11100)] == ["0:07", "12:30", "3:05:00"]
