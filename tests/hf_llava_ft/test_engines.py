"""Two processes give what one gives: losses, weights and files, under DDP and DeepSpeed.

A real run each, on the CPU. The batches of two processes with two rows each are those of one with two rows and two
accumulation steps. Rows with and without a picture take turns by rows of one, so that a rank often has text alone
while the other has a picture.
"""

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from hf_llava_ft.resume import SEAL

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 4
ENGINES = ["ddp", "zero2", "zero3"]
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is an extra of this package")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    rows = []
    for index in range(16):
        turns = [
            {"from": "human", "value": f"What is number {index}?"},
            {"from": "gpt", "value": f"It is {7 * index}."},
        ]
        row = {"id": str(index), "conversations": turns}
        if index % 2:
            Image.new("RGB", (40 + index, 50), (15 * index, 80, 90)).save(folder / f"{index}.png")
            row["image"], turns[0]["value"] = f"{index}.png", f"<image>\n{turns[0]['value']}"
        rows.append(row)
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def run(tiny_checkpoint, data):
    """`run(engine, output_dir, *flags)` trains and gives the finished process."""

    def trained(engine: str, output_dir: Path, *flags: str, batch_size: int = 1) -> subprocess.CompletedProcess:
        num_processes = 1 if engine == "single" else 2
        arguments = [
            *("--model_name_or_path", tiny_checkpoint, "--data_path", data / "data.json", "--image_folder", data),
            *("--output_dir", output_dir, "--use_cpu", "True", "--max_steps", STEPS, "--save_strategy", "no"),
            *("--logging_steps", "1", "--learning_rate", "1e-3", "--lora_dropout", "0", "--mm_projector_lr", "1e-4"),
            *("--per_device_train_batch_size", batch_size, "--gradient_accumulation_steps", 2 // num_processes),
            *flags,
        ]
        if engine.startswith("zero"):
            arguments += ["--deepspeed", EXAMPLES / f"deepspeed/{engine}.json"]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = [sys.executable]
        if num_processes > 1:
            launcher += ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [*launcher, "-m", "hf_llava_ft.train", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]
        return done

    return trained


@pytest.fixture(scope="module")
def single(run, tmp_path_factory):
    """`single(train_type)`: folder of the run on one process."""
    folders = {}

    def folder(train_type: str) -> Path:
        if train_type not in folders:
            folders[train_type] = tmp_path_factory.mktemp("single") / train_type
            run("single", folders[train_type], "--train_type", train_type)
        return folders[train_type]

    return folder


def logged(output_dir: Path) -> list[tuple[float, float]]:
    log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [(entry["loss"], entry["grad_norm"]) for entry in log if "loss" in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    name = "adapter_model.safetensors" if (folder / "adapter_config.json").is_file() else "model.safetensors"
    return load_file(folder / name)


def assert_same_run(found: Path, expected: Path, tolerance: float = 1e-5) -> None:
    assert len(logged(found)) == STEPS
    torch.testing.assert_close(torch.tensor(logged(found)), torch.tensor(logged(expected)), rtol=tolerance, atol=0)
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=tolerance, msg=name)
    names = {path.name for path in found.iterdir()} - {"README.md"}
    assert names == {path.name for path in expected.iterdir()} - {"README.md"}


@needs_deepspeed
@pytest.mark.parametrize("train_type", ["lora", "projector", "full"])
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_give_the_run_of_one(run, single, tmp_path, engine, train_type):
    done = run(engine, tmp_path / "out", "--train_type", train_type)
    assert_same_run(tmp_path / "out", single(train_type))
    assert done.stderr.count("The result is at") == 1  # said by one process


def test_another_learning_rate_is_another_run(run, single, tmp_path):
    """Negative control of the comparison above."""
    run("single", tmp_path / "out", "--train_type", "lora", "--learning_rate", "1.01e-3")
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "out", single("lora"))


@needs_deepspeed
def test_peft_alone_loads_an_adapter_trained_under_zero3(run, tiny_checkpoint, tmp_path):
    run("zero3", tmp_path / "out", "--train_type", "lora")
    program = (
        "import sys; sys.modules['hf_llava_ft'] = None\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForImageTextToText\n"
        "model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(sys.argv[1]), sys.argv[2])\n"
        "print(sum(p.abs().sum().item() for n, p in model.named_parameters() if 'lora_B' in n))"
    )
    command = [sys.executable, "-c", program, str(tiny_checkpoint), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) > 0


@needs_deepspeed
@pytest.mark.parametrize("train_type", ["lora", "full"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(run, tmp_path, engine, train_type):
    flags = ("--train_type", train_type, "--save_strategy", "steps", "--save_steps", "2", "--lora_dropout", "0.1")
    run(engine, tmp_path / "whole", *flags)
    assert all((tmp_path / f"whole/checkpoint-{step}" / SEAL).is_file() for step in (2, 4))
    checkpoint = str(tmp_path / "whole/checkpoint-2")
    run(engine, tmp_path / "resumed", *flags, "--resume_from_checkpoint", checkpoint)
    assert logged(tmp_path / "resumed") == logged(tmp_path / "whole")
    ours, theirs = weights(tmp_path / "resumed"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@needs_deepspeed
def test_a_model_trained_under_zero3_is_whole(run, tiny_checkpoint, tmp_path):
    run("zero3", tmp_path / "out", "--train_type", "full")
    before = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint).state_dict()
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").state_dict()
    assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in before.items()}


@needs_deepspeed
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_evaluate_as_one(run, data, tmp_path, engine):
    """Loss of rows that do not divide among the processes, answers to prompts, and the counts of the summary."""
    rows = json.loads((data / "data.json").read_text())[:7]
    for index, row in enumerate(rows):
        row["conversations"][1]["value"] *= 1 + index % 4
    (tmp_path / "eval.json").write_text(json.dumps(rows))
    (tmp_path / "prompts.jsonl").write_text('{"image": "1.png", "prompt": "What is it?"}\n{"prompt": "Who?"}\n')
    flags = ["--eval_data_path", tmp_path / "eval.json", "--eval_strategy", "steps", "--eval_steps", "2"]
    flags += ["--eval_prompts", tmp_path / "prompts.jsonl", "--eval_max_new_tokens", "6"]
    flags += ["--per_device_eval_batch_size", "2"]
    found = {}
    for name in ("single", engine):
        run(name, tmp_path / name, *flags)
        log = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        summary = json.loads((tmp_path / name / "train_summary.json").read_text())
        answers = (tmp_path / name / "eval_answers.jsonl").read_text()
        counts = [summary[key] for key in ("samples", "tokens", "supervised_tokens")]
        found[name] = ([entry["eval_loss"] for entry in log if "eval_loss" in entry], answers, counts)
    assert found[engine][0] == pytest.approx(found["single"][0], rel=1e-5) and len(found[engine][0]) == 2
    assert found[engine][1:] == found["single"][1:]
    assert found["single"][2][0] == 2 * STEPS
