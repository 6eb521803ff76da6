"""What trains is float32 in memory, and the result is in the dtype that the model came in."""

import json

import pytest
import torch
from safetensors.torch import load_file

from hf_llava_ft import LlavaTrainer, load_llava_json
from hf_llava_ft.checkpoints.opening import load_model
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.settings.parsing import parse_arguments, resolve
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.train import train
from hf_llava_ft.training import tuning
from hf_llava_ft.training.loss import LossOverTokens
from hf_llava_ft.training.precision.masters import dtype_of_result, with_float32_masters


@pytest.fixture(scope="module")
def copies(tiny_checkpoint, tmp_path_factory):
    """The tiny checkpoint in float16 and in bfloat16, and both with the same numbers in float32."""
    folder = tmp_path_factory.mktemp("copies")
    for name in ("float16", "bfloat16"):
        model = load_model(str(tiny_checkpoint), dtype=getattr(torch, name))
        for dtype in (name, f"{name}-as-float32"):
            (model if dtype == name else model.float()).save_pretrained(folder / dtype)
            LlavaProcessor.from_pretrained(tiny_checkpoint).save_pretrained(folder / dtype)
    return folder


@pytest.fixture
def run(copies, llava_json, tmp_path):
    data, images = llava_json()

    def trained(name, *flags):
        arguments = ["--model_name_or_path", copies / name, "--data_path", data, "--image_folder", images]
        arguments += ["--output_dir", tmp_path / name, "--use_cpu", "True", "--max_steps", "4", "--save_steps", "4"]
        arguments += ["--learning_rate", "1e-3", "--warmup_steps", "0", "--per_device_train_batch_size", "1", *flags]
        return train(*parse_arguments([str(each) for each in arguments]))

    return trained


@pytest.mark.parametrize(
    "train_type, dtype, flags",
    [
        ("full", "float16", ()),
        ("full", "float16", ("--bf16", "True")),
        ("full", "bfloat16", ()),
        ("freeze_vision", "float16", ("--bf16", "True")),
    ],
)
def test_losses_are_those_of_float32(run, train_type, dtype, flags):
    flags = ("--train_type", train_type, *flags)
    half, whole = run(dtype, *flags).losses, run(f"{dtype}-as-float32", *flags).losses
    assert len(half) == 4 and half == pytest.approx(whole, abs=1e-3)


def test_in_float16_itself_they_are_others(run, monkeypatch):
    """Negative control: what happens where nothing is turned to float32."""
    whole = run("float16-as-float32", "--train_type", "full").losses
    as_it_is = lambda model: model  # noqa: E731
    monkeypatch.setattr(tuning, "with_float32_masters", as_it_is)
    monkeypatch.setattr("hf_llava_ft.training.trainer.with_float32_masters", as_it_is)
    monkeypatch.setattr("hf_llava_ft.training.guards.finite.FiniteTraining.see_gradients", lambda *_: None)
    half = run("float16", "--train_type", "full").losses
    assert max(abs(a - b) for a, b in zip(half, whole, strict=True)) > 5e-3


def test_a_model_of_model_init_is_trained_in_float32_by_our_loss(copies, llava_json, tmp_path):
    processor = LlavaProcessor.from_pretrained(copies / "float16")

    def losses(name, **how):
        flags = {"use_cpu": True, "max_steps": 2, "warmup_steps": 0, "learning_rate": 1e-3, "save_strategy": "no"}
        args = LlavaTrainingArguments(output_dir=str(tmp_path / name), disable_tqdm=True, **flags)
        data = {"train_dataset": load_llava_json(*llava_json()), "processing_class": processor}
        trainer = LlavaTrainer(args=args, **data, **how)
        trainer.train()
        assert {each.dtype for each in trainer.model.parameters()} == {torch.float32}
        assert isinstance(trainer.model.loss_function, LossOverTokens)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    half, whole = (str(copies / name) for name in ("float16", "float16-as-float32"))
    found = losses("half", model_init=lambda: load_model(half, processor))
    assert found == pytest.approx(losses("whole", model=load_model(whole, processor)), abs=1e-3)


def test_the_result_is_in_the_dtype_it_came_in_and_checkpoints_are_whole(run, capsys):
    result = run("float16", "--train_type", "full")
    saved, kept = (load_file(result.adapter_dir / f"{name}model.safetensors") for name in ("", "checkpoint-4/"))
    assert {each.dtype for each in saved.values()} == {torch.float16}
    assert sum(each.dtype == torch.float32 for each in kept.values()) > 0.5 * len(kept)
    for name, each in kept.items():
        assert torch.equal(each.half(), saved[name]), name
    config = json.loads((result.adapter_dir / "config.json").read_text())
    assert {config["dtype"], config["torch_dtype"], config["text_config"]["dtype"]} == {"float16"}
    assert load_model(str(result.adapter_dir)).dtype == torch.float16
    said = " ".join(capsys.readouterr().err.split())
    assert "weights that trained in float32 are saved in float16" in said
    assert "Precision: what trains is held in float32; computed in the dtype of the weights." in said


def test_only_a_part_in_which_something_trains_is_turned(tiny):
    model = tiny.model().half()
    model.requires_grad_(False)
    model.model.multi_modal_projector.linear_1.bias.requires_grad_(True)
    again = with_float32_masters(with_float32_masters(model))
    turned = {name for name, each in again.named_parameters() if each.dtype == torch.float32}
    assert len(turned) == 4 and all(name.startswith("model.multi_modal_projector.") for name in turned)
    assert dtype_of_result(again) == torch.float16 and dtype_of_result(tiny.model()) == torch.float32


MINIMAL = ["--model_name_or_path", "model", "--data_path", "data.json"]


@pytest.mark.parametrize(
    "flags",
    [("--bf16", "False"), ("--fp16", "True"), ("--use_cpu", "True"), ("--dtype", "float32"), ("--preset", "stage")],
    ids=str,
)
def test_bfloat16_is_not_chosen_where_something_was_said(flags):
    if flags[0] == "--preset":
        flags = ("--preset", "llava-v1.5-lora")
    settings = resolve([*MINIMAL, *flags])
    assert settings.with_chosen_precision(True) is settings


def test_bfloat16_is_chosen_where_the_gpu_has_it_and_it_is_said(tmp_path, monkeypatch):
    settings = resolve(MINIMAL)
    assert settings.with_chosen_precision(False) is settings and not settings.by_name["bf16"].value
    chosen = settings.with_chosen_precision(True)
    assert chosen.by_name["bf16"].value is True and "--bf16 False" in chosen.notes[-1]
    file = tmp_path / "zero.json"
    for enabled, is_chosen in (("auto", True), (False, False)):
        file.write_text(json.dumps({"bf16": {"enabled": enabled}}))
        chosen = resolve([*MINIMAL, "--deepspeed", str(file)]).with_chosen_precision(True)
        assert chosen.by_name["bf16"].value is is_chosen
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert settings.with_chosen_precision(True) is settings
