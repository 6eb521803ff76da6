"""Presets are the scripts of LLaVA-1.5, and every flag of theirs is one of ours."""

import dataclasses
import typing

import pytest

from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.chat_templates_llava import CHAT_TEMPLATES
from hf_llava_ft.settings.arguments import DataArguments, ModelArguments, TuningArguments
from hf_llava_ft.settings.presets import PRESETS, preset_flags
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.train import parse_arguments

REQUIRED = ["--model_name_or_path", "model", "--data_path", "data.json"]
CLASSES = (ModelArguments, DataArguments, TuningArguments, LlavaTrainingArguments)

# As haotian-liu/LLaVA c121f04 has it in scripts/v1_5/*.sh: learning rate, the projector's, rows per device, template,
# aspect ratio (the default of train.py where the script gives none), by modality and length.
SCRIPTS = {
    "llava-v1.5-pretrain": (1e-3, None, 32, "plain", "square", False),
    "llava-v1.5-finetune": (2e-5, None, 16, "v1", "pad", True),
    "llava-v1.5-lora": (2e-4, 2e-5, 16, "v1", "pad", True),
}


def parsed(name, tmp_path, *more):
    # Half precision and its checks are the machine's business, not this test's.
    return parse_arguments([*REQUIRED, "--output_dir", str(tmp_path), *preset_flags(name), "--bf16", "False", *more])


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_script(name, tmp_path):
    model, data, tuning, training = parsed(name, tmp_path)
    found = (
        training.learning_rate,
        training.mm_projector_lr,
        training.per_device_train_batch_size,
        model.version,
        model.image_aspect_ratio,
        training.group_by_modality_length,
    )
    assert found == SCRIPTS[name]
    assert (training.lr_scheduler_type, training.warmup_steps, training.weight_decay) == ("cosine", 0.03, 0.0)
    assert (training.num_train_epochs, training.gradient_accumulation_steps) == (1, 1)
    assert (data.model_max_length, training.gradient_checkpointing) == (2048, True)
    assert "--bf16" in preset_flags(name) and model.version in CHAT_TEMPLATES
    if name == "llava-v1.5-lora":
        assert (tuning.train_type, tuning.lora_r, tuning.lora_alpha, tuning.lora_dropout) == ("lora", 128, 256, 0.05)


@pytest.mark.parametrize("name", PRESETS)
def test_every_flag_is_one_of_ours_and_takes_the_value(name):
    fields = {field.name for each in CLASSES for field in dataclasses.fields(each)}
    assert set(PRESETS[name]) <= fields
    train_types = typing.get_args(typing.get_type_hints(TuningArguments)["train_type"])
    assert PRESETS[name]["train_type"] in train_types


def test_stages_train_what_the_scripts_train():
    trained = {name: flags["train_type"] for name, flags in PRESETS.items()}
    assert trained == {
        "llava-v1.5-pretrain": "projector",
        "llava-v1.5-finetune": "freeze_vision",
        "llava-v1.5-lora": "lora",
    }


def test_a_flag_behind_a_preset_replaces_it(tmp_path):
    _, _, _, training = parsed("llava-v1.5-finetune", tmp_path, "--learning_rate", "1e-6")
    assert training.learning_rate == 1e-6


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(
        UserError, match="'llava-v1.5'; known: llava-v1.5-pretrain, llava-v1.5-finetune, llava-v1.5-lo"
    ):
        preset_flags("llava-v1.5")
