"""Where a setting comes from, and which one wins; recipes; the dry run."""

import dataclasses
import importlib.util
import json
import os
import shlex
from pathlib import Path

import pytest
import yaml

from hf_llava_ft.errors import UserError
from hf_llava_ft.settings.parsing import parse_arguments, resolve
from hf_llava_ft.train import main as train_main
from tests import warm_python

MINIMAL = ["--model_name_or_path", "m", "--data_path", "d.json", "--output_dir", "o"]


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


def origin(settings, name):
    return settings.by_name[name].value, settings.by_name[name].origin


def test_the_nearer_wins_and_each_value_knows_where_it_comes_from(recipe):
    path = recipe("learning_rate: 3e-4\nlora_r: 16\nlora_alpha: 99\n")
    settings = resolve([path, *MINIMAL, "--preset", "llava-v1.5-lora", "--lora_alpha=7"])
    assert origin(settings, "lora_alpha") == (7, "flag")
    assert origin(settings, "lora_r") == (16, f"recipe {path}")
    assert origin(settings, "learning_rate") == (3e-4, f"recipe {path}")  # which YAML takes for a string
    assert origin(settings, "mm_projector_lr") == (2e-5, "preset llava-v1.5-lora")
    assert origin(settings, "seed") == (42, "default")


def test_the_order_of_words_does_not_matter_between_layers(recipe):
    path = recipe("preset: llava-v1.5-finetune\nlora_r: 16\n")
    for words in ([path, *MINIMAL, "--lora_r", "4"], [path, "--lora_r", "4", *MINIMAL]):
        settings = resolve(words)
        assert settings.by_name["lora_r"].value == 4 and settings.by_name["train_type"].value == "freeze_vision"
    # The command line's preset replaces the recipe's, and the recipe still goes before it.
    other = resolve([path, "--preset", "llava-v1.5-lora", *MINIMAL])
    assert origin(other, "train_type") == ("lora", "preset llava-v1.5-lora")
    assert origin(other, "lora_r") == (16, f"recipe {path}")


def test_a_recipe_may_hold_the_originals_words(recipe):
    path = recipe("lora_enable: true\nevaluation_strategy: no\nwarmup_ratio: 0.1\n")
    settings = resolve([path, *MINIMAL])
    assert origin(settings, "train_type") == ("lora", f"translated from --lora_enable of recipe {path}")
    assert settings.by_name["warmup_steps"].value == 0.1 and settings.by_name["eval_strategy"].value == "no"
    assert settings.by_name["lora_r"].value == 64
    assert resolve([path, *MINIMAL, "--tune_mm_mlp_adapter"]).by_name["train_type"].value == "projector"


def test_kinds_of_values_in_a_recipe(recipe):
    path = recipe(
        "save_strategy: no\nbf16: yes\nlora_target_modules: [q_proj, v_proj]\nrun_name:\nseed: null\n"
        'fsdp_config: {min_num_params: 3}\nresume_from_checkpoint: true\nversion: "v1"\nweight_decay: 0.\n'
    )
    values = {name: setting.value for name, setting in resolve([path, *MINIMAL]).by_name.items()}
    assert values["save_strategy"] == "no" and values["bf16"] is True and values["weight_decay"] == 0.0
    assert values["lora_target_modules"] == ["q_proj", "v_proj"]
    assert values["run_name"] is None and values["seed"] == 42
    assert values["fsdp_config"] == '{"min_num_params": 3}' and values["resume_from_checkpoint"] == "True"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("learning_rat: 1\n", "recipe.yaml holds 'learning_rat', which is not a setting: did you mean learning_rate"),
        ("lora_r: much\n", "recipe.yaml: --lora_r: invalid int value: 'much'"),
        ("lora_r: 1\nlora_r: 2\n", "recipe.yaml, line 2: 'lora_r' stands there twice"),
        ("lora_r: [1\n", "recipe.yaml, line 2: "),
        ("- lora_r\n", "holds a list and not lines of the form name: value"),
        ("lora_r: !!python/object/apply:os.system ['true']\n", "recipe.yaml, line 1: "),
        ("dry_run: true\n", "holds 'dry_run', which is not a setting"),
        ("preset: llava-v9\n", "unknown preset 'llava-v9'"),
        ("1: 2\n", "holds 1, which is not a setting"),
        ("train_type: half\n", "--train_type: invalid choice: 'half'"),
    ],
)
def test_a_wrong_recipe_is_refused_with_file_and_place(recipe, text, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        resolve([recipe(text), *MINIMAL])
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(UserError, match="nowhere.yaml cannot be read: No such file"):
        resolve([str(tmp_path / "nowhere.yaml"), *MINIMAL])
    (tmp_path / "picture.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match="picture.yaml"):
        resolve([str(tmp_path / "picture.yaml"), *MINIMAL])


def test_a_recipe_behind_what_the_launcher_of_deepspeed_puts_in_front(recipe):
    settings = resolve(["--local_rank=3", recipe("lora_r: 5\n"), *MINIMAL])
    assert settings.by_name["lora_r"].value == 5 and settings.by_name["local_rank"].value == 3


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--data_path", "d"], "--model_name_or_path is missing"),
        ([*MINIMAL, "--nonsense", "1"], "unknown argument --nonsense; llava-ft train --help"),
        ([*MINIMAL, "stray"], "unknown argument stray"),
        ([*MINIMAL, "--lora_r"], "--lora_r: expected one argument"),
        ([*MINIMAL, "--bf16", "perhaps"], "--bf16: "),
        ([*MINIMAL, "--bf16", "True", "--fp16", "True"], "At most one of fp16 and bf16"),
        ([*MINIMAL, "--train_type", "full", "--bits", "8"], "bits 8 needs LoRA"),
        ([*MINIMAL, "--remove_unused_columns", "True"], "must stay False"),
    ],
)
def test_a_wrong_command_line_is_refused_in_a_sentence(argv, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        resolve(argv).to_json()
    assert "\n" not in str(caught.value)


def test_what_yaml_takes_for_something_else_reaches_its_setting_as_it_stands(recipe):
    """`no` is false to YAML, 1.10 is 1.1, 1:30 is 90 and a date is a date."""
    for text in ("no", "1.10", "1:30", "2026-11-28", "1_0", "0123"):
        assert str(yaml.safe_load(text)) != text or text == "2026-11-28", "or it would need no care"
        values = resolve([recipe(f"run_name: {text}\nlora_target_modules: [{text}, q_proj]\n"), *MINIMAL]).by_name
        assert (values["run_name"].value, values["lora_target_modules"].value) == (text, [text, "q_proj"])
    # What only YAML can read stays what YAML says.
    values = resolve([recipe("seed: 0x10\nbf16: on\nmax_grad_norm: .inf\n"), *MINIMAL]).by_name
    assert (values["seed"].value, values["bf16"].value, values["max_grad_norm"].value) == (16, True, float("inf"))


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("learning_rate", "-1", "0 or more"),
        ("mm_projector_lr", "nan", "0 or more"),
        ("learning_rate", "inf", "0 or more"),
        ("per_device_train_batch_size", "0", "1 or more"),
        ("gradient_accumulation_steps", "0", "1 or more"),
        ("num_train_epochs", "0", "more than 0"),
        ("max_steps", "0", "1 or more, or -1 for --num_train_epochs"),
        ("lora_r", "0", "1 or more"),
        ("lora_dropout", "1.5", "0 or more and less than 1"),
        ("model_max_length", "-5", "1 or more"),
        ("dataloader_num_workers", "-1", "0 or more"),
        ("seed", "-1", "0 to 4294967295"),
    ],
)
def test_a_number_that_cannot_be_meant_is_refused_with_those_that_can(recipe, flag, value, allowed):
    for argv in ([*MINIMAL, f"--{flag}={value}"], [recipe(f"{flag}: {value}\n"), *MINIMAL]):
        with pytest.raises(UserError) as caught:
            resolve(argv).to_json()
        assert str(caught.value).startswith(f"--{flag} ") and str(caught.value).endswith(f": give {allowed}.")


def test_numbers_at_the_edges_of_their_ranges_are_taken():
    edges = ["--learning_rate", "0", "--max_steps", "-1", "--num_train_epochs", "0.01", "--lora_dropout", "0"]
    edges += ["--lora_r", "1", "--dataloader_num_workers", "0", "--seed", "4294967295", "--warmup_steps", "0"]
    resolve([*MINIMAL, *edges]).to_json()


def test_truth_values_as_switch_and_as_word():
    for word, value in ((["--tf32"], True), (["--tf32", "True"], True), (["--tf32", "false"], False)):
        assert resolve([*MINIMAL, *word]).by_name["tf32"].value is value
    assert resolve([*MINIMAL, "--no_double_quant"]).by_name["double_quant"].value is False


def test_one_or_several_places_to_report_to(recipe):
    for words in (["--report_to", "wandb", "tensorboard"], [recipe("report_to: [wandb, tensorboard]\n")]):
        found = resolve([*words, *MINIMAL]).by_name["report_to"].value
        assert found == ["wandb", "tensorboard"]
    assert resolve([*MINIMAL, "--report_to", "wandb"]).by_name["report_to"].value == "wandb"


def test_bits_and_train_type_belong_together():
    def shown(*flags):
        settings = json.loads(resolve([*MINIMAL, *flags]).to_json())["settings"]
        return settings["train_type"]["value"], settings["bits"]["value"]

    assert shown("--train_type", "qlora") == ("qlora", 4)
    assert shown("--train_type", "qlora", "--bits", "8") == ("qlora", 8)
    assert shown("--train_type", "lora", "--bits", "4") == ("qlora", 4)
    assert shown() == ("lora", 16)


def test_parsed_arguments_are_those_of_the_settings(tmp_path):
    argv = [*MINIMAL, "--use_cpu", "True", "--lora_r", "3", "--tf32", "True", "--gradient_checkpointing", "True"]
    model, data, tuning, training = parse_arguments(argv)
    assert (model.model_name_or_path, data.data_path, tuning.lora_r) == ("m", "d.json", 3)
    assert training.gradient_checkpointing is True and training.device.type == "cpu"
    assert training.tf32 is None  # a CPU has none, and computes float32 exactly


def test_what_this_machine_lacks_stops_a_run_and_not_a_dry_run(tmp_path):
    argv = [*MINIMAL, "--deepspeed", "nowhere.json", "--report_to", "clearml", "--use_cpu", "True"]
    missing = json.loads(resolve(argv).to_json())["missing_on_this_machine"]
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None  # an extra, which not everybody has
    assert len(missing) == (2 if has_deepspeed else 3) and "nowhere.json: there is no such file" in missing[0]
    assert any("--deepspeed needs the package: pip install" in sentence for sentence in missing) != has_deepspeed
    assert "--report_to clearml: it is not installed: pip install clearml" in missing[-1]
    with pytest.raises(UserError, match=r"--deepspeed nowhere\.json: there is no such file"):
        parse_arguments(argv)
    with pytest.raises(UserError, match="--report_to nobody is unknown; known: .*wandb"):
        parse_arguments([*MINIMAL, "--report_to", "nobody", "--use_cpu", "True"])


def test_secrets_are_not_shown():
    for flag in ("--hub_token", "--push_to_hub_token"):
        settings = resolve([*MINIMAL, flag, "hf_secret"])
        assert settings.by_name["hub_token"].value == "hf_secret" and "hf_secret" not in settings.to_json()


def test_a_dry_run_prints_json_alone_and_leaves_nothing(tmp_path, recipe):
    path = recipe("lora_r: 5\n")
    command = ["-m", "hf_llava_ft.cli", "train", path, *MINIMAL, "--dry_run", "--lora_enable"]
    done = warm_python.run(command, cwd=tmp_path, env=os.environ | {"RANK": "0"})
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["settings"]["lora_r"] == {"value": 5, "from": f"recipe {path}"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["recipe.yaml"]


def test_one_process_of_many_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    train_main([*MINIMAL, "--dry_run"])
    assert capsys.readouterr().out == ""


def test_a_dry_run_of_what_cannot_be_meant_fails(capsys):
    with pytest.raises(SystemExit) as exited:
        train_main([*MINIMAL, "--dry_run", "--lora_enable", "--tune_mm_mlp_adapter"])
    out, err = capsys.readouterr()
    assert exited.value.code == 2 and out == "" and err.startswith("error: --lora_enable and")


def test_a_dry_run_compares_flags_with_a_model_that_is_here(capsys, tiny_checkpoint):
    flags = ["--model_name_or_path", str(tiny_checkpoint), *MINIMAL[2:], "--train_type", "lora", "--dry_run"]
    train_main([*flags, "--mm_projector_type", "mlp2x_gelu", "--mm_vision_select_layer", "-2"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train_main([*flags, "--mm_projector_type", "linear"])
    assert "--mm_projector_type linear: in " in capsys.readouterr().err


def test_a_dry_run_shows_what_an_adapter_decides(tmp_path):
    argv = ["--model_name_or_path", str(tmp_path), *MINIMAL[2:], "--lora_dropout", "0.2"]
    text = resolve(argv).to_json(lambda model, tuning: dataclasses.replace(tuning, lora_r=4, lora_alpha=8))
    shown = json.loads(text)["settings"]
    assert shown["lora_r"] == {"value": 4, "from": "the adapter that is trained further"}
    assert shown["lora_dropout"] == {"value": 0.2, "from": "flag"}
    assert json.loads(resolve(argv).to_json())["settings"]["lora_r"]["value"] is None


def test_help_names_flags_of_all_kinds(capsys):
    with pytest.raises(SystemExit) as exited:
        train_main(["--help"])
    out = capsys.readouterr().out
    assert exited.value.code == 0
    assert all(flag in out for flag in ("--lora_r", "--dry_run", "--preset", "--tune_mm_mlp_adapter", "RECIPE.yaml"))


RECIPES = sorted(Path(__file__).parents[3].glob("examples/recipes/*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_an_example_opens_with_its_command_which_is_complete(path, checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    first, second, *rest = path.read_text().splitlines()
    program, command, recipe_path, *flags = shlex.split(first.removeprefix("# "))
    assert (program, command) == ("llava-ft", "train") and (checkout / recipe_path) == path
    assert second == "#" and rest[0].startswith("# ")
    shown = json.loads(resolve([recipe_path, *flags]).to_json())["settings"]
    # Every line of the file counts, and nothing in it is the original's word for something.
    given = {line.split(":")[0] for line in rest if line and line[0] not in "# "} - {"preset"}
    assert {name for name, setting in shown.items() if setting["from"] == f"recipe {recipe_path}"} == given
    assert shown["loss_normalization"]["value"] == "tokens"


def test_the_examples_are_there_and_train_what_they_say(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    more = ["--output_dir", "o", "--data_path", "d"]
    found = {path.stem: resolve([str(path), *more]).by_name["train_type"].value for path in RECIPES}
    assert found == {
        "stage1": "projector",
        "stage2": "freeze_vision",
        "lora": "lora",
        "qlora": "qlora",
        "dora-tower": "lora",
        "small-cpu": "lora",
    }


def test_a_recipe_trains_with_flags_that_change_it(tiny_checkpoint, llava_json, tmp_path, checkout):
    data, images = llava_json(3)
    flags = {"model_name_or_path": tiny_checkpoint, "data_path": data, "image_folder": images, "max_steps": 2}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    train_main([str(checkout / "examples/recipes/small-cpu.yaml"), *words, "--output_dir", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["r"] == 16
    assert json.loads((tmp_path / "out/trainer_state.json").read_text())["global_step"] == 2
