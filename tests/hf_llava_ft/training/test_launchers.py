"""The ready files for `accelerate launch` and the `deepspeed` launcher start the run that one process does.

Two real processes each, on the CPU: hence --use_cpu, and DeepSpeed told that there is no GPU.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.ranks import free_port

pytestmark = pytest.mark.slow
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is an extra of this package")

STEPS = 3
BIN = Path(sys.executable).parent
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")


@pytest.fixture
def run(tiny_checkpoint, llava_json, tmp_path, checkout):
    """`run(name, *launcher, flags=(...))` trains below `tmp_path / name` and gives the logged losses."""
    data, images = llava_json(12, with_text_rows=True)

    def trained(name: str, *launcher: str, num_processes: int = 2, flags: tuple[str, ...] = ()) -> list[float]:
        arguments = [
            *("--model_name_or_path", tiny_checkpoint, "--data_path", data, "--image_folder", images),
            *("--output_dir", tmp_path / name, "--use_cpu", "True", "--max_steps", STEPS, "--save_strategy", "no"),
            *("--logging_steps", "1", "--learning_rate", "1e-3", "--lora_dropout", "0"),
            *("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", 2 // num_processes),
            *flags,
        ]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
        command = [*launcher, *map(str, arguments)]
        # The files of examples/accelerate name those of examples/deepspeed from here.
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=500, env=environment, cwd=checkout
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        assert done.stderr.count("The result is at") + done.stdout.count("The result is at") == 1
        log = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        found = [entry["loss"] for entry in log if "loss" in entry]
        assert len(found) == STEPS
        return found

    return trained


@pytest.fixture
def single(run) -> list[float]:
    return run("single", sys.executable, "-m", "hf_llava_ft.train", num_processes=1)


@pytest.mark.parametrize(
    "config", ["ddp", *(pytest.param(each, marks=needs_deepspeed) for each in ("zero2", "zero3"))]
)
def test_accelerate_launch_with_our_files_gives_the_run_of_one_process(run, single, config):
    losses = run(
        config,
        *ACCELERATE,
        *("--config_file", f"examples/accelerate/{config}.yaml"),
        *("--num_processes", "2", "--main_process_port", str(free_port()), "-m", "hf_llava_ft.train"),
    )
    assert losses == pytest.approx(single, rel=1e-5)


def test_accelerate_launch_with_our_file_of_fsdp2_gives_the_run_of_one_process(run, single, tmp_path):
    """With prompts, which all ranks have to answer together where the model is shared out."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Who?"}\n')
    losses = run(
        "fsdp2",
        *ACCELERATE,
        *("--config_file", "examples/accelerate/fsdp2.yaml", "--num_processes", "2"),
        *("--main_process_port", str(free_port()), "tests/fsdp_on_cpu.py"),
        flags=("--eval_prompts", str(tmp_path / "prompts.jsonl"), "--eval_max_new_tokens", "3"),
    )
    assert losses == pytest.approx(single, rel=1e-5)
    assert (tmp_path / "fsdp2/adapter_model.safetensors").is_file()


def test_accelerate_launch_evaluates_as_one_process_does(own_checkpoint, llava_json, tmp_path, checkout):
    data, images = llava_json(7)
    flags = ["--model", own_checkpoint, "--data_path", data, "--image_folder", images, "--device", "cpu"]
    flags += ["--max_new_tokens", 4, "--metric", "anls,loss"]
    launched = ["--config_file", "examples/accelerate/ddp.yaml", "--num_processes", 2]
    launched += ["--main_process_port", free_port()]
    found = []
    for name, launcher in (("one", [sys.executable]), ("two", [*ACCELERATE, *launched])):
        command = [*launcher, "-m", "hf_llava_ft.evaluate", *flags, "--output_dir", tmp_path / name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=checkout)
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stderr.count("All of it is in") == 1
        found.append(json.loads((tmp_path / name / "result.json").read_text())["figures"])
    for single, shared in zip(*found, strict=True):
        assert shared["tuned"] == pytest.approx(single["tuned"], rel=1e-5)


@needs_deepspeed
def test_the_deepspeed_launcher_gives_the_run_of_one_process(run, single):
    flags = ("--deepspeed", "examples/deepspeed/zero2.json")
    losses = run(
        "deepspeed",
        *(
            str(BIN / "deepspeed"),
            "--num_gpus",
            "2",
            "--master_port",
            str(free_port()),
            "--module",
            "hf_llava_ft.train",
        ),
        flags=flags,
    )
    assert losses == pytest.approx(single, rel=1e-5)


def test_another_seed_is_another_run(run, single):
    """Negative control of the comparisons above."""
    losses = run("other", sys.executable, "-m", "hf_llava_ft.train", num_processes=1, flags=("--seed", "7"))
    assert losses != pytest.approx(single, rel=1e-5)
