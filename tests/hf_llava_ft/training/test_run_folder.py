"""One folder, one run: nothing of another run or of other people is mixed, overwritten or removed."""

import json
import os
import shutil
import signal
import time

import pytest

from hf_llava_ft.errors import UserError
from hf_llava_ft.settings.parsing import resolve
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.train import train
from hf_llava_ft.training.resuming.resume import SEAL, Run, begin, checkpoint_to_resume, remove_older, run_id_of, seal
from hf_llava_ft.training.resuming.run_folder import compared_with_before, open_run_folder
from hf_llava_ft.whole_files import write_atomically
from tests import warm_python


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out"


def opened(folder, checkpoint=None, **flags):
    """As `train` opens it: the run, and what was told."""
    told = []
    args = LlavaTrainingArguments(output_dir=str(folder), use_cpu=True, **flags)
    run = open_run_folder(args, None if checkpoint is None else str(checkpoint), told.append)
    return compared_with_before(run, {"seed": 1}, args, told.append), told


def checkpoint(folder, step, run, content=b"1234"):
    path = folder / f"checkpoint-{step}"
    begin(path, run)
    (path / "model.safetensors").write_bytes(content)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 9}))
    seal(path, run)
    return path


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_run_does_not_mix_with_another(folder):
    first, told = opened(folder)
    assert told == [] and json.loads((folder / "run.json").read_text())["id"] == first.id
    again, _ = opened(folder)  # nothing was left but the note whose it is
    assert again.id != first.id
    for step in (2, 4):
        checkpoint(folder, step, again)
    before = files(folder)
    expected = r"out holds the checkpoints of another run \(checkpoint-4 and 1 more\): go on from them with --resume_f"
    with pytest.raises(UserError, match=expected):
        opened(folder)
    assert files(folder) == before
    resumed, told = opened(folder, folder / "checkpoint-4")
    assert resumed.id == again.id and resumed.started == again.started and told == []
    (folder / "train.log").write_text("what somebody redirected here")
    new, told = opened(folder, overwrite_output_dir=True)
    aside = next(path for path in folder.parent.iterdir() if path != folder)
    assert told == [f"What was in {folder} is in {aside} now."] and aside.name.startswith("out.before-20")
    assert files(aside) == before
    assert sorted(os.listdir(folder)) == ["run.json", "train.log"] and new.id != again.id
    with pytest.raises(UserError, match="moves the checkpoints away that --resume_from_checkpoint True goes on from"):
        opened(folder, folder, overwrite_output_dir=True, resume_from_checkpoint="True")


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors", "config.json", "data/pictures", ".env"])
def test_what_no_run_wrote_is_refused_and_left(folder, name):
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("mine")
    with pytest.raises(
        UserError, match=f"out holds {name.split('/')[0]}, which no training run wrote: choose another"
    ):
        opened(folder)
    assert files(folder) == {name: b"mine"}
    opened(folder, overwrite_output_dir=True)
    aside = next(path for path in folder.parent.iterdir() if path != folder)
    assert files(aside) == {name: b"mine"}


def test_logs_and_what_a_run_left_are_not_in_the_way(folder):
    opened(folder)
    for name in (
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "train_summary.json",
        "loss.png",
    ):
        (folder / name).touch()
    (folder / "slurm-17.out").touch()
    (folder / "runs").mkdir()
    opened(folder)
    (folder / "notes.txt").touch()
    with pytest.raises(UserError, match="holds notes.txt"):
        opened(folder)


def test_what_a_killed_run_left_of_a_file_is_not_in_the_way(folder, tmp_path):
    opened(folder)
    names = []
    write_atomically(tmp_path / "report.html", lambda half: (names.append(half.name), half.touch()))
    for name in names:
        (folder / name).touch()
    opened(folder)
    (folder / "report.html.tmp").touch()
    with pytest.raises(UserError, match="holds report.html.tmp"):
        opened(folder)


def test_checkpoints_of_others_are_neither_taken_nor_overwritten(folder):
    run, _ = opened(folder)
    own = checkpoint(folder, 2, run)
    other = checkpoint(folder, 8, Run(), b"other")
    taken, passed_over = checkpoint_to_resume(True, folder)
    assert taken == str(own)
    assert passed_over == [
        f"{other} is passed over: it is of run {run_id_of(other)}, and this folder is that of run {run.id}."
    ]
    # The run comes to step 8 itself.
    told = begin(other, run)
    aside = folder / "checkpoint-8.of-another-run-1"
    assert told == f"{other} was there, and is not of this run: it is {aside} now."
    assert (aside / "model.safetensors").read_bytes() == b"other"
    # Of a Trainer that seals nothing.
    (folder / "checkpoint-9").mkdir()
    (folder / "checkpoint-9/pytorch_model.bin").write_bytes(b"theirs")
    assert begin(folder / "checkpoint-9", run) is not None
    assert (folder / "checkpoint-9.of-another-run-1/pytorch_model.bin").read_bytes() == b"theirs"
    # What a killed process of ours left is written anew.
    (folder / "checkpoint-9/half").touch()
    assert begin(folder / "checkpoint-9", run) is None and not (folder / "checkpoint-9/half").exists()
    # Whose they are where the folder does not say it.
    (folder / "run.json").unlink()
    assert checkpoint_to_resume(True, folder)[0] == str(own)
    checkpoint(folder, 3, Run())
    with pytest.raises(UserError, match="out holds checkpoints of 2 runs, checkpoint-.* name the one to go on from"):
        checkpoint_to_resume(True, folder)


def steps(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def test_the_limit_goes_by_step_whatever_the_clock_says(folder):
    run = Run()
    paths = {step: checkpoint(folder, step, run) for step in (2, 9, 10)}
    for step, path in paths.items():
        os.utime(path, (10**9 - step, 10**9 - step))  # a clock that runs backwards: by it, 10 is the oldest
    remove_older(paths[10], run, 1, None)
    assert steps(folder) == [10]


def test_the_limit_spares_what_is_needed_and_what_is_of_others(folder):
    run = Run()
    paths = {step: checkpoint(folder, step, run) for step in (1, 2, 3, 4, 5, 9)}
    checkpoint(folder, 0, Run())
    (folder / "checkpoint-6").mkdir()
    (folder / "checkpoint-6/theirs").touch()
    run.resumed_from = os.path.relpath(paths[1])
    remove_older(paths[5], run, 2, str(paths[3]))
    # Resumed from 1, best 3, 5 just sealed; 9 is ahead; 0 and 6 are of others.
    assert steps(folder) == [0, 1, 3, 5, 6, 9]
    remove_older(paths[5], run, None, None)
    assert steps(folder) == [0, 1, 3, 5, 6, 9]
    run.resumed_from = None
    remove_older(paths[5], run, 1, None)
    assert steps(folder) == [0, 5, 6, 9]


def flags(model, data, output_dir, **more):
    path, images = data
    given = {"model_name_or_path": model, "data_path": path, "image_folder": images, "output_dir": output_dir}
    given |= {"use_cpu": True, "max_steps": 4, "lora_r": 4, "save_steps": 1, "per_device_train_batch_size": 2, **more}
    return [str(word) for name, value in given.items() for word in (f"--{name}", value)]


def test_a_run_with_a_clock_set_back_keeps_its_last_and_what_it_came_from(tiny_checkpoint, llava_json, tmp_path):
    data = llava_json(6)
    train(*resolve(flags(tiny_checkpoint, data, tmp_path / "out", max_steps=2, save_total_limit=2)).build())
    future = time.time() + 10**7
    for step in (1, 2):
        os.utime(tmp_path / f"out/checkpoint-{step}", (future, future))
    more = {"max_steps": 4, "save_total_limit": 1, "resume_from_checkpoint": tmp_path / "out/checkpoint-1"}
    train(*resolve(flags(tiny_checkpoint, data, tmp_path / "out", **more)).build())
    assert steps(tmp_path / "out") == [1, 4]
    assert {run_id_of(tmp_path / f"out/checkpoint-{step}") for step in (1, 4)} == {
        json.loads((tmp_path / "out/run.json").read_text())["id"]
    }


def test_two_runs_at_once_and_then_one_more(tiny_checkpoint, llava_json, tmp_path):
    out = tmp_path / "out"
    words = flags(tiny_checkpoint, llava_json(6), out, max_steps=100000, save_strategy="no")
    process = warm_python.Started(["-m", "hf_llava_ft.train", *words])
    try:
        end = time.monotonic() + 120
        while not (out / "run.json").is_file():
            assert time.monotonic() < end
            time.sleep(0.1)
        second = warm_python.run(["-m", "hf_llava_ft.train", *words])
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    told = " ".join(second.stderr.split())
    assert second.returncode == 2 and "Traceback" not in told
    assert f"error: {out} is being written by process {process.pid} on " in told and "(train.py, since 20" in told
    # Killed, it blocks nobody; and it left nothing to go on from.
    train(*resolve(flags(tiny_checkpoint, llava_json(6), out, max_steps=1)).build())
    assert [name for name in os.listdir(tmp_path) if "lock" in name] == []
    shutil.copytree(out / "checkpoint-1", tmp_path / "copy")
    assert (tmp_path / "copy" / SEAL).is_file()
    with pytest.raises(UserError, match="holds the checkpoints of another run"):
        train(*resolve(flags(tiny_checkpoint, llava_json(6), out, max_steps=1)).build())
