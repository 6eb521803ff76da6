"""A finished model is in one dtype, and checkpoints keep what trains whole."""

import json

import torch
from safetensors.torch import load_file

from hf_llava_ft.checkpoints.opening import load_model
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.settings.parsing import parse_arguments
from hf_llava_ft.train import train
from hf_llava_ft.training.precision.one_dtype import in_one_dtype


def dtypes(folder) -> dict[str, set[torch.dtype]]:
    found: dict[str, set[torch.dtype]] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        found.setdefault(name.partition(".")[0], set()).add(tensor.dtype)
    return found


def test_a_projector_trained_in_float32_is_saved_as_its_base_is_and_it_is_said(
    tiny_checkpoint, llava_json, tmp_path, capsys
):
    base, out = tmp_path / "base", tmp_path / "out"
    load_model(str(tiny_checkpoint), dtype=torch.bfloat16).save_pretrained(base)
    LlavaProcessor.from_pretrained(tiny_checkpoint).save_pretrained(base)
    data, images = llava_json()
    arguments = ["--model_name_or_path", base, "--data_path", data, "--image_folder", images]
    arguments += ["--output_dir", out, "--train_type", "projector", "--use_cpu", "True", "--max_steps", "2"]
    arguments += ["--save_steps", "1", "--learning_rate", "1e-3", "--report_to", "none"]
    train(*parse_arguments([str(each) for each in arguments]))
    half, whole = {torch.bfloat16}, {torch.float32}
    assert dtypes(out) == {"language_model": half, "vision_tower": half, "multi_modal_projector": half}
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert dtypes(out / "checkpoint-2") == {
        "language_model": half,
        "vision_tower": half,
        "multi_modal_projector": whole,
    }
    kept, saved = load_file(out / "checkpoint-2/model.safetensors"), load_file(out / "model.safetensors")
    for name in kept:
        assert torch.equal(kept[name].bfloat16(), saved[name]), name
    said = " ".join(capsys.readouterr().err.split())
    assert "Note: 4 weights that trained in float32 are saved in bfloat16" in said


def test_the_share_that_is_rounded_is_that_of_the_weights():
    weight = torch.randn(64, 64)
    written, rounded = in_one_dtype({"a": weight, "b": weight.half().bfloat16(), "c": torch.arange(3)}, torch.bfloat16)
    off = (weight - weight.bfloat16().float()).norm() / weight.norm()
    assert abs(rounded.share - off) < 1e-6 and rounded.num_weights == 1
    assert written["a"].dtype == torch.bfloat16 and written["c"].dtype == torch.int64


def test_tied_weights_stay_one_and_widening_rounds_nothing():
    weight = torch.randn(8, 4).bfloat16()
    written, rounded = in_one_dtype({"embed": weight, "head": weight, "other": weight.clone()}, torch.float32)
    assert rounded is None and written["embed"] is written["head"] and written["other"] is not written["head"]
    assert torch.equal(written["embed"], weight.float())
