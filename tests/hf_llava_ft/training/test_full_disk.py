"""A disk that fills up while a checkpoint is written: one sentence, and the checkpoint before is gone on from."""

import subprocess

import pytest
import torch

from hf_llava_ft.training.resuming.resume import what_is_missing
from tests.ranks import ENGINES, Run, logged, num_processes, run, saved_weights, write_rows

pytestmark = pytest.mark.slow

STEPS = 4


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(size)` mounts a file system of so many bytes, or gives the one mounted another size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def disk(size: int):
        remount = "remount," if mounted else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{remount}size={size}", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a small disk is a tmpfs here, and mounting is not permitted: {done.stderr.strip()}")
        mounted.append(size)
        return folder

    yield disk
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("engine", ["single", *ENGINES])
def test_a_disk_that_fills_up(engine, tiny_checkpoint, small_disk, tmp_path):
    data = write_rows(tmp_path)

    def command(output_dir) -> list:
        return [
            *("--model_name_or_path", tiny_checkpoint, "--data_path", data, "--image_folder", tmp_path),
            *("--output_dir", output_dir, "--use_cpu", "True", "--max_steps", STEPS, "--logging_steps", "1"),
            *("--save_strategy", "steps", "--save_steps", "2", "--learning_rate", "1e-3"),
            *("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", 2 // num_processes(engine)),
            *("--lora_dropout", "0.1"),
        ]

    run(engine, command(tmp_path / "unbroken"), tmp_path / "logs")
    files = [path for path in (tmp_path / "unbroken/checkpoint-2").rglob("*") if path.is_file()]
    # In whole pages. The second checkpoint ends in the middle.
    size = sum(-(-path.stat().st_size // 4096) * 4096 for path in files)
    output_dir = small_disk(int(1.6 * size)) / "out"
    full = Run(engine, command(output_dir), tmp_path / "logs")
    assert full.wait() == 2, full.all_printed()
    # The other rank may have seen the connection break before it was ended.
    sentence = f"there is no room for what is written to {output_dir}"
    told = [printed for rank in range(num_processes(engine)) if sentence in (printed := full.printed(rank))]
    assert told and not any("Traceback" in printed for printed in told), full.all_printed()
    assert what_is_missing(output_dir / "checkpoint-2") is None
    assert what_is_missing(output_dir / "checkpoint-4") is not None

    small_disk(10 * size)
    printed = run(engine, [*command(output_dir), "--resume_from_checkpoint", "True"], tmp_path / "logs")
    assert "checkpoint-4 is passed over" in " ".join(printed.split())
    assert logged(output_dir) == logged(tmp_path / "unbroken")
    found, expected = saved_weights(output_dir), saved_weights(tmp_path / "unbroken")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
