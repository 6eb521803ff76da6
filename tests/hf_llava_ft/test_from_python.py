"""From Python as from the command line: the same run, loss by loss, and the documented programs as they stand."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import set_seed

import hf_llava_ft
from hf_llava_ft import (
    DataArguments,
    LlavaTrainer,
    LlavaTrainingArguments,
    ModelArguments,
    TuningArguments,
    UserError,
    fine_tune,
    load_data,
    load_model,
    load_processor,
    with_tuning,
)
from hf_llava_ft.checkpoints.run_files import SUMMARY_FILE
from hf_llava_ft.from_python import words_of
from hf_llava_ft.modeling.part_names_llava import LANGUAGE_MODEL, PROJECTOR, part_of
from hf_llava_ft.train import main as train_main

LLAVA = "liuhaotian/llava-v1.5-7b"


@pytest.fixture
def desk(tiny_checkpoint, llava_json, tmp_path, monkeypatch):
    """A current folder with data.json, images/ and a tiny LLaVA under README's name of one."""
    llava_json(4)
    Path(tmp_path, LLAVA).parent.mkdir()
    Path(tmp_path, LLAVA).symlink_to(tiny_checkpoint, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def logged(output_dir) -> list[float]:
    """The losses that a run wrote down."""
    return json.loads(Path(output_dir, "trainer_state.json").read_text())["log_history"][:-1]


def documented_programs(checkout: Path) -> list[str]:
    """That of the README, and the one part by part in docs/training.md."""
    programs = []
    for page, heading in (("README.md", "\nFrom Python"), ("docs/training.md", "\nWith a Trainer of your own making")):
        text = (checkout / page).read_text(encoding="utf-8")
        section = text.split(heading, 1)[1].split("\n## ", 1)[0]
        programs += re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    return programs


def test_the_documented_programs_train_lora_and_are_the_same_run(desk, checkout):
    first, second = documented_programs(checkout)
    found: dict = {}
    exec(first, found)  # the text that people copy
    result = found["result"]
    assert {part.part for part in result.trained if part.num_trainable} == {LANGUAGE_MODEL, PROJECTOR}
    assert result.adapter_dir == Path("my-adapter") and (desk / "my-adapter/adapter_model.safetensors").is_file()

    (desk / "my-adapter").rename(desk / "first")
    exec(second, found)
    trainer = found["trainer"]
    assert isinstance(trainer.model, PeftModel)
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == result.losses
    saved, expected = (load_file(desk / name / "adapter_model.safetensors") for name in ("my-adapter", "first"))
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)
    configs = [json.loads((desk / name / "adapter_config.json").read_text()) for name in ("my-adapter", "first")]
    assert configs[0] == configs[1] | {"target_modules": configs[0]["target_modules"]}
    assert load_processor("my-adapter").image_token_id == load_processor("first").image_token_id


SETTINGS = {
    "model_name_or_path": LLAVA,
    "data_path": "data.json",
    "image_folder": "images",
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "mm_projector_lr": 3e-3,
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_modules": ["q_proj", "v_proj"],
    "save_strategy": "no",
    "use_cpu": True,
}


def test_the_command_and_python_give_the_same_losses_bit_for_bit(desk, monkeypatch):
    words = [
        text
        for name, value in SETTINGS.items()
        for text in (f"--{name}", *(value if isinstance(value, list) else [str(value)]))
    ]
    train_main([*words, "--output_dir", "by-command"])
    by_command = [entry["loss"] for entry in logged("by-command")]
    result = fine_tune(**SETTINGS, output_dir=desk / "by-name")
    assert result.losses == by_command and len(by_command) == 3 and len(set(by_command)) == 3

    tuning = TuningArguments(lora_r=4, lora_alpha=8, lora_target_modules=["q_proj", "v_proj"])
    objects = fine_tune(
        ModelArguments(model_name_or_path=LLAVA),
        DataArguments(data_path="data.json", image_folder="images"),
        tuning,
        LlavaTrainingArguments(
            output_dir="by-objects",
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            mm_projector_lr=3e-3,
            save_strategy="no",
            use_cpu=True,
        ),
    )
    assert objects.losses == by_command
    summaries = [json.loads(Path(name, SUMMARY_FILE).read_text()) for name in ("by-command", "by-name")]
    told = [{**summary["settings"], "output_dir": None} for summary in summaries]
    assert told[0] == told[1]

    another = fine_tune(**SETTINGS | {"seed": 1}, output_dir="other-seed")
    assert another.losses != by_command


def test_with_tuning_names_the_base_that_was_loaded(desk):
    model = with_tuning(load_model(LLAVA, load_processor(LLAVA)), TuningArguments(lora_r=2))
    assert model.peft_config["default"].base_model_name_or_path == str(Path(LLAVA).absolute())
    assert {part_of(name) for name, each in model.named_parameters() if each.requires_grad} == {
        *(LANGUAGE_MODEL, PROJECTOR),
    }


def test_a_trainer_whose_model_nobody_tuned_says_what_it_will_train(desk, caplog):
    processor = load_processor(LLAVA)
    arguments = LlavaTrainingArguments(output_dir="out", use_cpu=True, max_steps=1)
    data = load_data("data.json", "images")
    LlavaTrainer(load_model(LLAVA, processor), arguments, train_dataset=data, processing_class=processor)
    assert "with_tuning" in caplog.text and "vision tower" in caplog.text
    caplog.clear()
    for kind in ("full", "lora"):
        set_seed(0)
        tuned = with_tuning(load_model(LLAVA, processor), TuningArguments(train_type=kind))
        LlavaTrainer(tuned, arguments, train_dataset=data, processing_class=processor)
    assert "with_tuning" not in caplog.text


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"learning_rate": 1e-5, "bf16": True, "revision": None}, ["--learning_rate=1e-05", "--bf16=True"]),
        ({"lora_target_modules": ["q_proj", "v_proj"]}, ["--lora_target_modules", "q_proj", "v_proj"]),
        ({"eval_strategy": False, "dtype": torch.bfloat16}, ["--eval_strategy=no", "--dtype=bfloat16"]),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, ['--lr_scheduler_kwargs={"num_cycles": 2}']),
        ({"data_path": Path("-odd.json"), "max_steps": -1}, ["--data_path=-odd.json", "--max_steps=-1"]),
    ],
)
def test_values_of_python_are_the_words_of_the_command_line(settings, words):
    assert words_of([], settings) == words


@pytest.mark.parametrize(
    "arguments, settings, sentence",
    [
        ([], {"learning_rat": 1}, "did you mean --learning_rate"),
        ([], {}, "--model_name_or_path is missing"),
        ([], {"model_name_or_path": LLAVA, "data_path": "x", "output_dir": "o", "lora_r": 0}, "--lora_r 0"),
        ([TuningArguments()], {}, "one object each of ModelArguments"),
        ([{"lora_r": 4}], {}, "give settings by name"),
        (["a.yaml", "b.yaml"], {}, "got 2 recipes"),
        ([], {"dry_run": True}, "llava-ft train --dry_run"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(arguments, settings, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        fine_tune(*arguments, **settings)


def test_a_recipe_is_a_recipe_that_names_may_change(desk):
    Path("recipe.yaml").write_text("lora_r: 2\nlearning_rate: 1e-3\n")
    result = fine_tune("recipe.yaml", **SETTINGS | {"lora_r": None, "max_steps": 1}, output_dir="out")
    settings = result.summary["settings"]
    assert settings["lora_r"] == 2 and settings["learning_rate"] == 1e-2


# The registration needs torch and transformers, which bring accelerate and jinja2.
IMPORT_AND_SAY_WHAT_CAME = """
import sys
import hf_llava_ft
assert {"fine_tune", "with_tuning", "TuningArguments"} <= set(dir(hf_llava_ft))
print(sorted({"peft", "datasets", "matplotlib", "rich"} & sys.modules.keys()))
"""


def test_importing_the_package_waits_for_nothing_that_only_training_needs(checkout):
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_AND_SAY_WHAT_CAME], cwd=checkout, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there():
    assert all(getattr(hf_llava_ft, name) is not None for name in hf_llava_ft.__all__)
