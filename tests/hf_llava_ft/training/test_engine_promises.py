"""What a run promises holds under DDP, DeepSpeed and FSDP2 as in one process: float32 masters, an end at the first
number that is none, and no other course on resume."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_llava_ft.checkpoints.opening import load_model
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.training.resuming.resume import what_is_missing
from tests.ranks import ENGINES, Run, logged, num_processes, run, write_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def float16(tiny_checkpoint, tmp_path_factory) -> Path:
    """The tiny checkpoint in float16, as most LLaVAs are published."""
    folder = tmp_path_factory.mktemp("float16")
    load_model(str(tiny_checkpoint), dtype=torch.float16).save_pretrained(folder)
    LlavaProcessor.from_pretrained(tiny_checkpoint).save_pretrained(folder)
    return folder


def command(engine, checkpoint, data, output_dir, *flags) -> list:
    return [
        *("--model_name_or_path", checkpoint, "--data_path", data, "--image_folder", data.parent),
        *("--output_dir", output_dir, "--use_cpu", "True", "--max_steps", "4", "--logging_steps", "1"),
        *("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", 2 // num_processes(engine)),
        *("--warmup_steps", "0", "--learning_rate", "1e-3", "--lora_dropout", "0", *flags),
    ]


@pytest.fixture(scope="module")
def whole(float16, data, tmp_path_factory) -> list[float]:
    """Losses of the same numbers in float32, in one process."""
    folder = tmp_path_factory.mktemp("whole")
    model = load_model(str(float16)).float()
    model.save_pretrained(folder / "model")
    LlavaProcessor.from_pretrained(float16).save_pretrained(folder / "model")
    flags = ("--train_type", "full", "--save_strategy", "no")
    run("single", command("single", folder / "model", data, folder / "out", *flags), folder / "logs")
    return [loss for loss, _ in logged(folder / "out")]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_float16_checkpoint_is_tuned_in_float32(float16, data, whole, tmp_path, engine):
    flags = ("--train_type", "full", "--save_steps", "4")
    printed = run(engine, command(engine, float16, data, tmp_path / "out", *flags), tmp_path / "logs")
    losses = [loss for loss, _ in logged(tmp_path / "out")]
    assert losses == pytest.approx(whole, abs=1e-4)  # in float16 itself they differ by 5e-3
    saved = load_file(tmp_path / "out/model.safetensors")
    assert {each.dtype for each in saved.values()} == {torch.float16}
    assert load_model(str(tmp_path / "out")).dtype == torch.float16
    assert "Precision: " in printed and "float32" in " ".join(printed.split())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_learning_rate_that_breaks_the_model_ends_the_run(tiny_checkpoint, data, tmp_path, engine):
    flags = ("--train_type", "full", "--save_steps", "1", "--max_grad_norm", "0", "--learning_rate", "1e25")
    ended = Run(engine, command(engine, tiny_checkpoint, data, tmp_path / "out", *flags), tmp_path / "logs")
    for process in ended.processes:
        process.join(300)
    assert [process.exitcode for process in ended.processes] == [1, 1], ended.all_printed()
    assert ended.printed().count("error:") == 1 and "is not finite in step" in ended.printed()
    assert "Traceback" not in ended.all_printed()
    assert not list((tmp_path / "out").glob("*.safetensors"))
    for folder in (tmp_path / "out").glob("checkpoint-*"):
        if what_is_missing(folder) is None:
            for path in folder.glob("*.safetensors"):
                assert all(each.isfinite().all() for each in load_file(path).values()), path


@pytest.mark.parametrize("engine", ENGINES)
def test_changed_settings_are_refused_on_resume(tiny_checkpoint, data, tmp_path, engine):
    words = command(engine, tiny_checkpoint, data, tmp_path / "out", "--save_steps", "2", "--save_total_limit", "3")
    run(engine, words, tmp_path / "logs")
    resumed = [*words, "--resume_from_checkpoint", tmp_path / "out/checkpoint-2"]
    refused = {"--seed": "7", "--per_device_train_batch_size": "2", "--lora_r": "4", "--max_steps": "1"}
    if engine != "ddp":
        refused["--learning_rate"] = "1e-4"  # DeepSpeed and FSDP bring it back with their state
    for flag, value in refused.items():
        again = Run(engine, [*resumed, flag, value], tmp_path / "again")
        assert again.wait() == 2, again.all_printed()
        told = next(each for each in map(again.printed, range(2)) if "error:" in each)
        assert f"{flag} " in " ".join(told.split()) and "Traceback" not in again.all_printed()
    run(engine, [*resumed, "--logging_steps", "2", "--save_steps", "1"], tmp_path / "again")
    single = command("single", tiny_checkpoint, data, tmp_path / "out")
    alone = Run("single", [*single, "--resume_from_checkpoint", tmp_path / "out/checkpoint-4"], tmp_path / "again")
    assert alone.wait() == 2 and "the number of processes was 2 and is 1" in " ".join(alone.printed().split())
