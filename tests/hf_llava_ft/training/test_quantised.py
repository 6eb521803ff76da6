"""QLoRA on the CPU: what is quantised, what trains, and what it is merged into."""

import json
from importlib.util import find_spec
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file

import hf_llava_ft
from hf_llava_ft.checkpoints.merge import merge_adapter
from hf_llava_ft.checkpoints.opening import load_model
from hf_llava_ft.errors import UserError
from hf_llava_ft.modeling.weight_names_llava import name_in_memory
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.train import main as train_main
from hf_llava_ft.training.precision.quantization import loading_in_few_bits, quantization_config
from hf_llava_ft.training.tuning import trained_parts, with_lora

KINDS = [
    {"bits": 4},
    {"bits": 4, "quant_type": "fp4"},
    {"bits": 4, "double_quant": False},
    {"bits": 8},
]


def arguments(**fields) -> TuningArguments:
    return TuningArguments(train_type="qlora", lora_r=4, lora_alpha=8, lora_dropout=0.0, **fields)


def quantised(checkpoint, dtype=torch.float32, **fields):
    config = quantization_config(arguments(**fields), compute_dtype=dtype)
    return hf_llava_ft.load_model(str(checkpoint), quantization_config=config, dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_trains_lora_and_projector(tiny, tiny_checkpoint, kind):
    model = quantised(tiny_checkpoint, **kind)
    layer = bitsandbytes.nn.Linear4bit if kind["bits"] == 4 else bitsandbytes.nn.Linear8bitLt
    names = {name for name, module in model.named_modules() if isinstance(module, layer)}
    assert len(names) == 14 and all(name.startswith("model.language_model.") for name in names)
    if kind["bits"] == 4:
        states = [model.get_submodule(name).weight.quant_state for name in names]
        assert {state.quant_type for state in states} == {kind.get("quant_type", "nf4")}
        assert {state.nested for state in states} == {kind.get("double_quant", True)}
    plain = hf_llava_ft.load_model(str(tiny_checkpoint))(**tiny.batch()).loss
    loss = model(**tiny.batch()).loss
    assert 0 < abs(loss - plain) < 0.2 * plain

    peft_model = with_lora(model, arguments(**kind), str(tiny_checkpoint)).train()
    peft_model(**tiny.batch()).loss.backward()
    trainable = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
    assert trainable and all(p.grad is not None for p in trainable.values())
    assert any("multi_modal_projector" in name and p.grad.any() for name, p in trainable.items())
    assert all("lora_" in name or "multi_modal_projector" in name for name in trainable)


def gradients_after(model, tiny, *, evaluated: bool) -> dict[str, torch.Tensor]:
    model.zero_grad()
    if evaluated:
        with torch.no_grad():
            model.eval()(**tiny.batch())
    model.train()(**tiny.batch()).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_evaluating_on_the_way_changes_no_gradient(tiny, tiny_checkpoint):
    torch.manual_seed(0)
    model = with_lora(quantised(tiny_checkpoint, bits=4), arguments(bits=4), str(tiny_checkpoint))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    expected = gradients_after(model, tiny, evaluated=False)
    found = gradients_after(model, tiny, evaluated=True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # The control: with bitsandbytes' own choice, where this processor has it.
    if bitsandbytes.nn.Linear4bit(8, 8).support_avx512bf16_for_cpu:
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = True
        wrong = gradients_after(model, tiny, evaluated=True)
        assert not all(torch.allclose(wrong[name], expected[name], rtol=0.1) for name in expected)


@pytest.mark.skipif(
    not bitsandbytes.nn.Linear4bit(8, 8).support_avx512bf16_for_cpu, reason="this processor has no AVX512-BF16"
)
def test_a_model_laid_out_for_answering_is_refused(tiny, tiny_checkpoint):
    model = quantised(tiny_checkpoint, bits=4).eval()
    with torch.no_grad():
        model(**tiny.batch())
    with pytest.raises(UserError, match="load it anew to train it"):
        with_lora(model, arguments(bits=4), str(tiny_checkpoint))


def test_what_is_not_quantised_is_float32_but_for_the_frozen_tower(tiny, tiny_checkpoint):
    model = with_lora(quantised(tiny_checkpoint, torch.bfloat16, bits=4), arguments(bits=4), str(tiny_checkpoint))
    dtypes = {part.part: part.dtype for part in trained_parts(model)}
    assert dtypes == {
        "vision_tower": "bfloat16",
        "multi_modal_projector": "float32",
        "language_model": "float32, uint8",
        "lm_head": "float32",
    }
    assert model(**tiny.batch()).loss.isfinite()


def test_packed_weights_are_counted_as_the_weights_they_are(tiny_checkpoint):
    counted = {part.part: part.num_total for part in trained_parts(quantised(tiny_checkpoint, bits=4))}
    plain = {part.part: part.num_total for part in trained_parts(load_model(str(tiny_checkpoint)))}
    assert counted == plain


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is an extra of this package")
def test_each_process_loads_onto_its_gpu_and_under_zero3_transformers_places_the_model():
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    training_args = SimpleNamespace(device=torch.device("cuda:1"), bf16=True, fp16=False, fsdp=None)
    assert loading_in_few_bits(arguments(bits=4), training_args)["device_map"] == {"": torch.device("cuda:1")}
    zero3 = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    assert loading_in_few_bits(arguments(bits=4), training_args)["device_map"] is None
    assert zero3.is_zero3()  # transformers knows of it as long as it is held
    del zero3
    assert loading_in_few_bits(arguments(bits=4), training_args)["device_map"] is not None


def test_eight_bits_are_refused_under_fsdp():
    training_args = SimpleNamespace(device=torch.device("cpu"), bf16=True, fp16=False, fsdp=True)
    assert loading_in_few_bits(arguments(bits=4), training_args)
    with pytest.raises(UserError, match="--bits 8 does not go with FSDP"):
        loading_in_few_bits(arguments(bits=8), training_args)


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_is_merged_into_the_base_as_it_was_before_it_was_quantised(tiny_checkpoint, llava_json, tmp_path, bits):
    data, images = llava_json(4)
    paths = {"model_name_or_path": tiny_checkpoint, "data_path": data, "image_folder": images}
    flags = [word for name, value in paths.items() for word in (f"--{name}", str(value))]
    flags += ["--train_type", "qlora", "--bits", str(bits), "--lora_r", "4", "--lora_alpha", "8", "--use_cpu", "True"]
    flags += ["--max_steps", "3", "--learning_rate", "1e-2", "--warmup_steps", "0", "--save_strategy", "no"]
    flags += ["--gradient_checkpointing", "True"]
    train_main([*flags, "--output_dir", str(tmp_path / "out")])
    assert merge_adapter(tmp_path / "out", tmp_path / "merged").verification.ok
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())

    def weights(folder, file="model.safetensors"):
        return {name_in_memory(name): tensor for name, tensor in load_file(folder / file).items()}

    base, merged = weights(tiny_checkpoint), weights(tmp_path / "merged")
    adapter = load_file(tmp_path / "out/adapter_model.safetensors")
    rounded = quantised(tiny_checkpoint, bits=bits)
    name = "model.language_model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{matrix}.weight"] for matrix in "AB")
    expected = base[f"{name}.weight"] + 8 / 4 * b @ a
    torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=0, atol=1e-6)
    # Far from what merging into the rounded weights would give.
    identity = torch.eye(64)
    with torch.no_grad():
        rounding = rounded.get_submodule(name)(identity).T - base[f"{name}.weight"]
    assert rounding.abs().max() > 1e-4
    projector = "model.multi_modal_projector.linear_1.weight"
    assert torch.equal(merged[projector], adapter[f"base_model.model.{projector}"])
    assert not torch.equal(merged[projector], base[projector])
