"""`kill -9`, and on: for everything that trains and every engine, the run is the unbroken one, bit for bit.

With dropout, batches grouped by modality and a learning rate of the projector's own, so that data order, random
numbers, schedule and groups of the optimiser all show in the numbers.
"""

import pytest
import torch

from hf_llava_ft.training.resuming.resume import SEAL
from tests.ranks import ENGINES, OFFLOADS, Run, logged, num_processes, run, saved_weights, write_rows

pytestmark = pytest.mark.slow

STEPS = 6
ALL = ["single", *ENGINES]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"))


def command(engine, checkpoint, data, output_dir, train_type, *flags) -> list:
    return [
        *("--model_name_or_path", checkpoint, "--data_path", data, "--image_folder", data.parent),
        *("--output_dir", output_dir, "--use_cpu", "True", "--max_steps", STEPS, "--logging_steps", "1"),
        *("--save_strategy", "steps", "--save_steps", "2", "--learning_rate", "1e-3", "--mm_projector_lr", "1e-4"),
        *("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", 2 // num_processes(engine)),
        *("--group_by_modality_length", "True", "--lora_dropout", "0.1", "--train_type", train_type, *flags),
    ]


def killed_and_unbroken(engine, tiny_checkpoint, data, folder, train_type):
    """Folders of a run that was killed and went on, and of the unbroken one."""
    run(engine, command(engine, tiny_checkpoint, data, folder / "unbroken", train_type), folder / "logs")
    argv = command(engine, tiny_checkpoint, data, folder / "killed", train_type)
    killed = Run(engine, argv, folder / "logs")
    came = killed.until((folder / "killed/checkpoint-2" / SEAL).is_file)
    killed.kill()
    assert came, killed.all_printed()
    assert not (folder / "killed/trainer_state.json").exists(), "the run was over before it was killed"
    run(engine, [*argv, "--resume_from_checkpoint", "True"], folder / "logs")
    assert len(logged(folder / "unbroken")) == STEPS
    return folder / "killed", folder / "unbroken"


@pytest.mark.parametrize("train_type", ["projector", "lora", "qlora", "full"])
@pytest.mark.parametrize("engine", ALL)
def test_a_killed_run_goes_on(engine, train_type, tiny_checkpoint, data, tmp_path):
    killed, unbroken = killed_and_unbroken(engine, tiny_checkpoint, data, tmp_path, train_type)
    assert logged(killed) == logged(unbroken)
    found, expected = saved_weights(killed), saved_weights(unbroken)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("engine", OFFLOADS)
def test_a_killed_run_goes_on_with_offload(engine, tiny_checkpoint, data, tmp_path):
    """To rounding: DeepSpeed's Adam multiplies powers of its betas up step by step, and takes them anew after that."""
    killed, unbroken = killed_and_unbroken(engine, tiny_checkpoint, data, tmp_path, "full")
    torch.testing.assert_close(torch.tensor(logged(killed)), torch.tensor(logged(unbroken)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("engine", ALL)
def test_another_state_is_another_run(engine, tiny_checkpoint, data, tmp_path):
    """Negative control of the comparison above: the same checkpoint, and another state of the random numbers."""
    argv = command(engine, tiny_checkpoint, data, tmp_path / "out", "lora")
    run(engine, argv, tmp_path / "logs")
    expected = logged(tmp_path / "out")
    for path in (tmp_path / "out/checkpoint-2").glob("rng_state*.pth"):
        path.unlink()
    (tmp_path / "out/checkpoint-2" / SEAL).unlink()
    checkpoint = tmp_path / "out/checkpoint-2"
    run(engine, [*argv, "--resume_from_checkpoint", checkpoint], tmp_path / "logs")
    assert logged(tmp_path / "out")[:2] == expected[:2] and logged(tmp_path / "out")[2:] != expected[2:]
