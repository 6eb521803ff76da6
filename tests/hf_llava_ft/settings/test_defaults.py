"""What nobody said follows from what trains and from the number of rows; what somebody said stays."""

import json
import math

import pytest

from hf_llava_ft.settings import training_arguments
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.settings.defaults import (
    BY_SIZE,
    RATES,
    UNTIL_KNOWN,
    batch_of,
    by_size,
    training_with_defaults,
    tuning_with_defaults,
    warmup_of,
)
from hf_llava_ft.settings.parsing import parse_arguments, resolve
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.train import main as train_main

MINIMAL = ["--model_name_or_path", "m", "--data_path", "d.json", "--output_dir", "o"]
ON_CPU = ["--use_cpu", "True"]


def shown(*flags) -> dict:
    """Of a dry run, each as (value, origin)."""
    settings = json.loads(resolve([*MINIMAL, *flags]).to_json())["settings"]
    return {name: (setting["value"], setting["from"]) for name, setting in settings.items()}


@pytest.mark.parametrize(
    ("train_type", "rate", "projector", "tower"),
    [
        ("lora", 2e-4, 2e-5, None),
        ("qlora", 2e-4, 2e-5, None),
        ("projector", 1e-3, None, None),
        ("freeze_vision", 2e-5, None, None),
        ("full", 2e-5, None, 2e-6),
    ],
)
def test_the_rates_are_llavas_own_for_what_trains(train_type, rate, projector, tower):
    found = shown("--train_type", train_type)
    assert found["learning_rate"] == (rate, f"default of {train_type}")
    assert found["mm_projector_lr"] == (projector, f"default of {train_type}")
    assert found["mm_vision_tower_lr"] == (tower, f"default of {train_type}")
    assert train_type in RATES


def test_a_dry_run_says_what_waits_for_the_rows():
    found = shown()
    assert found["lora_r"][0] is None
    assert found["lora_r"][1] == (
        "default of lora, by the number of rows: 8 up to 100; 16 up to 1,000; 32 up to 10,000; 64 up to 100,000; "
        "else 128"
    )
    assert found["lora_alpha"] == (None, "default of lora, twice lora_r")
    assert found["num_train_epochs"][1].endswith(
        "10 up to 100; 5 up to 1,000; 3 up to 10,000; 2 up to 100,000; else 1"
    )
    assert found["gradient_accumulation_steps"][1].endswith("else 128")
    assert shown("--train_type", "projector")["gradient_accumulation_steps"][1].endswith("else 256")
    assert shown("--train_type", "full")["lora_r"] == (None, "default")


@pytest.mark.parametrize("train_type", RATES)
def test_a_dry_run_counts_the_rows_of_a_small_file(train_type, tmp_path, capsys, llava_json):
    data, images = llava_json(3)
    flags = ["--model_name_or_path", "m", "--data_path", str(data), "--image_folder", str(images), "--dry_run"]
    train_main([*flags, "--output_dir", "o", "--train_type", train_type])
    found = json.loads(capsys.readouterr().out)["settings"]
    origin = f"default of {train_type}, for 3 rows"
    assert found["num_train_epochs"] == {"value": 10, "from": origin}
    assert found["per_device_train_batch_size"] == {"value": 4, "from": origin}
    assert found["gradient_accumulation_steps"] == {"value": 1, "from": origin}
    assert found["warmup_steps"] == {"value": 0.0, "from": origin}  # 10 steps
    is_lora = train_type in ("lora", "qlora")
    assert found["lora_r"] == ({"value": 8, "from": origin} if is_lora else {"value": None, "from": "default"})
    assert found["lora_alpha"]["value"] == (16 if is_lora else None)


def test_deepspeed_is_told_the_batch_before_the_rows_are_counted():
    found = shown("--deepspeed", "examples/deepspeed/zero2.json")
    origin = "default of lora, since DeepSpeed is told before the rows are counted"
    assert found["per_device_train_batch_size"] == (8, origin)
    assert found["gradient_accumulation_steps"] == (1, origin)


def test_what_is_said_wins_in_every_layer(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 3e-4\n")
    assert shown("--learning_rate", "1e-5")["learning_rate"] == (1e-5, "flag")
    found = {name: s.value for name, s in resolve([str(recipe), *MINIMAL, "--train_type", "full"]).by_name.items()}
    assert found["learning_rate"] == 3e-4 and found["mm_vision_tower_lr"] is None
    preset = shown("--preset", "llava-v1.5-finetune")
    assert preset["learning_rate"] == (2e-5, "preset llava-v1.5-finetune") and preset["mm_projector_lr"][0] is None
    assert preset["num_train_epochs"][0] == 1 and preset["gradient_accumulation_steps"][0] == 1
    original = shown("--lora_enable", "True")
    assert original["learning_rate"] == (5e-5, "default of the original") and original["mm_projector_lr"][0] is None
    assert [original[name][0] for name in ("num_train_epochs", "per_device_train_batch_size", "lora_r")] == [3, 8, 64]
    assert original["gradient_accumulation_steps"][0] == 1 and original["warmup_steps"][0] == 0
    other = shown("--train_type", "use_lora")
    assert [other[name][0] for name in ("learning_rate", "mm_projector_lr", "num_train_epochs")] == [5e-5, None, 3]


def test_whoever_says_one_of_a_pair_says_both():
    assert shown("--learning_rate", "1e-3")["mm_projector_lr"][0] is None
    assert shown("--mm_projector_lr", "1e-3")["learning_rate"][0] == 2e-4
    batch = shown("--per_device_train_batch_size", "4")
    assert batch["gradient_accumulation_steps"][0] == 1
    assert shown("--gradient_accumulation_steps", "4")["per_device_train_batch_size"][0] is None
    assert shown("--lora_r", "12")["lora_alpha"] == (24, "default of lora, twice lora_r")
    assert shown("--use_rslora", "True")["lora_alpha"] == (16, "default of lora, with use_rslora")


def test_a_new_projector_is_not_spared():
    assert shown("--train_type", "lora", "--vision_tower", "v")["mm_projector_lr"][0] is None
    spared = shown("--train_type", "lora", "--vision_tower", "v", "--pretrain_mm_mlp_adapter", "p")
    assert spared["mm_projector_lr"][0] == 2e-5


def test_a_short_run_gives_no_step_away():
    assert warmup_of(99) == 0.0 and warmup_of(100) == 0.03
    assert shown("--max_steps", "9")["warmup_steps"] == (0.0, "default of lora, for 9 steps")
    assert shown("--max_steps", "900")["warmup_steps"][0] == 0.03
    assert shown("--max_steps", "9", "--warmup_steps", "0.03")["warmup_steps"] == (0.03, "flag")


@pytest.mark.parametrize("num_rows", [1, 100, 101, 1_000, 5_000, 100_000, 665_298, None])
@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
def test_the_rows_of_a_step_are_those_of_the_table_on_any_number_of_devices(num_rows, num_devices):
    for train_type, most in (("lora", 128), ("projector", 256)):
        size, accumulation = batch_of(train_type, num_rows, num_devices, {}).values()
        wanted = by_size(num_rows).rows_per_step if by_size(num_rows) is not BY_SIZE[-1] else most
        assert size * accumulation * num_devices == max(wanted, num_devices) and 1 <= size <= 8


def test_larger_sets_get_a_larger_rank_more_rows_a_step_and_fewer_epochs():
    for smaller, larger in zip(BY_SIZE[:-1], BY_SIZE[1:], strict=True):
        assert smaller.most_rows < larger.most_rows and smaller.lora_r < larger.lora_r
        assert smaller.rows_per_step < larger.rows_per_step and smaller.num_epochs > larger.num_epochs
    assert BY_SIZE[-1].most_rows == math.inf
    assert (BY_SIZE[-1].lora_r, BY_SIZE[-1].num_epochs, BY_SIZE[-1].rows_per_step) == (128, 1, 128)


def test_from_python_as_from_the_command_line(tmp_path):
    _, _, tuning, parsed = parse_arguments([*MINIMAL, *ON_CPU, "--train_type", "full"])
    given = LlavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    of_command = training_with_defaults(parsed, "full", 500)
    of_python = training_with_defaults(given, "full", 500)
    for name in UNTIL_KNOWN:
        assert getattr(of_command, name) == getattr(of_python, name), name
    assert (of_python.learning_rate, of_python.mm_vision_tower_lr, of_python.num_train_epochs) == (2e-5, 2e-6, 5.0)
    assert of_python.per_device_train_batch_size * of_python.gradient_accumulation_steps == 8
    assert of_python.warmup_steps == 0.03  # 63 steps, five times
    assert given.unsaid == frozenset(UNTIL_KNOWN)  # those of the user stay as they are
    assert not of_python.unsaid and training_with_defaults(of_python, "lora", 3) is of_python
    assert tuning.lora_r is None


def test_what_is_said_from_python_stays(tmp_path):
    given = LlavaTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, learning_rate=2e-4, num_train_epochs=3, warmup_steps=0.5
    )
    found = training_with_defaults(given, "full", 10)
    assert (found.learning_rate, found.num_train_epochs, found.warmup_steps) == (2e-4, 3, 0.5)
    assert found.mm_vision_tower_lr is None and found.per_device_train_batch_size == 4


def test_lora_follows_the_rows_and_what_is_said():
    def lora(num_rows, **fields):
        found = tuning_with_defaults(TuningArguments(**fields), num_rows)
        return found.lora_r, found.lora_alpha

    assert [lora(number) for number in (30, 900, 9_000, 90_000)] == [(8, 16), (16, 32), (32, 64), (64, 128)]
    assert lora(None) == (128, 256)
    assert (
        lora(30, lora_r=4) == (4, 8)
        and lora(30, lora_alpha=5) == (8, 5)
        and lora(30, lora_r=2, lora_alpha=3) == (2, 3)
    )
    assert lora(30, train_type="full") == (None, None)


def test_a_run_that_goes_on_keeps_what_it_had(tmp_path):
    before = {
        "learning_rate": 3e-4,
        "mm_projector_lr": None,
        "mm_vision_tower_lr": None,
        "num_train_epochs": 7.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "warmup_steps": 0.1,
        "max_tokens_per_batch": None,
        "lora_r": 5,
        "lora_alpha": 6,
    }
    given = LlavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    found = training_with_defaults(given, "lora", 30, before=before)
    assert {name: getattr(found, name) for name in UNTIL_KNOWN} == {name: before[name] for name in UNTIL_KNOWN}
    tuned = tuning_with_defaults(TuningArguments(), 30, before)
    assert (tuned.lora_r, tuned.lora_alpha) == (5, 6)
    said = LlavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, learning_rate=1e-4)
    assert training_with_defaults(said, "lora", 30, before=before).learning_rate == 1e-4


def test_bfloat16_is_chosen_from_python_too_where_the_gpu_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(training_arguments, "has_bf16_gpu", lambda: True)
    with pytest.raises(ValueError, match="doesn't support bf16/gpu"):  # transformers looks for the GPU
        LlavaTrainingArguments(output_dir=str(tmp_path))
    for said in ({"use_cpu": True}, {"bf16": False}):
        assert LlavaTrainingArguments(output_dir=str(tmp_path), **said).bf16 is False
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert LlavaTrainingArguments(output_dir=str(tmp_path)).bf16 is False
