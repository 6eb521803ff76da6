"""What transformers changes in silence when it loads a folder is said, or refused."""

import json
import logging
import os

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hf_llava_ft.checkpoints.convert import convert
from hf_llava_ft.checkpoints.merge import merge_adapter
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.errors import UserError
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.training.precision.quantization import quantization_config
from hf_llava_ft.training.tuning import with_lora
from tests.parts import parts_of

LORA = TuningArguments(lora_r=4, lora_alpha=8, lora_dropout=0.0)


def copied(checkpoint, folder, **options):
    """A folder with the model at `checkpoint`, loaded with `options`, and its processor."""
    load_model(str(checkpoint), **options).save_pretrained(folder)
    load_processor(str(checkpoint)).save_pretrained(folder)
    return folder


def adapter_of(base, folder):
    model = with_lora(load_model(str(base)), LORA, str(base))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    load_processor(str(base)).save_pretrained(folder)
    return folder


def float_dtypes(folder) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}


@pytest.mark.parametrize("content", ["not json", "[1, 2]", '{"eos_token_id": [2', '""'])
def test_generation_settings_that_cannot_be_read_are_an_error(tiny_checkpoint, tmp_path, content):
    folder = copied(tiny_checkpoint, tmp_path / "model")
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"generation_config\.json"):
        load_model(str(folder))
    (folder / "generation_config.json").unlink()
    load_model(str(folder))


def test_a_folder_in_two_dtypes_is_written_in_one_and_it_is_said(tiny_checkpoint, tmp_path, caplog):
    folder = copied(tiny_checkpoint, tmp_path / "model", dtype=torch.bfloat16)
    caplog.set_level(logging.WARNING, "hf_llava_ft")
    load_model(str(folder))
    assert not caplog.messages
    weights = load_file(folder / "model.safetensors")
    whole = {name: tensor.float() + 1e-4 for name, tensor in weights.items() if "projector" in name}
    save_file(weights | whole, folder / "model.safetensors", metadata={"format": "pt"})
    assert float_dtypes(folder) == {torch.bfloat16, torch.float32}

    converted = convert(str(folder), tmp_path / "converted", "llava-hf").output_dir
    assert float_dtypes(converted) == {torch.bfloat16}
    [said] = caplog.messages
    assert f"4 of its {len(weights)} weights are read in bfloat16" in said and "--dtype float32 keeps them" in said

    caplog.clear()
    converted = convert(str(folder), tmp_path / "whole", "llava-hf", dtype="float32").output_dir
    written = load_file(converted / "model.safetensors")
    assert not caplog.messages and all(torch.equal(written[name], tensor) for name, tensor in whole.items())


def test_an_adapter_with_a_float32_projector_is_merged_into_one_dtype(tiny_checkpoint, tmp_path):
    base = copied(tiny_checkpoint, tmp_path / "base", dtype=torch.bfloat16)
    merged = merge_adapter(adapter_of(base, tmp_path / "adapter"), tmp_path / "merged").output_dir
    assert float_dtypes(merged) == {torch.bfloat16}
    assert json.loads((merged / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_adapter_names_its_base_by_a_path_that_holds_in_every_folder(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_checkpoint.parent)
    base = os.path.relpath(tiny_checkpoint)
    adapter = adapter_of(base, tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == os.path.abspath(tiny_checkpoint)
    monkeypatch.chdir(tmp_path)
    load_model(str(adapter))


def test_a_base_in_few_bits(tiny_checkpoint, tmp_path):
    """It is saved as it is, also when it was loaded from such a folder; and nothing is merged into it."""
    few_bits = quantization_config(TuningArguments(train_type="qlora", bits=4), compute_dtype=torch.float32)
    first = copied(tiny_checkpoint, tmp_path / "first", quantization_config=few_bits, dtype=torch.float32)
    second = copied(first, tmp_path / "second")
    written, again = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert written.keys() == again.keys() and torch.uint8 in {tensor.dtype for tensor in again.values()}
    assert all(torch.equal(written[name], again[name]) for name in written)

    adapter = adapter_of(second, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"second, the base of .*adapter, is quantised.*--base UNQUANTISED"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert merge_adapter(adapter, tmp_path / "merged", base=str(tiny_checkpoint)).verification.ok


def test_a_merge_that_unties_embeddings_says_so_at_both_levels(tiny, golden, tmp_path):
    for part in parts_of(tiny, golden, tie=True):
        part.save_pretrained(tmp_path / "base")
    base = load_model(str(tmp_path / "base"), load_processor(str(tmp_path / "base")))
    lora = LoraConfig(target_modules=r".*language_model.*\.q_proj", modules_to_save=["embed_tokens"])
    model = get_peft_model(base, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    load_processor(str(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    merged = merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=str(tmp_path / "base"))
    assert merged.verification.loader == "transformers" and merged.verification.logit_difference < 1e-5
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    weights = load_file(tmp_path / "merged/model.safetensors")
    head, embeddings = weights["language_model.lm_head.weight"], weights["language_model.model.embed_tokens.weight"]
    assert not torch.equal(head, embeddings)
