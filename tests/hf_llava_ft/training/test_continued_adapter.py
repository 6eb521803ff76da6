"""Training goes on from an adapter as if it had not been saved in between, and the result names the base."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_llava_ft.checkpoints.adapters import tuning_of_adapter
from hf_llava_ft.checkpoints.merge import merge_adapter
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.errors import UserError
from hf_llava_ft.settings.arguments import TuningArguments

FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def parts(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("continued")
    Image.new("RGB", (60, 40), (200, 90, 20)).save(folder / "red.png")
    rows = []
    for n in range(4):
        turns = [("human", f"<image>\nWhat is {n}?"), ("gpt", f"It is {n * 7}.")]
        conversation = [{"from": who, "value": text} for who, text in turns]
        rows.append({"id": str(n), "image": "red.png", "conversations": conversation})
    (folder / "data.json").write_text(json.dumps(rows))
    return tiny_checkpoint, folder


def flags(model, folder, output_dir, *others):
    return (
        *("train", "--model_name_or_path", model, "--data_path", folder / "data.json", "--image_folder", folder),
        *(
            "--output_dir",
            output_dir,
            "--use_cpu",
            "True",
            "--max_steps",
            "2",
            "--learning_rate",
            "1e-2",
            "--save_strategy",
            "no",
        ),
        *("--per_device_train_batch_size", "2", "--report_to", "none", *others),
    )


@pytest.fixture(scope="module", params=["lora", "dora"])
def adapter(request, parts, tmp_path_factory):
    from hf_llava_ft.train import main

    base, folder = parts
    output_dir = tmp_path_factory.mktemp("first") / "adapter"
    lora = ("--lora_r", "4", "--lora_alpha", "8", "--use_dora", str(request.param == "dora"))
    main(list(map(str, flags(base, folder, output_dir, *lora)[1:])))
    return output_dir


def test_it_goes_on_with_the_weights_rank_and_base_of_the_adapter(adapter, parts, tmp_path, llava_ft):
    base, folder = parts
    slow = ("--learning_rate", "1e-8")  # what it started from is what it ends with
    code, _, err = llava_ft(*flags(adapter, folder, tmp_path / "again", *slow))
    assert code == 0, err
    before, after = load_file(adapter / FILE), load_file(tmp_path / "again" / FILE)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    assert any(name.endswith("lora_B.weight") and before[name].abs().max() > 1e-3 for name in before)
    config = json.loads((tmp_path / "again/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, str(base))
    summary = json.loads((tmp_path / "again/train_summary.json").read_text())
    assert summary["settings"]["lora_r"] == 4

    code, _, err = llava_ft(*flags(adapter, folder, tmp_path / "far"))
    assert code == 0, err
    after = load_file(tmp_path / "far" / FILE)
    kinds = ("lora_A", "lora_B", *(["magnitude"] if config["use_dora"] else []), "multi_modal_projector")
    for kind in kinds:
        moved = [not torch.equal(before[name], after[name]) for name in before if kind in name]
        assert moved, kind
        assert any(moved), kind


@pytest.mark.parametrize(
    "asked, said",
    [
        (("--train_type", "full"), "merge it first"),
        (("--train_type", "projector"), "merge it first"),
        (("--lora_r", "128"), "has 4"),  # the default, said all the same
        (("--lora_r", "16"), "has 4"),
        (("--lora_target_modules", "q_proj"), "--lora_target_modules q_proj"),
        (("--lora_vision_tower", "True"), "--lora_vision_tower True"),
        (("--train_type", "lora", "--pretrain_mm_mlp_adapter", "x"), "its own projector"),
    ],
)
def test_what_the_adapter_is_not_is_refused(adapter, parts, tmp_path, llava_ft, asked, said):
    for dry_run in ((), ("--dry_run",)):
        code, _, err = llava_ft(*flags(adapter, parts[1], tmp_path / "out", *asked, *dry_run))
        assert code == 2
        assert said in err
        assert "merge" in err


def test_what_it_is_may_be_said(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    settled = tuning_of_adapter(str(adapter), config, TuningArguments(lora_r=4, lora_dropout=0.2))
    assert (settled.lora_r, settled.lora_alpha, settled.lora_dropout) == (4, 8, 0.2)


def test_every_door_computes_the_same(adapter, tmp_path):
    """DoRA's magnitudes are at their start where they were not loaded, and the logits are others."""
    from hf_llava_ft.modeling.modeling_llava import LlavaForCausalLM

    processor = load_processor(str(adapter))
    ids = torch.tensor([[1, 5, 9, 30, 7]])
    with torch.no_grad():
        expected = load_model(str(adapter), processor)(input_ids=ids).logits
        direct = LlavaForCausalLM.from_pretrained(adapter)(input_ids=ids).logits
        bare = load_model(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"])
        without = bare(input_ids=ids).logits
    assert torch.allclose(expected, direct, atol=1e-5)
    assert not torch.allclose(expected, without, atol=1e-3)
    magnitudes = [name for name in load_file(adapter / FILE) if "magnitude" in name]
    if magnitudes:
        halved = tmp_path / "halved"
        shutil.copytree(adapter, halved)
        weights = load_file(halved / FILE)
        weights[magnitudes[0]] = weights[magnitudes[0]] * 0.5
        save_file(weights, halved / FILE, metadata={"format": "pt"})
        with torch.no_grad():
            other = load_model(str(halved), processor)(input_ids=ids).logits
        assert not torch.allclose(expected, other, atol=1e-4)


def broken(adapter, folder, kind):
    shutil.copytree(adapter, folder)
    weights = load_file(folder / FILE)
    name = min(name for name in weights if "lora_B" in name)
    if kind == "without LoRA":
        weights = {name: weight for name, weight in weights.items() if "lora_" not in name}
    elif kind == "missing":
        del weights[name]
    elif kind == "surplus":
        weights[name.replace("layers.0", "layers.9")] = weights[name].clone()
    elif kind == "shape":
        weights[name] = torch.zeros(3, 3)
    else:
        weights[name][0, 0] = float(kind)
    save_file(weights, folder / FILE, metadata={"format": "pt"})
    return name.removeprefix("base_model.model.")


@pytest.mark.parametrize("kind", ["without LoRA", "missing", "surplus", "shape", "nan", "inf"])
def test_weights_that_are_not_as_they_should_be_are_refused_by_name(adapter, parts, tmp_path, llava_ft, kind):
    name = broken(adapter, tmp_path / "broken", kind)
    with pytest.raises(UserError) as refused:
        load_model(str(tmp_path / "broken"))
    if kind == "surplus":
        name = name.replace("layers.0", "layers.9")
    if kind != "without LoRA":
        assert name in str(refused.value)
    with pytest.raises(UserError, match=r"broken (holds|lacks)"):
        merge_adapter(tmp_path / "broken", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    if kind == "missing":
        code, _, err = llava_ft(*flags(tmp_path / "broken", parts[1], tmp_path / "out"))
        assert code == 2
        assert name in err
