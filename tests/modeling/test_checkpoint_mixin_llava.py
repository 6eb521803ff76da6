"""Adapters and native configurations through the Auto classes."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import hf_llava_ft
from hf_llava_ft.checkpoints.opening import load_model
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.training.tuning import with_tuning


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """Native, nested, and original without the weights of its tower, as the original leaves them out; an adapter of
    each, and the logits of that adapter by PEFT."""
    root, expected = tmp_path_factory.mktemp("folders"), {}
    for name, fields in {"native": {}, "nested": {"projector_type": "linear"}, "original": {}}.items():
        model = tiny.model(**fields)
        if name == "original":
            model.model.vision_tower.save_pretrained(root / "tower")
            model.config.vision_tower_name = str(root / "tower")
        model.save_pretrained(root / name, checkpoint_format="llava" if name == "original" else None)
        if name == "original":
            file = root / name / "model.safetensors"
            kept = {key: tensor for key, tensor in load_file(file).items() if "vision_tower" not in key}
            save_file(kept, file, metadata={"format": "pt"})
        adapted = with_tuning(load_model(str(root / name)), TuningArguments(train_type="lora"), str(root / name))
        generator = torch.Generator().manual_seed(len(expected))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        adapted.save_pretrained(root / f"{name}-adapter")
        expected[name] = logits(
            PeftModel.from_pretrained(load_model(str(root / name)), root / f"{name}-adapter"), tiny
        )
    return root, expected


def logits(model, tiny) -> torch.Tensor:
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    whole.config.image_token_id = 1024  # that of the batch; an original has it behind its embedding
    batch = {key: value for key, value in tiny.batch().items() if key != "labels"}
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("name", ["native", "nested", "original"])
@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, hf_llava_ft.LlavaForCausalLM])
def test_an_adapter_stands_on_its_base(folders, tiny, tmp_path, name, auto_class):
    root, expected = folders
    model = auto_class.from_pretrained(root / f"{name}-adapter")
    assert type(model) is hf_llava_ft.LlavaForCausalLM
    assert torch.equal(logits(model, tiny), expected[name])
    assert (logits(load_model(str(root / name)), tiny) - expected[name]).abs().max() > 1e-2  # not the base alone
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists() and not list(tmp_path.glob("*.py"))
    again = load_model(str(tmp_path), base=str(root / name))
    assert torch.equal(logits(again, tiny), expected[name])


def test_a_native_folder_is_ours_where_transformers_has_no_class(folders, tiny):
    root, _ = folders
    config = AutoConfig.from_pretrained(root / "native")
    assert type(config).__module__.startswith("transformers.")
    assert type(AutoModelForCausalLM.from_config(config)) is hf_llava_ft.LlavaForCausalLM
    ours, native = (
        cls.from_pretrained(root / "native") for cls in (AutoModelForCausalLM, AutoModelForImageTextToText)
    )
    assert type(ours) is hf_llava_ft.LlavaForCausalLM
    assert type(native).__module__.startswith("transformers.")
    torch.testing.assert_close(logits(ours, tiny), logits(native, tiny), rtol=0, atol=1e-5)
