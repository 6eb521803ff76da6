"""Number formats, attention and gradient checkpointing reach the computation, whichever engine runs it."""

import json

import pytest

from hf_llava_ft.settings.machine import machine_problems
from hf_llava_ft.settings.parsing import resolve
from tests.ranks import ENGINES, run, write_rows

ALL = ["single", *ENGINES]
MINIMAL = ["--model_name_or_path", "model", "--data_path", "data.json"]
FLAGS = ("--bf16", "True", "--attn_implementation", "eager", "--gradient_checkpointing", "True")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"), 4)


@pytest.fixture
def observed(tiny_checkpoint, data, tmp_path):
    """`observed(engine, *flags)`: what the first rank's first training step was computed with."""

    def facts(engine, *flags) -> dict:
        argv = [
            *("--model_name_or_path", tiny_checkpoint, "--data_path", data, "--image_folder", data.parent),
            *("--output_dir", tmp_path / "out", "--use_cpu", "True", "--max_steps", "1", "--save_strategy", "no"),
            *("--per_device_train_batch_size", "1", *flags),
        ]
        run(engine, argv, tmp_path / "logs", "tests.observed_run:observe")
        return json.loads((tmp_path / "out/observed-0.json").read_text())

    return facts


@pytest.mark.slow
@pytest.mark.parametrize("train_type", ["lora", "full"])
@pytest.mark.parametrize("engine", ALL)
def test_what_is_asked_for_arrives(observed, engine, train_type):
    found = observed(engine, "--train_type", train_type, *FLAGS)
    assert found["projected"] == "bfloat16"
    assert found["attention"] == ["eager", "eager"]
    assert found["layer_runs"] == 2  # the second in the backward pass


@pytest.mark.slow
@pytest.mark.parametrize("engine", ALL)
def test_what_is_not_asked_for_does_not(observed, engine):
    """Negative control, and that the engines are those they are taken for."""
    found = observed(engine, "--padding_free", "false")  # without padding it would be sdpa_by_document
    assert found["projected"] == "float32" and found["trained"] == ["float32"]
    assert found["attention"] == ["sdpa", "sdpa"]
    assert found["layer_runs"] == 1
    wrapped = {"single": "PeftModelForCausalLM", "ddp": "DistributedDataParallel", "fsdp2": "FSDPPeftModelForCausalLM"}
    assert found["wrapped"] == wrapped.get(engine, "DeepSpeedEngine")


@pytest.mark.parametrize("flag", ["bf16", "fp16", "tf32"])
def test_a_dry_run_tells_the_number_format(flag):
    settings = resolve([*MINIMAL, f"--{flag}", "True"])
    assert json.loads(settings.to_json())["settings"][flag] == {"value": True, "from": "flag"}


def test_float16_is_refused_where_float32_would_be_computed():
    def problems(*flags) -> list[str]:
        by_name = resolve([*MINIMAL, "--use_cpu", "True", *flags]).by_name
        return machine_problems({name: setting.value for name, setting in by_name.items()})

    assert len(problems("--fp16", "True")) == 1 and "--fp16 True needs a GPU" in problems("--fp16", "True")[0]
    assert problems() == problems("--bf16", "True") == []
