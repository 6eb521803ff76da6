"""`kill -9` at any moment: a checkpoint is whole or is passed over, and the run ends as the unbroken one does."""

import random
import time

import pytest
import torch

from hf_llava_ft.training.resuming.resume import SEAL, what_is_missing
from tests.ranks import ENGINES, Run, logged, num_processes, run, saved_weights, write_rows

pytestmark = pytest.mark.slow

STEPS = 8
KILLS = 5


@pytest.fixture(scope="module")
def command(tiny_checkpoint, tmp_path_factory):
    data = write_rows(tmp_path_factory.mktemp("rows"))

    def words(engine, output_dir) -> list:
        return [
            *("--model_name_or_path", tiny_checkpoint, "--data_path", data, "--image_folder", data.parent),
            *("--output_dir", output_dir, "--use_cpu", "True", "--max_steps", STEPS, "--logging_steps", "1"),
            *("--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2", "--learning_rate", "1e-3"),
            *("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", 2 // num_processes(engine)),
            *("--lora_dropout", "0.1", "--resume_from_checkpoint", "auto"),
        ]

    return words


@pytest.fixture(scope="module")
def unbroken(command, tmp_path_factory):
    """`unbroken(engine)`: folder and seconds of the run that the others are compared with."""
    runs = {}

    def ended(engine):
        if engine not in runs:
            folder = tmp_path_factory.mktemp(engine)
            began = time.monotonic()
            run(engine, command(engine, folder / "out"), folder / "logs")
            runs[engine] = folder / "out", time.monotonic() - began
        return runs[engine]

    return ended


def assert_same(found, expected) -> None:
    assert len(logged(expected)) == STEPS
    assert logged(found) == logged(expected)
    ours, theirs = saved_weights(found), saved_weights(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("engine", ["single", "ddp"])
def test_at_random_moments(command, unbroken, tmp_path, engine):
    expected, seconds = unbroken(engine)
    moments = random.Random(0)
    argv = command(engine, tmp_path / "out")
    for _ in range(KILLS):
        started = Run(engine, argv, tmp_path / "logs")
        end = time.monotonic() + moments.uniform(0.2, 1) * seconds
        started.until(lambda end=end: time.monotonic() > end)
        started.kill()
        assert "Traceback" not in started.all_printed()
    run(engine, argv, tmp_path / "logs")
    assert_same(tmp_path / "out", expected)


@pytest.mark.parametrize("engine", ["single", *ENGINES])
def test_while_it_saves(command, unbroken, tmp_path, engine):
    expected, _ = unbroken(engine)
    argv = command(engine, tmp_path / "out")
    for step in range(2, STEPS):
        folder = tmp_path / f"out/checkpoint-{step}"
        started = Run(engine, argv, tmp_path / "logs")
        assert started.until(folder.is_dir), started.all_printed()
        started.kill()
        if not (folder / SEAL).is_file():
            break  # else it was faster than the kill
    assert what_is_missing(folder) == "it was not written to its end"
    assert what_is_missing(tmp_path / f"out/checkpoint-{step - 1}") is None
    printed = " ".join(run(engine, argv, tmp_path / "logs").split())
    assert f"checkpoint-{step} is passed over: it was not written to its end" in printed
    assert_same(tmp_path / "out", expected)
