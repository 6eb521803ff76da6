"""Gradient checkpointing is chosen by what a run needs and what is free, unless somebody says it."""

import json

import pytest
import torch

import hf_llava_ft
from hf_llava_ft.errors import UserError
from hf_llava_ft.estimate import checkpointing
from hf_llava_ft.estimate.checkpointing import choose_checkpointing
from hf_llava_ft.library_differences import checkpointing_flags
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.settings.machine import free_memory
from hf_llava_ft.settings.parsing import resolve
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.train import main
from tests.ranks import logged

MINIMAL = ["--model_name_or_path", "m", "--data_path", "d.json", "--image_folder", "i", "--output_dir", "o"]
MIB = 2**20


@pytest.mark.parametrize(
    ("words", "is_auto", "is_on"),
    [
        ((), True, False),
        (("--gradient_checkpointing", "auto"), True, False),
        (("--gradient_checkpointing", "True"), False, True),
        (("--gradient_checkpointing",), False, True),
        (("--gradient_checkpointing", "false"), False, False),
    ],
)
def test_true_and_false_are_said_and_all_else_is_auto(words, is_auto, is_on):
    *_, args = resolve([*MINIMAL, "--use_cpu", "True", *words]).build()
    assert args.checkpointing_is_auto is is_auto
    assert {getattr(args, name) for name in checkpointing_flags()} == {is_on}


def test_another_word_is_refused(tmp_path):
    with pytest.raises(UserError, match="gradient_checkpointing"):
        resolve([*MINIMAL, "--gradient_checkpointing", "sometimes"])
    with pytest.raises(ValueError, match="gradient_checkpointing sometimes is none of auto, true and false"):
        LlavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, gradient_checkpointing="sometimes")


@pytest.fixture
def choice(tiny, tiny_processor, llava_json, tmp_path, monkeypatch):
    """`choice(free, **settings)`: what is chosen with so many bytes free, on a device that is taken for a GPU."""
    data = hf_llava_ft.load_llava_json(*llava_json(8))

    def choose(free, device="cuda", **settings):
        args = LlavaTrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, **({"per_device_train_batch_size": 4} | settings)
        )
        with monkeypatch.context() as patch:
            patch.setattr(checkpointing, "free_memory", lambda _: free)
            patch.setattr(LlavaTrainingArguments, "device", torch.device(device))
            tuning, loaded_on = TuningArguments(train_type="full"), torch.device("cpu")
            return choose_checkpointing(
                *(tiny.config(), tuning, args, data, tiny_processor, 512, torch.float32, loaded_on)
            )

    return choose


def test_it_is_on_where_the_heaviest_batch_does_not_fit_without(choice):
    assert choice(None) == checkpointing.Choice(False)  # on a device that does not say what is free
    fits, does_not = choice(2**31), choice(2**30)
    assert not fits.checkpointing and fits.told.startswith("Gradient checkpointing: off, since a step without takes ")
    assert does_not.checkpointing and "1.0 are free" in does_not.told  # a GiB is set aside for the context
    assert choice(2**31, optim="adafactor") == checkpointing.Choice(False)


def test_what_is_needed_grows_with_the_batch(choice):
    def needed(**settings):
        told = choice(1, "cpu", **settings).told
        return float(told.partition("about ")[2].partition(" ")[0])

    sizes = [needed(per_device_train_batch_size=size) for size in (1, 8)]
    packed = needed(packing=True, max_tokens_per_batch=5000, per_device_train_batch_size=1)
    assert sizes[0] <= sizes[1] <= packed


def test_a_small_run_on_a_cpu_is_not_even_traced(choice, monkeypatch):
    monkeypatch.setattr(checkpointing, "Estimator", None)
    assert choice(2**34, "cpu") == checkpointing.Choice(False)
    assert free_memory(torch.device("cpu")) > 0 and free_memory(torch.device("meta")) is None


def test_a_run_without_room_computes_twice_and_trains_the_same(
    tiny_checkpoint, llava_json, tmp_path, monkeypatch, capsys
):
    path, folder = llava_json(4)
    flags = ["--model_name_or_path", tiny_checkpoint, "--data_path", path, "--image_folder", folder, "--use_cpu"]
    flags += ["--lora_r", "4", "--lora_dropout", "0", "--max_steps", "2", "--save_strategy", "no"]
    flags += ["--per_device_train_batch_size", "2", "--learning_rate", "1e-3"]
    for name, free in (("roomy", 2**34), ("tight", 1)):
        monkeypatch.setattr(checkpointing, "free_memory", lambda _, free=free: free)
        main([*map(str, flags), "--output_dir", str(tmp_path / name)])
    assert "Gradient checkpointing: on, since a step without takes about" in capsys.readouterr().err
    found = [
        json.loads((tmp_path / name / "train_summary.json").read_text())["settings"] for name in ("roomy", "tight")
    ]
    assert [bool(each.get(checkpointing_flags()[0])) for each in found] == [False, True]
    for one, other in zip(logged(tmp_path / "roomy"), logged(tmp_path / "tight"), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
