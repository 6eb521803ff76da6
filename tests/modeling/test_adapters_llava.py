"""Adapters on the model itself, with whatever transformers and PEFT are installed."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import hf_llava_ft

TARGETS = r"model\.language_model\..*\.(q_proj|v_proj)"


@pytest.fixture
def model(tiny):
    return tiny.model()


def config(**fields) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, modules_to_save=["multi_modal_projector"], **fields)


def shaken(model, seed: int = 0, adapter: str = "default"):
    """`model` with every weight of an adapter moved, so that whatever is left out shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in f"{name}.":
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def logits(model, tiny) -> torch.Tensor:
    batch = {key: value for key, value in tiny.batch().items() if key != "labels"}
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": False}])
def test_an_adapter_of_peft_computes_what_it_computes_in_peft(tiny, model, tmp_path, fields):
    base = logits(model, tiny)
    model.save_pretrained(tmp_path / "base")
    peft_model = shaken(get_peft_model(model, config(**fields)))
    peft_model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    peft_model.save_pretrained(tmp_path / "adapter")
    expected = logits(peft_model, tiny)
    opened = hf_llava_ft.LlavaForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(opened, tiny), expected, rtol=0, atol=1e-6)
    assert (expected - base).abs().max() > 1e-2


def test_what_is_disabled_comes_back_whole(tiny, model):
    base = logits(model, tiny)
    model.add_adapter(config())
    tuned = logits(shaken(model), tiny)
    model.disable_adapters()
    torch.testing.assert_close(logits(model, tiny), base, rtol=0, atol=1e-6)
    model.enable_adapters()
    assert torch.equal(logits(model, tiny), tuned)
    # Without the projector it is another model: the comparison would see it left out.
    model.model.multi_modal_projector.enable_adapters(False)
    assert (logits(model, tiny) - tuned).abs().max() > 1e-3


def test_one_of_two_adapters_is_active_saved_and_deleted(tiny, model, tmp_path):
    model.save_pretrained(tmp_path / "base")
    base = logits(model, tiny)
    expected = {}
    for seed, name in enumerate(("first", "second")):
        model.add_adapter(config(), name)
        assert model.active_adapters() == [name]
        expected[name] = logits(shaken(model, seed, name), tiny)
    model.set_adapter("first")
    assert model.active_adapters() == ["first"]
    assert torch.equal(logits(model, tiny), expected["first"])
    model.save_pretrained(tmp_path / "first")
    on_base = hf_llava_ft.LlavaForCausalLM.from_pretrained(tmp_path / "base")
    by_peft = PeftModel.from_pretrained(on_base, tmp_path / "first")
    torch.testing.assert_close(logits(by_peft, tiny), expected["first"], rtol=0, atol=1e-6)
    model.delete_adapter("first")
    model.set_adapter("second")
    assert torch.equal(logits(model, tiny), expected["second"])
    model.delete_adapter("second")
    torch.testing.assert_close(logits(model, tiny), base, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="the model has no adapter"):
        model.active_adapters()


def test_several_active_adapters_are_not_saved_as_one(model, tmp_path):
    for name in ("first", "second"):
        model.add_adapter(LoraConfig(r=2, target_modules=TARGETS), name)
    model.set_adapter(["first", "second"])
    with pytest.raises(ValueError, match="2 adapters are active: choose one"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no adapter 'third'; it has 'first', 'second'"):
        model.set_adapter("third")


def without(weights: dict, part: str) -> dict:
    return {key: weight for key, weight in weights.items() if part not in key}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda weights: without(weights, "lora_B"), r"lacks 4 of the 12 weights .*lora_B.weight among them"),
        (lambda weights: without(weights, "multi_modal_projector"), r"lacks 4 of the 12 .*multi_modal_projector"),
        (lambda weights: {}, "lacks 12 of the 12 weights"),
        (
            lambda weights: weights | {"base_model.model.model.stranger.weight": torch.ones(2)},
            "no place for, model.stranger.weight among them",
        ),
        (
            lambda weights: {key: weight[:2] if "lora_A" in key else weight for key, weight in weights.items()},
            r"lora_A.weight of shape \[2, 64\], and on this base it has \[4, 64\]",
        ),
    ],
)
def test_an_adapter_without_all_its_weights_is_refused(model, tmp_path, change, sentence):
    model.save_pretrained(tmp_path / "base")
    peft_model = shaken(get_peft_model(model, config()))
    peft_model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    peft_model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=sentence):
        hf_llava_ft.LlavaForCausalLM.from_pretrained(tmp_path / "adapter")
