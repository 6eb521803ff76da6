"""Help and mistakes of a command line are told before torch and transformers are imported."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
from transformers import TrainingArguments

from hf_llava_ft.errors import UserError
from hf_llava_ft.settings.arguments import DataArguments, ModelArguments, TuningArguments
from hf_llava_ft.settings.flags.first_look import first_look
from hf_llava_ft.settings.flags.help import GROUPS, NOT_SHOWN, help_text
from hf_llava_ft.settings.flags.known import all_names, flags_of_transformers, is_known, own_flags
from hf_llava_ft.settings.flags.wrong_names import _MEANT
from hf_llava_ft.settings.parsing import _Parser
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments

MINIMAL = ["--model_name_or_path", "m", "--data_path", "d.json"]


def names(*kinds) -> set[str]:
    return {field.name for kind in kinds for field in dataclasses.fields(kind) if field.init}


def test_the_flags_that_are_read_are_those_that_there_are():
    assert set(flags_of_transformers()) == names(TrainingArguments)
    own = names(ModelArguments, DataArguments, TuningArguments, LlavaTrainingArguments) - names(TrainingArguments)
    assert own <= set(own_flags()) <= own | names(TrainingArguments)
    parser = _Parser()
    assert parser.names - {"dry_run"} == all_names()
    assert all(is_known(option.lstrip("-")) for action in parser._actions for option in action.option_strings)


def test_defaults_and_helps_are_read_as_they_are():
    fields = {field.name: field for field in dataclasses.fields(LlavaTrainingArguments)}
    flag = own_flags()["logging_steps"]
    assert (flag.default, flag.help) == (fields["logging_steps"].default, fields["logging_steps"].metadata["help"])
    assert flags_of_transformers()["seed"].default == 42


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--lerning_rate", "1"], "unknown argument --lerning_rate; did you mean --learning_rate?"),
        (["--batch_size", "4"], "did you mean --per_device_train_batch_size?"),
        (["--batch-size=4"], "did you mean --per_device_train_batch_size?"),
        (["--lr", "1"], "did you mean --learning_rate?"),
        (["--epochs", "3"], "did you mean --num_train_epochs?"),
        (["--load_in_4bit"], "did you mean --bits 4?"),
        (["--rank", "4"], "did you mean --lora_r?"),
        (["--zzz"], "unknown argument --zzz; llava-ft train --help"),
    ],
)
def test_a_mistyped_flag_is_told_with_what_was_meant(words, sentence):
    with pytest.raises(UserError) as caught:
        first_look([*MINIMAL, *words])
    assert sentence in str(caught.value)


def test_a_wrong_guess_ends_at_a_flag_that_there_is():
    assert all(is_known(meant.split()[0]) for meant in _MEANT)
    for meant, guesses in _MEANT.items():
        # A guess that is a flag would never be asked about.
        assert not [guess for guess in guesses.split() if is_known(guess)], meant


@pytest.mark.parametrize("missing", ["data_path", "model_name_or_path"])
def test_what_is_missing_is_told(missing, tmp_path):
    words = [word for name in ("data_path", "model_name_or_path") if name != missing for word in (f"--{name}", "x")]
    with pytest.raises(UserError, match=f"--{missing} is missing: the "):
        first_look(words)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{missing}: there\n")
    assert first_look([str(recipe), *words]) is None
    assert first_look([f"--{missing.replace('_', '-')}=there", *words]) is None


def test_a_recipe_is_looked_at_too(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("batch_size: 3\n")
    with pytest.raises(
        UserError, match="'batch_size', which is not a setting: did you mean per_device_train_batch_size"
    ):
        first_look([str(recipe), *MINIMAL])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--train_type", "freeze-vision"],
            "freeze-vision: did you mean freeze_vision? It is one of",
        ),
        (
            ["--train-type=half"],
            "--train_type half: It is one of lora, qlora, projector,",
        ),
        (["--bits", "3"], "--bits 3: It is one of 4, 8, 16."),
        (["--quant_type", "nf5"], "did you mean nf4?"),
    ],
)
def test_a_choice_that_there_is_none_of_is_told(words, sentence):
    with pytest.raises(UserError) as caught:
        first_look([*MINIMAL, *words])
    assert sentence in str(caught.value)


def test_what_the_parser_takes_passes():
    words = ["--no_double_quant", "--no-cuda", "--lora-r", "3", "--mm_vision_select_layer", "-2", "--local_rank=0"]
    words += ["--image_aspect_ratio", "anyres_max_9", "--bits=4", "--train_type", "full", "--quant_type"]
    assert first_look([*MINIMAL, *words, "--evaluation_strategy", "no", "--preset", "x", "--dry_run"]) is None


def test_nothing_heavy_is_imported_for_it():
    code = (
        "import sys; sys.argv = ['llava-ft']\n"
        "from hf_llava_ft.settings.flags.first_look import first_look\n"
        "assert first_look(['--help']) and first_look(['--help-all'])\n"
        "assert not {'torch', 'transformers', 'datasets', 'peft', 'numpy'} & set(sys.modules), sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr


def test_each_flag_of_ours_stands_in_one_group_and_is_short(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    listed = [name for group in GROUPS.values() for name in group]
    assert len(listed) == len(set(listed)) and set(own_flags()) <= {*listed, *NOT_SHOWN}
    page = help_text()
    assert max(map(len, page.splitlines())) <= 80 and len(page.splitlines()) < 230
    assert all(page.count(f"\n  --{name} ") <= 1 for name in listed)
    for name in set(flags_of_transformers()) - set(listed) - set(NOT_SHOWN):
        assert not re.search(rf"^  --{name}\b", page, re.MULTILINE), name
        assert re.search(rf"^  --{name}\b", help_text(with_all=True), re.MULTILINE), name


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["--learning_rat", "1"], 2)])
def test_the_module_that_launchers_start_looks_first_too(words, code):
    command = [sys.executable, "-X", "importtime", "-m", "hf_llava_ft.train", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == code
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "hf_llava_ft.settings.flags.first_look" in imported and not {"torch", "transformers"} & imported
