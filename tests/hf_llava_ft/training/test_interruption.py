"""A signal, whenever it comes, ends a run with 128 and its number, and the same command again makes of it the run that
nobody stopped."""

import json
import multiprocessing
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hf_llava_ft.train as train_module
from hf_llava_ft.termination import exit_on_sigterm
from hf_llava_ft.training.resuming.interruption import SIGNALS
from hf_llava_ft.training.trainer import LlavaTrainer


def words_of(flags: dict) -> tuple:
    return tuple(word for name, value in flags.items() for word in (f"--{name}", value))


def test_training_that_fails_gives_the_signals_back(llava_ft, tiny_checkpoint, llava_json, tmp_path):
    data, images = llava_json(4)
    rows = json.loads(data.read_text())
    rows[3]["conversations"] = []
    data.write_text(json.dumps(rows))
    exit_on_sigterm()  # as every command begins
    before = [signal.getsignal(number) for number in SIGNALS]
    flags = {"model_name_or_path": tiny_checkpoint, "data_path": data, "image_folder": images, "use_cpu": True}
    flags |= {"output_dir": tmp_path / "out", "streaming": True, "shuffle_buffer_size": 0, "max_steps": 4}
    code, _, err = llava_ft("train", *words_of(flags))
    assert code == 2 and "row 4" in err  # which is met when training is under way
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.fixture
def flags(tiny_checkpoint, llava_json, tmp_path):
    data, images = llava_json(10)
    flags = {"model_name_or_path": tiny_checkpoint, "data_path": data, "image_folder": images, "use_cpu": True}
    flags |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 1, "learning_rate": 1e-3, "lora_r": 4}
    flags |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "eval_split": 0.4}
    flags |= {"num_eval_answers": 1, "eval_max_new_tokens": 4}  # asked again by each of fifty runs
    return {**flags, "lora_alpha": 8, "lora_dropout": 0.1, "mm_projector_lr": 1e-3}


IN_TRAINING = {"eval_strategy": "steps", "eval_steps": 2}
# All that an evaluation can decide.
DECIDING = {**IN_TRAINING, "load_best_model_at_end": True, "save_total_limit": 1, "metric_for_best_model": "eval_loss"}
DECIDING |= {"early_stopping_patience": 1, "greater_is_better": True}
BY_EPOCH = {"eval_strategy": "epoch", "save_strategy": "epoch"}
BEST = {**IN_TRAINING, "save_strategy": "best", "metric_for_best_model": "eval_loss", "load_best_model_at_end": True}


def on_call(monkeypatch, owner, name: str, number: int, which: int) -> list[int]:
    """Raises the signal in the call of that number; gives the list of the calls."""
    calls: list[int] = []
    original = getattr(owner, name)

    def call(*args, **kwargs):
        calls.append(len(calls) + 1)
        if len(calls) == which:
            signal.raise_signal(number)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls


def course_of(folder: Path) -> list[tuple[int, float]]:
    """Losses and evaluation losses, as they were logged."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry[key]) for entry in log for key in ("loss", "eval_loss") if key in entry]


# What is being done, which call of it, under which settings: (exit code but for the signal, last checkpoint, calls).
PHASES = {
    "reading": ((train_module, "open_all_rows", 1, {}), (143, None, 1)),
    "loading": ((train_module, "with_tuning", 1, {}), (143, None, 1)),
    "preparing": ((LlavaTrainer, "create_optimizer", 1, {}), (143, None, 1)),
    "an evaluation at the start": ((LlavaTrainer, "prediction_step", 2, {"eval_on_start": True}), (143, None, 2)),
    "a step": ((LlavaTrainer, "training_step", 3, {}), (143, 3, 3)),
    "a step, by epoch": ((LlavaTrainer, "training_step", 2, BY_EPOCH), (143, 2, 2)),
    "the end of an epoch": ((LlavaTrainer, "training_step", 3, BY_EPOCH), (143, 3, 3)),
    "a checkpoint": ((LlavaTrainer, "_save_checkpoint", 1, {}), (143, 2, 1)),
    "an evaluation": ((LlavaTrainer, "prediction_step", 2, IN_TRAINING), (143, 2, 2)),
    "a deciding evaluation": ((LlavaTrainer, "prediction_step", 2, DECIDING), (143, 2, 2)),
    "the best so far": ((LlavaTrainer, "prediction_step", 2, BEST), (143, 2, 2)),
    "the last evaluation": ((LlavaTrainer, "prediction_step", 6, IN_TRAINING), (143, 4, 6)),
    "the last step": ((LlavaTrainer, "training_step", 4, IN_TRAINING), (143, 4, 4)),
    "the result, evaluation to come": ((train_module, "save_result", 1, {}), (143, 4, 1)),
    "the evaluation behind the result": ((LlavaTrainer, "prediction_step", 2, {"save_strategy": "no"}), (143, 4, 2)),
    "the result": ((train_module, "save_result", 1, {"eval_split": 0}), (0, 4, 1)),
    "the report": ((train_module, "write_facts", 1, {}), (0, 4, 1)),
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Folders of runs that nobody stopped, by what was added to their settings."""
    return {}, tmp_path_factory.mktemp("unbroken")


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_that_a_signal_stops_goes_on_as_if_it_had_not_come(
    llava_ft, flags, unbroken, tmp_path, monkeypatch, phase
):
    (owner, name, which, changed), (code, last, num_calls) = PHASES[phase]
    flags = {name: value for name, value in {**flags, **changed}.items() if value != 0}
    done, folder = unbroken
    if str(changed) not in done:
        done[str(changed)] = folder / str(len(done))
        assert llava_ft("train", *words_of({**flags, "output_dir": done[str(changed)]}))[0] == 0
    words = words_of({**flags, "output_dir": tmp_path / "out", "resume_from_checkpoint": "auto"})
    with monkeypatch.context() as patched:
        calls = on_call(patched, owner, name, signal.SIGTERM, which)
        ended, _, err = llava_ft("train", *words)
    assert (ended, len(calls)) == (code, num_calls), err
    saved = sorted((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert [path.name for path in saved[-1:]] == ([] if last is None else [f"checkpoint-{last}"])
    assert not list(tmp_path.glob(".out.*")) and not list((tmp_path / "out").glob(".*"))
    if code:
        assert (last is None) != ("give the same command with --resume_from_checkpoint True" in err)
        assert llava_ft("train", *words)[0] == 0
    expected = done[str(changed)]
    assert course_of(tmp_path / "out") == course_of(expected)
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", expected)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_what_is_made_up_for_can_be_stopped_too(llava_ft, flags, tmp_path, monkeypatch):
    words = words_of({**flags, **IN_TRAINING, "output_dir": tmp_path / "out", "resume_from_checkpoint": "auto"})
    for which in (2, 1):
        with monkeypatch.context() as patched:
            calls = on_call(patched, LlavaTrainer, "prediction_step", signal.SIGTERM, which)
            code, _, err = llava_ft("train", *words)
        assert (code, len(calls)) == (143, which) and "Stopped after step 2, with a checkpoint" in err
    assert llava_ft("train", *words)[0] == 0
    assert [step for step, _ in course_of(tmp_path / "out")] == [1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize("number", [number for number in SIGNALS if number != signal.SIGINT])
def test_the_exit_code_says_which_signal_it_was(llava_ft, flags, tmp_path, monkeypatch, number):
    for owner, name in ((train_module, "with_tuning"), (LlavaTrainer, "training_step")):
        with monkeypatch.context() as patched:
            on_call(patched, owner, name, number, 1)
            assert llava_ft("train", *words_of({**flags, "output_dir": tmp_path / name}))[0] == 128 + number


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="workers are not forked there")
def test_a_signal_that_reaches_the_workers_too_is_their_parents(llava_ft, flags, tmp_path, monkeypatch):
    """A worker that died of it would end the run with an error, before the checkpoint."""
    original, children = LlavaTrainer.training_step, []

    def step(trainer, *args, **kwargs):
        children.extend(process for process in multiprocessing.active_children() if process not in children)
        if trainer.state.global_step == 1:
            for number in SIGNALS:  # not sent by their parent
                subprocess.run(["kill", f"-{number}", *(str(process.pid) for process in children)], check=True)
            signal.raise_signal(signal.SIGTERM)
        return original(trainer, *args, **kwargs)

    monkeypatch.setattr(LlavaTrainer, "training_step", step)
    words = {**flags, "output_dir": tmp_path / "out", "dataloader_num_workers": 2, "per_device_train_batch_size": 1}
    code, _, err = llava_ft("train", *words_of(words))
    assert code == 143 and err.count("Stopping after this step") == 1 and (tmp_path / "out/checkpoint-2").is_dir()
    for process in children:
        process.terminate()
        process.join(30)
    assert [process.exitcode for process in children] == [0, 0]
