"""Both dialects, in and out: the reference checkpoints of the original, and what this package makes of them."""

import json
import pickle
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
)

import hf_llava_ft
from hf_llava_ft.checkpoints.convert import convert
from hf_llava_ft.checkpoints.inspection import inspect_checkpoint
from hf_llava_ft.checkpoints.merge import merge_adapter
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.tokenizer_llava import load_tokenizer

ORIGINAL = "c_forward/mlp2x_patch/checkpoint"
LORA = "f_lora/llava-tiny-lora"
PROJECTOR = "g_pretrain/llava-tiny-pretrain"


@pytest.fixture(autouse=True)
def in_golden(golden, monkeypatch):
    """The reference folders name their base and tower relative to this one."""
    monkeypatch.chdir(golden)


def assert_same_weights(found: dict, expected: dict, tolerance: float = 0) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).abs().max() <= tolerance, name


# ---------------------------------------------------------------------- in


def test_a_folder_is_what_its_files_say(tmp_path):
    kinds = {ORIGINAL: "model", LORA: "original_lora", PROJECTOR: "projector"}
    for index, (path, kind) in enumerate(kinds.items()):
        # A name that says something else changes nothing.
        shutil.copytree(path, tmp_path / f"{index}" / "llava-lora-mpt")
        assert inspect_checkpoint(str(tmp_path / f"{index}" / "llava-lora-mpt")).kind == kind


def test_bin_files_open_like_safetensors(tmp_path):
    shutil.copy(f"{ORIGINAL}/config.json", tmp_path)
    shutil.copy("c_forward/mlp2x_patch/checkpoint_bin/pytorch_model.bin", tmp_path)
    assert_same_weights(load_model(str(tmp_path)).state_dict(), load_model(ORIGINAL).state_dict())


def test_shards_open_like_one_file(tmp_path):
    load_model(ORIGINAL).save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert_same_weights(load_model(str(tmp_path)).state_dict(), load_model(ORIGINAL).state_dict())


def test_an_original_lora_folder_gives_the_originals_merged_weights():
    merged = load_model(LORA).merge_and_unload()
    expected = load_model("f_lora/merged_float32")
    assert_same_weights(merged.state_dict(), expected.state_dict(), tolerance=1e-7)
    untuned = load_model(ORIGINAL).state_dict()["model.language_model.layers.0.mlp.down_proj.weight"]
    assert (merged.model.language_model.layers[0].mlp.down_proj.weight - untuned).abs().max() > 1e-5


def test_a_stage_1_folder_opens_in_its_language_model():
    model = load_model(PROJECTOR)
    stored = torch.load(f"{PROJECTOR}/mm_projector.bin", weights_only=True)
    for ours, theirs in (("linear_1", 0), ("linear_2", 2)):
        found = model.model.multi_modal_projector.get_submodule(ours).weight
        assert torch.equal(found, stored[f"model.mm_projector.{theirs}.weight"])
    assert torch.equal(model.lm_head.weight, load_file("tiny-llama/model.safetensors")["lm_head.weight"])


@pytest.mark.parametrize("with_rows", [True, False])
def test_added_image_tokens_keep_the_embeddings(tmp_path, with_rows):
    """`mm_use_im_start_end`: two rows more than the base has; the original's loader leaves all rows uninitialised."""
    folder = tmp_path / "lora"
    shutil.copytree(LORA, folder)
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 1026, "mm_use_im_start_end": True}
    (folder / "config.json").write_text(json.dumps(config))
    base = load_file("tiny-llama/model.safetensors")
    rows = torch.randn(2, 64)
    if with_rows:
        others = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            others[f"base_model.model.{name}"] = torch.cat([base[name], rows])
        torch.save(others, folder / "non_lora_trainables.bin")
    model = load_model(str(folder)).merge_and_unload()
    for weight, name in (
        (model.get_input_embeddings().weight, "model.embed_tokens.weight"),
        (model.lm_head.weight, "lm_head.weight"),
    ):
        assert weight.shape[0] == 1026
        assert torch.equal(weight[:1024], base[name])
        expected = rows if with_rows else base[name].mean(dim=0).expand(2, -1)
        torch.testing.assert_close(weight[1024:], expected)


@pytest.mark.parametrize("model_type", ["llava_mistral", "llava_qwen", "llava_qwen2"])
def test_other_language_models_of_the_original(tiny, tmp_path, model_type):
    text = "mistral" if model_type == "llava_mistral" else "qwen2"
    model = tiny.model(text, vision_tower_name="tiny-clip", image_aspect_ratio="pad")
    model.save_pretrained(tmp_path, checkpoint_format="llava")
    flat = json.loads((tmp_path / "config.json").read_text())
    assert "text_config" not in flat and flat["architectures"] == [
        "LlavaMistralForCausalLM" if text == "mistral" else "LlavaQwenForCausalLM"
    ]
    flat["model_type"] = model_type
    (tmp_path / "config.json").write_text(json.dumps(flat))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reloaded) is hf_llava_ft.LlavaForCausalLM
    assert_same_weights(reloaded.state_dict(), model.state_dict())
    batch = tiny.batch(image_token_id=reloaded.config.image_token_id)
    torch.testing.assert_close(reloaded(**batch).logits, model(**tiny.batch()).logits, rtol=0, atol=0)


def test_an_old_original_called_llava_opens_with_load_model(tmp_path):
    shutil.copytree(ORIGINAL, tmp_path / "old")
    config = json.loads((tmp_path / "old/config.json").read_text()) | {"model_type": "llava"}
    (tmp_path / "old/config.json").write_text(json.dumps(config))
    assert_same_weights(load_model(str(tmp_path / "old")).state_dict(), load_model(ORIGINAL).state_dict())


# ---------------------------------------------------------------------- round trips


def test_a_loaded_original_is_saved_as_it_came(tmp_path):
    load_model(ORIGINAL).save_pretrained(tmp_path)
    assert_same_weights(load_file(tmp_path / "model.safetensors"), load_file(f"{ORIGINAL}/model.safetensors"))
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(open(f"{ORIGINAL}/config.json").read())


@pytest.mark.parametrize("projector_type", ["linear", "mlp2x_gelu", "mlp3x_gelu"])
def test_every_projector_has_the_originals_names(tiny, tmp_path, projector_type):
    model = tiny.model(projector_type=projector_type, vision_tower_name="tiny-clip")
    model.save_pretrained(tmp_path, checkpoint_format="llava")
    names = {name for name in load_file(tmp_path / "model.safetensors") if "mm_projector" in name}
    layers = {"linear": [""], "mlp2x_gelu": ["0.", "2."], "mlp3x_gelu": ["0.", "2.", "4."]}[projector_type]
    assert names == {f"model.mm_projector.{layer}{kind}" for layer in layers for kind in ("weight", "bias")}
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_a_model_there_and_back(tmp_path):
    converted = convert(ORIGINAL, tmp_path / "hf", "llava-hf")
    assert converted.verification.ok and converted.kind == "model" and converted.verification.loader == "transformers"
    native = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")
    assert type(native) is LlavaForConditionalGeneration
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    assert processor.image_processor.do_pad and native.generation_config.eos_token_id == [2]
    assert "ASSISTANT:" in processor.chat_template

    convert(str(tmp_path / "hf"), tmp_path / "back", "llava", vision_tower="tiny-clip")
    back, first = load_file(tmp_path / "back/model.safetensors"), load_file(f"{ORIGINAL}/model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        back[name] = back[name][:1024]  # llava-hf has a row for the image, which the original's loader cuts off
    assert_same_weights(back, first)
    config = json.loads((tmp_path / "back/config.json").read_text())
    for name in ("model_type", "mm_projector_type", "mm_vision_tower", "mm_vision_select_layer", "image_aspect_ratio"):
        assert config[name] == json.loads(open(f"{ORIGINAL}/config.json").read())[name]


def test_an_adapter_there_and_back(tmp_path):
    convert(ORIGINAL, tmp_path / "base", "llava-hf")
    converted = convert(LORA, tmp_path / "peft", "llava-hf", base=str(tmp_path / "base"))
    assert converted.kind == "original_lora" and converted.verification.ok
    assert converted.verification.loader == "transformers"  # with PEFT
    native = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    alone = PeftModel.from_pretrained(native, tmp_path / "peft").merge_and_unload()
    assert not any("lora" in name for name in alone.state_dict())

    convert(str(tmp_path / "peft"), tmp_path / "back", "llava", vision_tower="tiny-clip")
    assert_same_weights(
        load_file(tmp_path / "back/adapter_model.safetensors"), load_file(f"{LORA}/adapter_model.safetensors")
    )
    stored = [
        torch.load(f"{folder}/non_lora_trainables.bin", weights_only=True) for folder in (tmp_path / "back", LORA)
    ]
    assert_same_weights(*stored)


def test_an_adapter_on_a_bare_language_model_has_no_native_form(tmp_path):
    with pytest.raises(UserError, match="trained on the bare language model tiny-llama.*merge"):
        convert(LORA, tmp_path / "peft", "llava-hf")
    assert not (tmp_path / "peft").exists()


def test_an_original_lora_folder_merges_into_a_native_model(tmp_path):
    merged = merge_adapter(LORA, tmp_path / "merged")
    assert merged.verification.ok
    native = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert type(native) is LlavaForConditionalGeneration


def test_a_projector_there_and_back(tmp_path):
    converted = convert(PROJECTOR, tmp_path / "hf", "llava-hf")
    assert converted.kind == "projector" and converted.verification.ok
    convert(PROJECTOR, tmp_path / "back", "llava")
    file = "mm_projector.bin"
    assert_same_weights(*(torch.load(f"{path}/{file}", weights_only=True) for path in (tmp_path / "back", PROJECTOR)))


# ---------------------------------------------------------------------- wrong files


def broken(tmp_path):
    folder = tmp_path / "broken"
    load_model(ORIGINAL).save_pretrained(folder, max_shard_size="400KB")
    return folder


def test_a_truncated_file(tmp_path):
    folder = broken(tmp_path)
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{shard.name} is no readable file of weights"):
        load_model(str(folder))


def test_a_missing_shard(tmp_path):
    folder = broken(tmp_path)
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        load_model(str(folder))


def test_a_wrong_shape(tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(ORIGINAL, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(63)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"norm.weight has the shape \[63\] .* \[64\]"):
        load_model(str(folder))


class Bomb:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("source", [LORA, PROJECTOR, ORIGINAL])
def test_a_pickle_with_code_is_not_run(tmp_path, source):
    folder = tmp_path / "evil"
    shutil.copytree(source, folder)
    name = {LORA: "non_lora_trainables.bin", PROJECTOR: "mm_projector.bin", ORIGINAL: "pytorch_model.bin"}[source]
    (folder / "model.safetensors").unlink(missing_ok=True)
    with open(folder / name, "wb") as file:
        pickle.dump({"x": Bomb(tmp_path / "written")}, file)
    with pytest.raises(UserError):
        load_model(str(folder))
    assert not (tmp_path / "written").exists()


def test_mpt_is_refused_in_words(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_mpt", "mm_vision_tower": "tiny-clip"}))
    with pytest.raises(UserError, match="'llava_mpt'.*MPT has no LLaVA-1.5"):
        load_model(str(tmp_path))


def test_a_tower_that_is_not_there_is_named(tmp_path):
    shutil.copytree(ORIGINAL, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text()) | {"mm_vision_tower": "no-such-tower"}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="vision tower 'no-such-tower'.*not found"):
        load_processor(str(tmp_path / "m"))


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("rope", "written"),
    [
        ({"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4}, {"type": "linear", "factor": 4.0}),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, {"type": "dynamic", "factor": 2.0}),
        ({"rope_type": "default", "rope_theta": 1e6}, None),
        (YARN, {name: value for name, value in YARN.items() if name != "rope_theta"} | {"type": "yarn"}),
        (LLAMA3, {name: value for name, value in LLAMA3.items() if name != "rope_theta"} | {"type": "llama3"}),
    ],
    ids=["linear", "dynamic", "default", "yarn", "llama3"],
)
def test_a_scaled_rotary_embedding_is_written_in_the_words_of_the_original(tiny, golden, tmp_path, rope, written):
    model = tiny.model(rope=rope)
    model.save_pretrained(tmp_path / "native")
    hf_llava_ft.LlavaProcessor.build(
        load_tokenizer(golden / "tokenizer_tiny"), model.config.vision_config, version="v1", image_aspect_ratio="pad"
    ).save_pretrained(tmp_path / "native")
    model.model.vision_tower.save_pretrained(tmp_path / "tower")
    tower = str(tmp_path / "tower")
    converted = convert(str(tmp_path / "native"), tmp_path / "original", "llava", vision_tower=tower)
    assert converted.verification.logit_difference < 1e-5
    settings = json.loads((tmp_path / "original/config.json").read_text())
    assert settings["rope_scaling"] == written and settings["rope_theta"] == rope["rope_theta"]
    assert "rope_parameters" not in settings
    read = load_model(str(tmp_path / "original")).config.text_config.rope_parameters
    assert {name: read[name] for name in rope} == rope
