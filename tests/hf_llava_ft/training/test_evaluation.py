"""The loss of an evaluation is that of a plain computation, and a run with evaluations trains as one without."""

import json
import random
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import Trainer

from hf_llava_ft.checking.sound_rows import sound_rows
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.checkpoints.run_files import ANSWERS_FILE
from hf_llava_ft.data.collator import LlavaCollator
from hf_llava_ft.errors import UserError
from hf_llava_ft.evaluation.token_losses import LossOverTokens
from hf_llava_ft.settings.parsing import resolve
from hf_llava_ft.train import main as train_main
from hf_llava_ft.train import train
from hf_llava_ft.training.answer_logs import AnswerLogs
from hf_llava_ft.training.eval_prompts import held_out_prompts
from hf_llava_ft.training.evaluation import held_out, untouched_rng


@pytest.fixture
def data(tmp_path, llava_json):
    """Rows whose answers differ much in length, so that the mean over batches is not that over tokens."""
    path, folder = llava_json(11, with_text_rows=True)
    rows = json.loads(path.read_text())
    for index, row in enumerate(rows):
        row["conversations"][1]["value"] *= 1 + 3 * (index % 4)
    path.write_text(json.dumps(rows))
    return path, folder


@pytest.fixture
def run(tiny_checkpoint, data, tmp_path):
    """`run(name, **flags)` trains 4 steps with dropout and gives the result and its log."""

    def trained(name, **flags):
        path, folder = data
        flags = {
            "model_name_or_path": tiny_checkpoint,
            "data_path": path,
            "image_folder": folder,
            "output_dir": tmp_path / name,
            "use_cpu": True,
            "max_steps": 4,
            "lora_r": 4,
            "lora_dropout": 0.2,
            "learning_rate": 3e-3,
            "per_device_train_batch_size": 2,
            "save_strategy": "no",
            "eval_max_new_tokens": 4,
            **flags,
        }
        argv = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        result = train(*resolve(argv).build())
        return result, json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]

    return trained


def plain_loss(model, processor, dataset) -> tuple[float, float]:
    """The mean over the supervised tokens of all rows, row by row from the logits; and the mean of the rows' means."""
    collate = LlavaCollator(processor)
    num_tokens = max(processor.tokenizer.get_vocab().values()) + 1
    sums, counts = [], []
    for row in dataset:
        batch = collate([row])
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits.double()[0, :-1, :num_tokens]
        logits[:, processor.image_token_id :][:, :1] = float("-inf")
        targets = labels[0, 1:]
        kept = targets != -100
        log_probabilities = logits.log_softmax(-1)[kept, targets[kept]]
        sums.append(-log_probabilities.sum().item())
        counts.append(int(kept.sum()))
    return sum(sums) / sum(counts), float(np.mean([total / count for total, count in zip(sums, counts, strict=True)]))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_loss_is_that_of_a_plain_computation(run, data, tiny_checkpoint, batch_size):
    path, folder = data
    flags = {"eval_data_path": path, "per_device_eval_batch_size": batch_size}
    result, log = run("out", **flags, eval_strategy="steps", eval_steps=4)
    found = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    processor = load_processor(str(tiny_checkpoint))
    model = load_model(str(tiny_checkpoint), processor)
    model = PeftModel.from_pretrained(model, str(result.adapter_dir)).eval()
    rows = sound_rows(path, folder).that_fit(processor, 512)
    expected, mean_of_means = plain_loss(model, processor, rows)
    assert found == [pytest.approx(expected, rel=1e-6)]
    assert mean_of_means != pytest.approx(expected, rel=1e-3)
    assert result.summary["eval_loss"]["last"] == {"step": 4, "loss": found[0]}


def test_the_loss_does_not_depend_on_the_batches_as_that_of_transformers_does(run, data, monkeypatch):
    def losses(name):
        found = []
        for size in (1, 4):
            _, log = run(f"{name}{size}", eval_data_path=data[0], per_device_eval_batch_size=size, max_steps=1)
            found += [entry["eval_loss"] for entry in log if "eval_loss" in entry]
        return found

    one, four = losses("ours")
    assert one == pytest.approx(four, rel=1e-6)
    trainer = sys.modules["hf_llava_ft.training.trainer"].LlavaTrainer
    monkeypatch.setattr(trainer, "prediction_step", Trainer.prediction_step)
    one, four = losses("theirs")
    assert one != pytest.approx(four, rel=1e-3)


def weights(result):
    return load_file(result.adapter_dir / "adapter_model.safetensors")


@pytest.fixture
def prompts(tmp_path, data):
    path = tmp_path / "prompts.jsonl"
    rows = [{"image": "1.png", "prompt": "What is it?"}, {"prompt": "Who?"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_training_is_the_same_with_evaluations(run, data, prompts, monkeypatch):
    without, _ = run("without")
    flags = {"eval_data_path": data[0], "eval_prompts": prompts, "eval_max_new_tokens": 6}
    flags |= {"eval_strategy": "steps", "eval_steps": 1, "gradient_checkpointing": True}
    evaluated, log = run("evaluated", **flags)
    assert len([entry for entry in log if "eval_loss" in entry]) == 4
    assert evaluated.losses == without.losses
    expected, found = weights(without), weights(evaluated)
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    # The control: when evaluation leaves its traces in the random numbers, dropout is another one.
    for module in ("hf_llava_ft.training.trainer", "hf_llava_ft.training.eval_prompts"):
        monkeypatch.setattr(sys.modules[module], "untouched_rng", torch.enable_grad)
    assert run("touched", **flags)[0].losses != without.losses


def test_random_numbers_go_on_as_if_nothing_had_been():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = draw(), draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    first = draw()
    with untouched_rng():
        draw()
    assert (first, draw()) == expected


def test_rows_are_held_out(data):
    path, folder = data
    rows = sound_rows(path, folder)
    dataset = rows.parts[0].dataset
    kept, evaluated = held_out(rows, dataset, 0.3, seed=1)
    ids = [row["id"] for row in dataset]
    kept, evaluated = [row["id"] for row in kept], [row["id"] for row in evaluated]
    assert len(evaluated) == 3 and sorted(kept + evaluated) == sorted(ids)
    assert kept == [each for each in ids if each in kept]
    assert [row["id"] for row in held_out(rows, dataset, 0.3, seed=1)[1]] == evaluated
    assert [row["id"] for row in held_out(rows, dataset, 0.3, seed=2)[1]] != evaluated
    assert len(held_out(rows, dataset, 0.001, seed=1)[1]) == 1
    with pytest.raises(UserError, match="leaves none to train on"):
        held_out(rows, dataset, 0.99, seed=1)
    repeated = sound_rows(f"{path}:2.0", folder)
    with pytest.raises(UserError, match="repeated by its weight"):
        held_out(repeated, dataset, 0.3, seed=1)


def test_held_out_rows_are_not_trained_on(run):
    result, _ = run("out", eval_split=0.2, num_train_epochs=1, max_steps=-1, per_device_train_batch_size=1)
    data = result.summary["data"]
    assert (data["rows"], data["rows_evaluated"]) == (9, 2)
    assert result.summary["samples"] == 9 and result.summary["steps"] == 9


@pytest.mark.parametrize("train_type", [pytest.param("lora", marks=pytest.mark.slow), "freeze_vision"])
def test_a_run_ends_when_evaluation_gets_no_better_and_keeps_the_best(run, data, tiny_checkpoint, train_type):
    path, folder = data
    flags = {"eval_data_path": path, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    flags |= {"save_steps": 1, "early_stopping_patience": 2, "max_steps": 40, "learning_rate": 0.05}
    flags |= {"train_type": train_type, "lr_scheduler_type": "constant_with_warmup"}
    result, log = run("out", **flags)
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert len(losses) == result.summary["steps"] < 40
    assert min(losses) == losses[-3] < min(losses[-2:])
    processor = load_processor(str(result.adapter_dir))
    if train_type == "lora":
        model = PeftModel.from_pretrained(load_model(str(tiny_checkpoint), processor), str(result.adapter_dir))
    else:
        model = load_model(str(result.adapter_dir), processor)
    expected, _ = plain_loss(model.eval(), processor, sound_rows(path, folder).that_fit(processor, 512))
    assert min(losses) == pytest.approx(expected, rel=1e-5)


def test_rows_that_are_held_out_are_asked_and_shown_beside_what_was_expected(run, data, tmp_path):
    flags = {"eval_split": 0.4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    result, _ = run("out", **flags)
    lines = [json.loads(line) for line in (tmp_path / "out" / ANSWERS_FILE).read_text().splitlines()]
    assert [(line["step"], line["index"]) for line in lines] == [
        (step, index) for step in (0, 2, 4) for index in range(3)
    ]
    rows = {row["conversations"][0]["value"].removeprefix("<image>\n"): row for row in json.loads(data[0].read_text())}
    asked = {line["prompt"]: line for line in lines}
    assert len(asked) == 3
    for prompt, line in asked.items():
        assert line["expected"] == rows[prompt]["conversations"][1]["value"]
        assert line["images"] == ([rows[prompt]["image"]] if "image" in rows[prompt] else [])

    said = "\n".join(result.last_lines)
    first = [line for line in lines if line["index"] == 0]
    assert f"expected: {first[0]['expected']}" in said and said.index("before:") < said.index("after:")
    assert str(tmp_path / "out" / "report.html") in said and "rows that were not trained on" in said
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<summary>1 evaluation between</summary>") == 3 and page.count("<h4>expected</h4>") == 3

    # The card is ours wherever an adapter lies, and names no folder of this machine.
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-2"):
        card = (folder / "README.md").read_text()
        assert "A LoRA adapter for" in card and "hf_llava_ft" in card and "More Information Needed" not in card
        assert "## Training" in card and str(tmp_path) not in card and "not recorded" not in card
    assert (
        "![" in (tmp_path / "out" / "README.md").read_text()
        or "loss.png" in (tmp_path / "out" / "README.md").read_text()
    )

    run("none", **flags | {"num_eval_answers": 0, "save_strategy": "no"})
    assert not (tmp_path / "none" / ANSWERS_FILE).exists()


def test_a_row_is_asked_its_first_question_with_the_pictures_of_it():
    def content(*parts):
        return [{"type": "image", "text": None} if part is None else {"type": "text", "text": part} for part in parts]

    row = {
        "messages": [
            {"role": "system", "content": content("Be brief.")},
            {"role": "user", "content": content(None, "What is it?")},
            {"role": "assistant", "content": content("A cat.")},
            {"role": "user", "content": content(None, "And that?")},
            {"role": "assistant", "content": content("A dog.")},
        ],
        "images": [{"bytes": None, "path": "/somewhere/cat.png"}, {"bytes": None, "path": "/somewhere/dog.png"}],
    }
    [prompt] = held_out_prompts([row], 3)
    assert (prompt.question, prompt.expected, prompt.images) == ("What is it?", "A cat.", ["cat.png"])
    assert prompt.stored == row["images"][:1]
    assert prompt.conversation() == [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    ]
    assert held_out_prompts(None, 3) == [] and held_out_prompts([row], 0) == []


class Reporter(ModuleType):
    """What `wandb` and `trackio` have in common, as the two were seen to take it: wandb 0.31, trackio 0.43."""

    def __init__(self, name):
        super().__init__(name)
        self.run, self.logged = object(), []
        self.context_vars = SimpleNamespace(current_run=SimpleNamespace(get=lambda: self.run))

    def Image(self, picture):
        return ("picture", picture.size)

    def Table(self, columns, data):
        return [dict(zip(columns, row, strict=True)) for row in data]

    def log(self, values):
        self.logged.append(values)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_answers_and_pictures_go_to_other_reporters_too(name, monkeypatch):
    reporter = Reporter(name)
    monkeypatch.setitem(sys.modules, name, reporter)
    logs = AnswerLogs()
    logs.tables = [name]
    answers = [
        {"step": 0, "index": 0, "prompt": "What?", "images": ["a.png"], "answer": "no", "expected": "yes"},
        {"step": 2, "index": 0, "prompt": "What?", "images": ["a.png"], "answer": "yes", "expected": "yes"},
        {"step": 2, "index": 1, "prompt": "Who?", "images": [], "answer": "I"},
    ]
    logs.show(answers, 2, lambda: [[Image.new("RGB", (4, 3))], []])
    [logged] = reporter.logged
    assert logged["train/global_step"] == 2
    assert [tuple(row.values()) for row in logged["eval_prompts"]] == [
        (0, "What?", ("picture", (4, 3)), "yes", "no"),
        (2, "What?", ("picture", (4, 3)), "yes", "yes"),
        (2, "Who?", None, None, "I"),
    ]
    reporter.run = None  # over
    logs.show(answers, 3, lambda: [[], []])
    assert len(reporter.logged) == 1


class Killed(Exception):
    pass


def test_answers_go_on_after_a_resume_without_a_step_twice(run, prompts, tmp_path, monkeypatch):
    def steps_of(name):
        lines = (tmp_path / name / ANSWERS_FILE).read_text().splitlines()
        return [(line["step"], line["index"], line["answer"]) for line in map(json.loads, lines)]

    flags = {"eval_prompts": prompts, "eval_max_new_tokens": 5, "eval_split": 0.2, "eval_strategy": "steps"}
    flags |= {"eval_steps": 1, "save_strategy": "steps", "save_steps": 2}
    run("whole", **flags)
    expected = steps_of("whole")
    assert [step for step, _, _ in expected] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]

    def killed(self, args, state, control, **kwargs):
        if state.global_step == 3:  # has been evaluated, and is behind the last checkpoint
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(
            sys.modules["hf_llava_ft.training.progress"].LiveProgress, "on_step_begin", killed, raising=False
        )
        with pytest.raises(Killed):
            run("broken", **flags)
    assert [step for step, _, _ in steps_of("broken")][-1] == 3
    run("broken", **flags, resume_from_checkpoint=True)
    assert steps_of("broken") == expected
    done, _ = run("broken", **flags, resume_from_checkpoint=True)  # behind its last step
    assert steps_of("broken") == expected and done.summary["steps"] == 4


def test_early_stopping_from_the_command_line(data, tiny_checkpoint, tmp_path, capsys):
    path, folder = data
    flags = {"model_name_or_path": tiny_checkpoint, "data_path": path, "image_folder": folder, "use_cpu": True}
    flags |= {"output_dir": tmp_path / "out", "eval_data_path": path, "eval_strategy": "steps", "eval_steps": 1}
    flags |= {"save_strategy": "steps", "save_steps": 1, "early_stopping_patience": 1, "max_steps": 40, "lora_r": 4}
    flags |= {"learning_rate": 0.3, "lr_scheduler_type": "constant", "save_total_limit": 1, "eval_max_new_tokens": 4}
    train_main([str(word) for name, value in flags.items() for word in (f"--{name}", value)])
    summary = json.loads((tmp_path / "out/train_summary.json").read_text())
    best = summary["eval_loss"]["best"]
    assert best["step"] == summary["steps"] - 1 < 39
    said = f"Stopped after step {summary['steps']} of 40: 1 evaluation was no better. The result is that of step"
    assert f"{said} {best['step']}, eval_loss {best['loss']:.4f}." in capsys.readouterr().err
    kept = [folder.name for folder in (tmp_path / "out").glob("checkpoint-*")]
    assert kept == [f"checkpoint-{best['step']}"]
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    expected = load_file(tmp_path / "out" / kept[0] / "adapter_model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_tensorboard_shows_the_answers_and_once_the_pictures(run, prompts, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = {"eval_split": 0.2, "eval_strategy": "steps", "eval_steps": 2, "eval_max_new_tokens": 5}
    run("out", eval_prompts=prompts, report_to="tensorboard", **flags)
    [events] = (tmp_path / "out" / "runs").iterdir()
    logged = EventAccumulator(str(events), {"images": 0, "tensors": 0, "scalars": 0}).Reload()
    pictures = logged.Images("eval_prompts/0/0")
    assert [(picture.step, picture.width, picture.height) for picture in pictures] == [(0, 61, 40)]
    for index, question in enumerate(("What is it?", "Who?")):
        texts = logged.Tensors(f"eval_prompts/{index}/text_summary")
        assert [text.step for text in texts] == [0, 2, 4]
        assert texts[0].tensor_proto.string_val[0].decode().startswith(f"{question}\n\n")
    assert [each.step for each in logged.Scalars("eval/loss")] == [2, 4]


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ({"eval_strategy": "steps", "eval_steps": 1}, "needs rows to evaluate"),
        ({"eval_split": 1.5}, "is not a share of the rows"),
        ({"eval_split": 0.1, "eval_data_path": "x.json"}, "leave one out"),
        ({"eval_split": 0.1, "streaming": True}, "use eval_data_path"),
        ({"early_stopping_patience": 2, "eval_split": 0.1}, "needs evaluations"),
        ({"eval_prompts": "nowhere.json"}, "nowhere.json cannot be read"),
        ({"eval_data_path": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(run, tmp_path, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        run("out", **flags)
    assert not (tmp_path / "out" / ANSWERS_FILE).exists()


def test_over_tokens_is_what_the_loss_is_of():
    logits = torch.randn(5, 12)
    loss = LossOverTokens(num_tokens=10, image_token_id=3)
    kept = loss.over_tokens(logits)
    assert kept.shape == (5, 10) and (kept[:, 3] == float("-inf")).all()
