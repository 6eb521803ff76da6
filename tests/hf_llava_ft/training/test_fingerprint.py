"""A run that is resumed is the same run, or says what it is."""

import dataclasses
import json
import os

import pytest
from PIL import Image
from transformers import TrainingArguments, get_cosine_schedule_with_warmup

from hf_llava_ft.checkpoints.opening import load_config
from hf_llava_ft.errors import UserError
from hf_llava_ft.settings.arguments import DataArguments, ModelArguments, TuningArguments
from hf_llava_ft.settings.parsing import resolve
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.train import train
from hf_llava_ft.training.resuming.fingerprint import (
    FREE,
    TAKE_EFFECT,
    base_digest,
    changes_between,
    refuse_another_course,
    settings_course,
)
from hf_llava_ft.training.resuming.resume import Run, read_seal
from tests.hf_llava_ft.training.test_trainer import make_trainer


def arguments(**flags):
    given = {"model_name_or_path": "m", "data_path": "d.json", "output_dir": "out", "use_cpu": True}
    # What follows from others where it is not given.
    given |= {"learning_rate": 1e-3, "lora_r": 8, "lora_alpha": 16} | flags
    argv = [word for name, value in given.items() for word in (f"--{name}", *str(value).split())]
    return resolve(argv).build()


def course(**flags):
    return json.loads(json.dumps(settings_course(*arguments(**flags))))


@pytest.mark.parametrize(
    "name, was, now",
    [
        ("seed", 1, 2),
        ("per_device_train_batch_size", 2, 4),
        ("gradient_accumulation_steps", 1, 2),
        ("lora_r", 8, 16),
        ("lora_alpha", 16, 32),
        ("lora_dropout", 0.0, 0.1),
        ("lora_bias", "none", "all"),
        ("lora_target_modules", "q_proj v_proj", "q_proj"),
        ("use_dora", False, True),
        ("use_rslora", False, True),
        ("train_type", "full", "freeze_vision"),
        ("model_max_length", 512, 256),
        ("sampler_order", "default", "original"),
        ("group_by_modality_length", False, True),
        ("loss_normalization", "tokens", "micro_batch"),
        ("on_bad_row", "raise", "skip"),
        ("eval_split", 0.1, 0.2),
        ("dtype", "auto", "float32"),
        ("optim", "adamw_torch", "sgd"),
        ("label_smoothing_factor", 0.0, 0.1),
    ],
)
def test_what_decides_the_course_is_named_from_what_to_what(name, was, now):
    before, after = course(**{name: was}), course(**{name: now})
    changes = changes_between(before, after)
    # Without a data_seed, --seed is that too.
    assert changes.pop("data_seed", None) is None or name == "seed"
    assert changes == {name: f"--{name} was {was} and is {now}"}
    with pytest.raises(UserError, match=f"^out/checkpoint-3 is of a run that was another: .*--{name} was {was} and"):
        refuse_another_course("out/checkpoint-3", before, after, 3, arguments(**{name: now})[3])
    note = refuse_another_course("c", before, after, 3, arguments(**{name: now}, resume_anyway=True)[3])
    assert note is not None and f"From step 3 on this is not the run that it was: --{name} was" in note


def test_epochs_are_no_change_where_steps_decide():
    changed = [
        changes_between(course(num_train_epochs=1, max_steps=a), course(max_steps=b)) for a, b in ((9, 9), (9, -1))
    ]
    assert ["num_train_epochs" in each for each in changed] == [False, True]


def test_what_does_not_decide_the_course_may_change():
    now = {"output_dir": "elsewhere", "logging_steps": 7, "save_steps": 3, "save_total_limit": 2, "run_name": "other"}
    now |= {
        "dataloader_num_workers": 2,
        "gradient_checkpointing": True,
        "data_path": "moved/d.json",
        "report_to": "none",
    }
    now |= {"eval_data_path": "e.json", "eval_strategy": "steps", "eval_steps": 2, "preview": 3, "hub_model_id": "a/b"}
    assert refuse_another_course("c", course(), course(**now), 3, arguments(**now)[3]) is None
    # Without LoRA, its settings are nobody's.
    assert changes_between(course(train_type="full", lora_r=8), course(train_type="full", lora_r=4)) == {}
    assert changes_between(course(seed=3), course(seed=3, data_seed=3)) == {}


def test_what_takes_effect_is_told_and_what_cannot_is_refused():
    def compared(was, now):
        return refuse_another_course("c", course(**was), course(**now), 3, arguments(**now)[3])

    told = compared({"learning_rate": 1e-3}, {"learning_rate": 5e-4, "weight_decay": 0.1})
    assert told == (
        "From step 3 on this is not the run that it was: --learning_rate was 0.001 and is 0.0005; "
        "--weight_decay was 0.0 and is 0.1."
    )
    with pytest.raises(UserError, match="--mm_projector_lr was not given and is 0.001"):
        compared({}, {"mm_projector_lr": 1e-3})
    with pytest.raises(UserError, match="another: --max_steps 2 is behind the checkpoint's step 3. Set it back"):
        compared({"max_steps": 8}, {"max_steps": 2})
    assert "--max_steps was 8 and is 3" in compared({"max_steps": 8}, {"max_steps": 3})
    with pytest.raises(UserError, match="--lr_scheduler_type was cosine and is reduce_lr_on_plateau"):
        plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}
        compared({}, plateau | {"eval_data_path": "e.json"})
    was, now = course(learning_rate=1e-3), course(learning_rate=1e-4)
    for each in (was, now):
        each["engine"] = "DeepSpeed ZeRO-2"  # brings its groups back with its state
    with pytest.raises(UserError, match="--learning_rate was 0.001 and is 0.0001"):
        refuse_another_course("c", was, now, 3, arguments()[3])


def test_data_and_processor_are_named_in_words():
    data = [{"name": "a.json", "weight": 1.0, "digest": "aaa"}, {"name": "b.json", "weight": 0.5, "digest": "bbb"}]
    images = {"number": 1200, "digest": "ccc"}
    was = {"data": data, "images": images, "processes": 2, "processor": "x", "version": None}
    now = {
        "data": [{**data[0], "digest": "zzz"}, {**data[1], "weight": 2.0}],
        "images": {"number": 1200, "digest": "ddd"},
        "processes": 1,
        "processor": "y",
        "version": "v1",
    }
    assert changes_between(was, now) == {
        "data": "the content of a.json was aaa and is zzz; the weight of b.json was 0.5 and is 2.0",
        "images": "the images (sizes and times) were 1,200 of digest ccc and are 1,200 of digest ddd",
        "processes": "the number of processes was 2 and is 1",
        "version": "--version was not given and is v1",
    }
    assert changes_between(was, {**was, "version": "v1"}) == {}  # said in other words
    moved = [{**data[0], "name": "moved.json"}, data[1]]
    assert changes_between(was, {**was, "data": moved}) == {}
    assert changes_between(was, {**was, "data": data[:1]}) == {"data": "the data was a.json, b.json and is a.json"}
    assert set(changes_between(was, now, begins_epoch_anew=True)) == {"version"}


def test_the_lists_name_settings_that_there_are_and_no_secret_is_kept():
    kinds = (ModelArguments, DataArguments, TuningArguments, LlavaTrainingArguments)
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    # In some releases from 5.17 on, and not in others.
    of_others = {"logging_dir", "local_rank", "include_tokens_per_second"}
    of_others |= {"gradient_checkpointing", "gradient_checkpointing_kwargs"}
    of_others |= {"activation_checkpointing", "activation_checkpointing_kwargs"}
    ours = names - {field.name for field in dataclasses.fields(TrainingArguments)}
    assert names >= TAKE_EFFECT and not TAKE_EFFECT & FREE
    theirs = {name for name in FREE if name not in names}
    assert theirs <= of_others, theirs
    assert not {name for name in course() if "token" in name and name != "loss_normalization"} - {
        "average_tokens_across_devices"
    }
    assert {"lora_r", "on_bad_row", "sampler_order"} <= ours - FREE


def test_a_base_is_known_by_its_weights(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"1" * 100)
    (folder / "README.md").write_text("one")
    before = base_digest(str(folder), None)
    (folder / "README.md").write_text("another")
    assert base_digest(str(folder), None) == before and before.startswith("base, digest ")
    (folder / "model.safetensors").write_bytes(b"2" * 100)
    assert base_digest(str(folder), None) != before
    assert base_digest("user/model", "abc") == "user/model@abc"


@pytest.fixture
def run(tiny_checkpoint, llava_json, tmp_path):
    """`run(**flags)` trains into `tmp_path / "out"`; 4 steps, with a checkpoint at each second."""
    path, folder = llava_json(6)

    def trained(**flags):
        flags = {
            "model_name_or_path": tiny_checkpoint,
            "data_path": path,
            "image_folder": folder,
            "output_dir": tmp_path / "out",
            "use_cpu": True,
            "max_steps": 4,
            "lora_r": 4,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "per_device_train_batch_size": 2,
            "save_steps": 2,
            **flags,
        }
        argv = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        return train(*resolve(argv).build())

    trained.data, trained.images = path, folder
    return trained


def rates(folder):
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["learning_rate"] for entry in log if "learning_rate" in entry}


def cosine(base, steps):
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=base)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, steps)
    return [base * schedule.lr_lambdas[0](step) for step in range(steps)]


def test_a_run_with_other_data_or_settings_is_refused_before_the_model_is_loaded(run, tmp_path, capsys):
    run()
    seal = read_seal(tmp_path / "out/checkpoint-2")
    assert seal["run"]["id"] == json.loads((tmp_path / "out/run.json").read_text())["id"]
    assert str(tmp_path) not in json.dumps(seal)  # no path of this machine
    (run.images / "0.png").touch()
    rows = json.loads(run.data.read_text())
    run.data.write_text(json.dumps(rows[::-1]))
    with pytest.raises(UserError) as error:
        run(resume_from_checkpoint=tmp_path / "out/checkpoint-2", seed=3, lora_r=8)
    told = str(error.value)
    assert (
        "--lora_r was 4 and is 8" in told
        and "--seed was 42 and is 3" in told
        and "the content of data.json was" in told
    )
    assert "the images (sizes and times) were 6 of" in told and told.endswith("--resume_anyway.")
    os.utime(run.images / "0.png", ns=(0, 0))
    run.data.write_text(json.dumps(rows))
    with pytest.raises(UserError, match="another: the images [^;]* Set it back"):
        run(resume_from_checkpoint=True)
    run(resume_from_checkpoint=tmp_path / "out/checkpoint-2", resume_anyway=True)
    printed = " ".join(capsys.readouterr().err.split())
    assert "From step 2 on this is not the run that it was: the images" in printed
    # It is the run that it is now.
    run(resume_from_checkpoint=True)


def test_what_a_default_means_may_be_written_out(run, tiny_checkpoint, tmp_path, capsys):
    run()
    longest = load_config(str(tiny_checkpoint)).text_config.max_position_embeddings
    written_out = {"model_max_length": longest, "picture_opening": "upright", "data_seed": 42}
    run(resume_from_checkpoint=tmp_path / "out/checkpoint-2", **written_out)
    assert "From step 2 on" not in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match=f"another: --model_max_length was {longest} and is {longest - 1}. Set"):
        run(resume_from_checkpoint=tmp_path / "out/checkpoint-2", model_max_length=longest - 1)


def test_what_is_changed_on_purpose_takes_effect(run, tmp_path, capsys):
    run()
    assert list(rates(tmp_path / "out").values()) == pytest.approx(cosine(1e-3, 4))
    checkpoint = tmp_path / "out/checkpoint-2"
    run(resume_from_checkpoint=checkpoint, learning_rate=1e-4, max_steps=6, save_steps=3, logging_steps=2)
    printed = " ".join(capsys.readouterr().err.split())
    assert "--max_steps was 4 and is 6; --learning_rate was 0.001 and is 0.0001" in printed
    expected = cosine(1e-4, 6)
    found = rates(tmp_path / "out")
    assert set(found) == {1, 2, 4, 6}  # logged as often as is wanted now
    assert [found[4], found[6]] == pytest.approx([expected[3], expected[5]])
    assert (tmp_path / "out/checkpoint-3").is_dir() and (tmp_path / "out/checkpoint-6").is_dir()


def test_images_and_data_that_change_while_it_trains_end_the_run(run, tmp_path, monkeypatch):
    from hf_llava_ft.training.progress import LiveProgress

    def spoil(self, args, state, control, **kwargs):
        if state.global_step == 2:
            for image in run.images.iterdir():
                Image.new("RGB", (30, 30), "red").save(image)

    monkeypatch.setattr(LiveProgress, "on_step_begin", spoil, raising=False)
    with pytest.raises(UserError) as error:
        run(max_steps=8)
    assert "data.json: row with id " in error.value.sentence and ".png was changed while the run" in str(error.value)
    assert (tmp_path / "out/checkpoint-2").is_dir() and not (tmp_path / "out/checkpoint-4").exists()


def test_a_trainer_holds_to_it_too(tiny_checkpoint, llava_json, tmp_path):
    data = llava_json(6)
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "mm_projector_lr": 1e-3}
    make_trainer(tiny_checkpoint, data, tmp_path / "out", **settings).train()
    checkpoint = str(tmp_path / "out/checkpoint-2")
    with pytest.raises(UserError, match="--seed was 42 and is 1; --per_device|--per_device.*--seed was 42 and is 1"):
        make_trainer(tiny_checkpoint, data, tmp_path / "out", **settings, seed=1, per_device_train_batch_size=1).train(
            resume_from_checkpoint=checkpoint
        )
    changed = {"learning_rate": 1e-4, "mm_projector_lr": 1e-5, "weight_decay": 0.3, "adam_beta2": 0.9}
    resumed = make_trainer(tiny_checkpoint, data, tmp_path / "out", **{**settings, **changed})
    resumed.train(resume_from_checkpoint=checkpoint)
    groups = resumed.optimizer.param_groups
    assert {group["initial_lr"] for group in groups} == {1e-4, 1e-5}
    assert {group["weight_decay"] for group in groups} <= {0.3, 0.0} and 0.3 in {g["weight_decay"] for g in groups}
    assert {group["betas"] for group in groups} == {(0.9, 0.9)}
    # Shorter than what was trained, by epochs.
    short = make_trainer(
        tiny_checkpoint, data, tmp_path / "out", **{**settings, "max_steps": -1}, num_train_epochs=0.5
    )
    with pytest.raises(UserError, match="checkpoint-4 is of step 4, and the run is to end at 2: give more --num_tr"):
        short.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-4"))


def test_a_checkpoint_of_before_is_resumed_with_a_note(run, tmp_path, capsys):
    run()
    expected = rates(tmp_path / "out")
    for step in (2, 4):
        seal = tmp_path / f"out/checkpoint-{step}/complete.json"
        seal.write_text(json.dumps({"files": read_seal(seal.parent)["files"]}))
    (tmp_path / "out/run.json").unlink()
    run(resume_from_checkpoint=tmp_path / "out/checkpoint-2")
    assert "does not say what its run was" in " ".join(capsys.readouterr().err.split())
    assert rates(tmp_path / "out") == expected
    assert Run.of(tmp_path / "out/checkpoint-4").course is not None
