"""A run that was killed, interrupted or ran out of disk goes on as if nothing had happened."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_llava_ft.errors import UserError
from hf_llava_ft.training.resuming.resume import SEAL, checkpoint_to_resume, seal, what_is_missing
from tests import warm_python

STEPS = 6


def command(model, data, images, output_dir, *flags) -> list[str]:
    return [
        *(sys.executable, "-m", "hf_llava_ft.train", "--model_name_or_path", str(model), "--data_path", str(data)),
        *("--image_folder", str(images), "--output_dir", str(output_dir), "--use_cpu", "True", "--max_steps"),
        *(str(STEPS), "--save_strategy", "steps", "--save_steps", "2", "--logging_steps", "1"),
        *("--per_device_train_batch_size", "2", "--learning_rate", "1e-3", *flags),
    ]


def run(arguments: list[str], **kwargs) -> subprocess.CompletedProcess:
    if not kwargs:
        return warm_python.run(arguments[1:])
    return subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=300, **kwargs)


def losses(output_dir: Path) -> list[float]:
    log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def until(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, "the run ended before it could be stopped"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def unbroken(tiny_checkpoint, tmp_path_factory):
    """Data, pictures and the run that the others are compared with: LoRA with dropout, grouped batches."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("resume")
    rows = []
    for index in range(10):
        question = f"What is number {index}?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"It is {index * 7}."}]
        row = {"id": str(index), "conversations": turns}
        if index % 3:
            Image.new("RGB", (40 + index, 50), (20 * index, 80, 90)).save(folder / f"{index}.png")
            row["image"], turns[0]["value"] = f"{index}.png", f"<image>\n{question}"
        rows.append(row)
    (folder / "data.json").write_text(json.dumps(rows))
    parts = (tiny_checkpoint, folder / "data.json", folder)
    flags = ("--group_by_modality_length", "True", "--lora_dropout", "0.1", "--mm_projector_lr", "1e-4")
    done = run(command(*parts, folder / "unbroken", *flags))
    assert done.returncode == 0, done.stderr
    return parts, flags, folder / "unbroken"


def assert_same(found: Path, expected: Path) -> None:
    assert losses(found) == losses(expected)
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (found, expected)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_killed_run_goes_on_bit_for_bit(unbroken, tmp_path):
    parts, flags, expected = unbroken
    arguments = command(*parts, tmp_path / "out", *flags)
    with subprocess.Popen(arguments, stderr=subprocess.DEVNULL) as process:
        until(lambda: (tmp_path / "out/checkpoint-2" / SEAL).is_file(), process)
        process.kill()
    assert not (tmp_path / "out/adapter_config.json").exists()
    done = run([*arguments, "--resume_from_checkpoint", "True"])
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "out", expected)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_and_says_how_to_go_on(unbroken, tmp_path, number):
    parts, flags, expected = unbroken
    arguments = command(*parts, tmp_path / "out", *flags)
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: (tmp_path / "out/checkpoint-2" / SEAL).is_file(), process)
        process.send_signal(number)
        _, printed = process.communicate(timeout=120)
    if process.returncode != 0:  # else the run was faster than the signal
        assert process.returncode == 128 + number
        assert "--resume_from_checkpoint True" in printed and "Traceback" not in printed
        last, passed_over = checkpoint_to_resume(True, tmp_path / "out")
        assert last is not None and not passed_over
        done = run([*arguments, "--resume_from_checkpoint", "True"])
        assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "out", expected)


@pytest.mark.slow
def test_a_checkpoint_that_was_cut_off_is_passed_over_with_a_message(unbroken, tmp_path):
    import shutil

    parts, flags, expected = unbroken
    shutil.copytree(expected, tmp_path / "out")
    for name in ("adapter_model.safetensors", "adapter_config.json", "trainer_state.json"):
        (tmp_path / "out" / name).unlink()
    optimizer = tmp_path / "out/checkpoint-6/optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1000])
    (tmp_path / "out/checkpoint-4" / SEAL).unlink()
    done = run([*command(*parts, tmp_path / "out", *flags), "--resume_from_checkpoint", "True"])
    assert done.returncode == 0, done.stderr
    printed = " ".join(done.stderr.split())
    assert "checkpoint-6 is passed over: its file optimizer.pt has" in printed
    assert "checkpoint-4 is passed over: it was not written to its end" in printed
    assert_same(tmp_path / "out", expected)
    assert what_is_missing(tmp_path / "out/checkpoint-6") is None


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_leaves_the_checkpoints(unbroken, tmp_path):
    parts, flags, expected = unbroken
    arguments = command(*parts, tmp_path / "out", *flags)
    biggest = (expected / "checkpoint-2/optimizer.pt").stat().st_size

    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (biggest - 1, biggest - 1))

    done = run(arguments, preexec_fn=small_files_only)
    assert done.returncode == 2
    assert "there is no room for what is written to" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        checkpoint_to_resume(True, tmp_path / "out")
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "out", expected)


@pytest.mark.slow
def test_only_the_wanted_number_of_checkpoints_stays(unbroken, tmp_path):
    parts, flags, _ = unbroken
    done = run(command(*parts, tmp_path / "out", *flags, "--save_total_limit", "1"))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]


def test_what_is_missing_is_said(tmp_path):
    for name, content in (("model.safetensors", b"1234"), ("sub/state.bin", b"12"), ("trainer_state.json", b"{}")):
        path = tmp_path / "checkpoint-3" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    folder = tmp_path / "checkpoint-3"
    assert what_is_missing(folder) == "it was not written to its end"
    seal(folder)
    assert what_is_missing(folder) is None
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    (folder / "sub/state.bin").write_bytes(b"1")
    assert what_is_missing(folder) == "its file sub/state.bin has 1 bytes instead of 2"
    (folder / "sub/state.bin").unlink()
    assert what_is_missing(folder) == "its file sub/state.bin is missing"
    with pytest.raises(UserError, match="cannot be resumed from: its file sub/state.bin is missing"):
        checkpoint_to_resume(str(folder), tmp_path)
    (folder / SEAL).write_text("{")
    assert what_is_missing(folder) == f"its {SEAL} cannot be read"


def test_another_trainers_checkpoint_is_taken_when_it_is_named(tmp_path):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    assert checkpoint_to_resume(str(folder), tmp_path) == (str(folder), [])
    assert checkpoint_to_resume(None, tmp_path) == checkpoint_to_resume("False", tmp_path) == (None, [])
    with pytest.raises(UserError, match="holds no whole checkpoint. .*it was not written to its end"):
        checkpoint_to_resume("true", tmp_path)
    none, passed_over = checkpoint_to_resume("auto", tmp_path)
    assert none is None and len(passed_over) == 1
    assert checkpoint_to_resume("auto", tmp_path / "nowhere") == (None, [])
    seal(folder)
    assert checkpoint_to_resume("auto", tmp_path) == checkpoint_to_resume(True, tmp_path) == (str(folder), [])
    assert os.listdir(tmp_path) == ["checkpoint-3"]
