"""Folders for servers: every weight under the name that a native LLaVA has on disk, llama.cpp's parts the same as the
whole, and a sentence where a server can't serve the model."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2
from tokenizers import pre_tokenizers

import hf_llava_ft
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.checkpoints.verify import Probe, reference_outputs
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.chat_templates_llava import CHAT_TEMPLATES
from hf_llava_ft.processing.tokenizer_llava import load_tokenizer
from hf_llava_ft.serving import export_for_serving
from hf_llava_ft.serving.guide import commands, go_template
from hf_llava_ft.serving.limits import differences, refuse_what_cannot_be_served
from hf_llava_ft.serving.names import check_names, written_shapes
from hf_llava_ft.serving.parts import check_parts, pictures_seen_otherwise, write_parts
from hf_llava_ft.serving.tokenizer import save_tokenizer, sentencepiece_model, with_media_markers
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.training.tuning import with_lora
from tests.parts import parts_of

QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint, tmp_path_factory):
    """LoRA on language model and tower, and a projector, each far enough from the base to show."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    processor = load_processor(str(tiny_checkpoint))
    tuning = TuningArguments(lora_r=4, lora_alpha=8, lora_dropout=0.0, lora_vision_tower=True)
    model = with_lora(load_model(str(tiny_checkpoint), processor), tuning, str(tiny_checkpoint))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------- whole folders


def test_an_adapter_becomes_a_whole_folder_for_vllm(adapter, tmp_path):
    done = export_for_serving(str(adapter), tmp_path / "served", "vllm")
    assert done.logit_difference < 1e-4 and done.commands == ["vllm serve ."]
    merged, rounding, pictures = done.notes
    assert rounding.startswith("Of what was learned, float32 keeps all but ")
    assert merged == "The adapter is merged into tiny: the folder is whole."
    assert pictures.startswith("vLLM paints transparent pixels white")
    model = load_model(str(adapter), load_processor(str(adapter))).merge_and_unload()
    weights = load_file(tmp_path / "served/model.safetensors")
    for name, expected in (
        ("language_model.model.layers.0.self_attn.q_proj.weight", "language_model.layers.0.self_attn.q_proj"),
        ("vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight", None),
        ("multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_1"),
    ):
        module = model.model.get_submodule(expected or "vision_tower.encoder.layers.0.self_attn.q_proj")
        torch.testing.assert_close(weights[name], module.weight.data)
    config = json.loads((tmp_path / "served/config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"] and "auto_map" not in config
    # What readers with transformers 4 look for.
    assert config["text_config"]["rope_theta"] == config["text_config"]["rope_parameters"]["rope_theta"]
    old = json.loads((tmp_path / "served/preprocessor_config.json").read_text())
    assert old["do_pad"] and old["size"] == {"shortest_edge": 56}
    guide = (tmp_path / "served/SERVING.md").read_text()
    assert "vllm serve ." in guide and str(tmp_path) not in guide


@pytest.mark.slow
def test_an_adapter_kept_apart_for_vllm(adapter, tiny_checkpoint, tmp_path):
    done = export_for_serving(str(adapter), tmp_path / "served", "vllm", keep_adapter=True)
    assert done.commands == ["vllm serve base --enable-lora --max-lora-rank 16 --lora-modules tuned=adapter"]
    assert done.notes[:1] == [
        "vLLM takes LoRA of the language model only: what the adapter has in the projector and the vision tower is "
        "merged into base/."
    ]
    settings = json.loads((tmp_path / "served/adapter/adapter_config.json").read_text())
    assert settings["modules_to_save"] is None and settings["base_model_name_or_path"] == "base"
    kept = load_file(tmp_path / "served/adapter/adapter_model.safetensors")
    assert kept and all(".language_model." in name and ".lora_" in name for name in kept)
    before, base = (
        load_file(tiny_checkpoint / "model.safetensors"),
        load_file(tmp_path / "served/base/model.safetensors"),
    )
    changed = {name for name in before if not torch.equal(before[name], base[name])}
    assert changed and not [name for name in changed if name.startswith("language_model.")]


def test_the_command_says_what_it_did(tiny_checkpoint, tmp_path, monkeypatch, capfd):
    from hf_llava_ft.cli import main

    arguments = ["export", "--model", tiny_checkpoint, "--for", "llama.cpp", "--output_dir", tmp_path / "served"]
    arguments += ["--json", tmp_path / "export.json"]
    monkeypatch.setattr(sys, "argv", ["llava-ft", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        main()
    out, err = capfd.readouterr()
    assert not exit_info.value.code and "Exported and verified" in err and "issue 25814" in err
    assert "opens a picture that its EXIF data turn" in " ".join(err.split())
    assert "python llama.cpp/convert_hf_to_gguf.py language_model" in out
    result = json.loads((tmp_path / "export.json").read_text())
    assert result["for"] == "llama.cpp" and result["commands"][-1] in out


KINDS = {
    "clip": {},
    "siglip": {"vision": "siglip"},
    "tied": {"text": "qwen2", "tie": True},
    "mistral": {"text": "mistral"},
    "llava_next": {
        "image_aspect_ratio": "anyres",
        "patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": [[56, 112], [112, 56]],
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_names_are_those_of_the_native_class(tiny, tmp_path, kind):
    model = tiny.model(**KINDS[kind])
    model.save_pretrained(tmp_path, checkpoint_format="llava-hf", max_shard_size="200KB")
    assert check_names(tmp_path, model.config.to_native()) == len(written_shapes(tmp_path))


@pytest.mark.parametrize("damage", ["missing", "too many", "of another name", "of another shape"])
def test_a_weight_that_is_not_as_expected_is_named(tiny, tmp_path, damage):
    model = tiny.model()
    model.save_pretrained(tmp_path, checkpoint_format="llava-hf")
    weights = load_file(tmp_path / "model.safetensors")
    name = "multi_modal_projector.linear_1.weight"
    if damage == "missing":
        del weights[name]
    elif damage == "too many":
        name = "multi_modal_projector.linear_3.weight"
        weights[name] = torch.zeros(64, 64)
    elif damage == "of another name":
        weights["model.mm_projector.0.weight"] = weights.pop(name)
        name = "model.mm_projector.0.weight"
    else:
        weights[name] = weights[name].T.contiguous()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name} is .* in the files and .* in the model"):
        check_names(tmp_path, model.config.to_native())


# ---------------------------------------------------------------------- llama.cpp and Ollama


@pytest.mark.parametrize("kind", ["clip", "siglip", "tied", "mistral", "first layer"])
def test_the_parts_are_the_whole(tiny, golden, tmp_path, kind):
    model, processor = parts_of(tiny, golden, **KINDS.get(kind, {"vision_feature_layer": 1}))
    reference = reference_outputs(model, processor, Probe())
    write_parts(model, processor, tmp_path)
    check_parts(tmp_path, model.config, reference, 1025, tolerance=1e-5)

    language = json.loads((tmp_path / "language_model/config.json").read_text())
    architecture = {"tied": "Qwen2ForCausalLM", "mistral": "MistralForCausalLM"}.get(kind, "LlamaForCausalLM")
    assert language["architectures"] == [architecture] and language["vocab_size"] == 1025
    shapes = written_shapes(tmp_path / "language_model")
    assert shapes["model.embed_tokens.weight"] == (1025, 64)
    assert shapes.get("lm_head.weight", "tied") == ("tied" if kind == "tied" else (1025, 64))
    vision = json.loads((tmp_path / "vision/config.json").read_text())
    assert vision["vision_feature_layer"] == (1 if kind == "first layer" else -2)
    # llama.cpp's converter knows no other word for what llama.cpp computes as gelu.
    assert vision["hidden_act"] == ("gelu" if kind == "siglip" else "quick_gelu")
    projector = torch.load(tmp_path / "vision/llava.projector", weights_only=True)
    assert set(projector) == {f"model.mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}


@pytest.mark.parametrize(("opening", "turned"), [("upright", True), ("original", False)])
def test_pictures_that_llama_cpp_opens_otherwise_are_named(tiny, golden, opening, turned):
    model, processor = parts_of(tiny, golden)
    processor.picture_opening = opening
    unlike = pictures_seen_otherwise(reference_outputs(model, processor, Probe()), processor)
    assert ("a picture that its EXIF data turn" in unlike) is turned
    assert "a picture with an alpha channel" not in unlike


@pytest.mark.parametrize("part", ["projector", "tower", "language model"])
def test_a_part_that_differs_is_noticed(tiny, golden, tmp_path, part):
    model, processor = parts_of(tiny, golden)
    reference = reference_outputs(model, processor, Probe())
    write_parts(model, processor, tmp_path)
    if part == "projector":
        path = tmp_path / "vision/llava.projector"
        weights = torch.load(path, weights_only=True)
        weights["model.mm_projector.2.bias"] += 0.1
        torch.save(weights, path)
    else:
        folder, name = ("vision", "vision_model.pre_layrnorm.bias") if part == "tower" else (None, None)
        path = tmp_path / (folder or "language_model") / "model.safetensors"
        weights = load_file(path)
        weights[name or "model.norm.weight"] *= 1.1
        weights[name or "model.norm.weight"] += 0.1
        save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="the parts are not the same as the whole model"):
        check_parts(tmp_path, model.config, reference, 1025, tolerance=1e-4)


@pytest.mark.parametrize("name", ["tokenizer_tiny", "tokenizer_llama"])
def test_the_sentencepiece_model_is_the_one_it_was_made_from(golden, tmp_path, name):
    tokenizer = load_tokenizer(golden / name)
    save_tokenizer(tokenizer, "", tmp_path)
    ours, theirs = (
        sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
        for path in (tmp_path / "tokenizer.model", golden / name / "tokenizer.model")
    )
    assert [(piece.piece, piece.type) for piece in ours.pieces] == [
        (piece.piece, piece.type) for piece in theirs.pieces
    ]
    # Pieces of nothing but spaces all have one score there, lower than any; here each has its own.
    assert in_order_of_merging(ours) == in_order_of_merging(theirs)
    assert ours.normalizer_spec.add_dummy_prefix
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    # transformers 4 knows no TokenizersBackend, and takes a list of special tokens under this name only.
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in settings
    added = json.loads((tmp_path / "added_tokens.json").read_text())
    assert added == {token: index for token, index in tokenizer.get_added_vocab().items() if index >= len(ours.pieces)}


def in_order_of_merging(model) -> list[str]:
    merged = [piece for piece in model.pieces if piece.type == piece.NORMAL and piece.piece.strip("▁")]
    return [piece.piece for piece in sorted(merged, key=lambda piece: -piece.score)]


def test_a_tokenizer_that_no_sentencepiece_model_can_be_is_refused(golden, tmp_path):
    tokenizer = load_tokenizer(golden / "tokenizer_tiny")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("e", "isolated")
    with pytest.raises(UserError, match="would be cut into other tokens; serve the model with --for vllm"):
        save_tokenizer(tokenizer, "", tmp_path)


def test_a_byte_level_tokenizer_needs_no_sentencepiece_model():
    assert sentencepiece_model({"model": {"type": "BPE", "byte_fallback": False}}) is None


@pytest.mark.parametrize("version", sorted(CHAT_TEMPLATES.keys() - {"plain", "v0_plain"}))  # these are not for chats
@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_a_prompt_of_llama_server_is_that_of_training(golden, version, num_images):
    """It hands over strings with a mark for each picture; the prompt has to have the mark where training had it."""
    tokenizer = load_tokenizer(golden / "tokenizer_tiny")
    vision = SimpleNamespace(model_type="clip_vision_model", image_size=56, patch_size=14)
    processor = hf_llava_ft.LlavaProcessor.build(tokenizer, vision)
    processor.chat_template = CHAT_TEMPLATES[version].source
    text = {"type": "text", "text": QUESTION}
    turns = [("user", [{"type": "image"}] * num_images + [text]), ("assistant", [{"type": "text", "text": "A cat."}])]
    turns.append(("user", [{"type": "text", "text": "Sure?"}]))
    ours = [{"role": role, "content": content} for role, content in turns]
    expected = processor.apply_chat_template(ours, add_generation_prompt=True)

    processor.chat_template = with_media_markers(CHAT_TEMPLATES[version].source)
    mark = "<__media_h4K9__>"
    theirs = [
        {"role": role, "content": "".join(item.get("text", mark) for item in content)} for role, content in turns
    ]
    found = processor.apply_chat_template(theirs, add_generation_prompt=True)
    assert found == expected.replace("<image>", mark)


def test_the_modelfile_has_the_prompt_of_training(tiny, golden):
    _, processor = parts_of(tiny, golden)
    assert go_template(processor) == (
        "{{ if .System }}{{ .System }} {{ else }}A chat between a curious user and an artificial intelligence "
        "assistant. The assistant gives helpful, detailed, and polite answers to the user's questions. {{ end }}"
        '{{ range .Messages }}{{ if eq .Role "user" }}USER: {{ .Content }} {{ else if eq .Role "assistant" }}'
        "ASSISTANT: {{ .Content }}</s>{{ end }}{{ end }}ASSISTANT:"
    )
    # There the system message is part of the first question, which that form can't say.
    processor.chat_template = CHAT_TEMPLATES["llava_llama_2"].source
    assert go_template(processor) is None


def test_ollama_gets_a_modelfile(tiny_checkpoint, tmp_path):
    done = export_for_serving(str(tiny_checkpoint), tmp_path / "served", "ollama")
    lines = (tmp_path / "served/Modelfile").read_text().splitlines()
    assert lines[:2] == ["FROM ./language_model.gguf", "FROM ./mmproj-model-f16.gguf"]
    assert lines[-1] == 'PARAMETER stop "</s>"' and done.commands[-1] == "ollama create llava-tuned -f Modelfile"


def test_the_commands_name_colours_and_tower(tiny, golden):
    model, processor = parts_of(tiny, golden, vision="siglip")
    encoder = commands("llama.cpp", model.config, processor.image_processor)[2]
    assert "--clip-model-is-vision --clip-model-is-siglip --image-mean 0.5 0.5 0.5" in encoder
    model, processor = parts_of(tiny, golden)
    encoder = commands("llama.cpp", model.config, processor.image_processor)[2]
    assert "--clip-model-is-siglip" not in encoder and "--image-std 0.26862954 0.26130258 0.27577711" in encoder


# ---------------------------------------------------------------------- what can't be served


@pytest.mark.parametrize(
    "server, fields, sentence",
    [
        (
            "vllm",
            {"projector_type": "mlp3x_gelu"},
            "it has a projector of type mlp3x_gelu, and it knows mlp2x_gelu only",
        ),
        ("sglang", {"projector_type": "linear"}, "--for endpoints writes a folder that brings its own code"),
        ("vllm", {"vision_feature_layer": [-2, -1]}, "its projector reads several layers of the tower"),
        ("vllm", KINDS["llava_next"] | {"patch_merge_type": "flat"}, "crops that are merged as 'flat'"),
        ("sglang", KINDS["llava_next"], "image_newline SGLang's Transformers backend does not load"),
        ("llama.cpp", KINDS["llava_next"], "leaves out image_newline"),
        ("ollama", {"vision_feature_layer": [-2, -1]}, "its projector reads several layers"),
        ("llama.cpp", {"multimodal_projector_bias": False}, "its projector has no bias"),
        ("ollama", {"vision_feature_select_strategy": "full"}, "reads the tower's class token"),
    ],
)
def test_what_a_server_cannot_serve_is_refused(tiny, server, fields, sentence):
    config = tiny.config()
    config = type(config).from_dict(config.to_dict() | fields)
    with pytest.raises(UserError, match="can't serve this model") as refusal:
        refuse_what_cannot_be_served(config, server)
    assert sentence in str(refusal.value)
    refuse_what_cannot_be_served(config, "endpoints")  # brings its own code


def test_gemma_and_an_unknown_activation_are_refused_for_llama_cpp(tiny):
    config = tiny.config()
    config.vision_config.hidden_act = "relu"
    with pytest.raises(UserError, match="the activation relu"):
        refuse_what_cannot_be_served(config, "llama.cpp")
    config.text_config.model_type = "gemma2"
    with pytest.raises(UserError, match="its language model is a gemma2"):
        refuse_what_cannot_be_served(config, "ollama")


def test_nothing_is_written_of_what_is_refused(tiny, golden, tiny_checkpoint, tmp_path):
    model, processor = parts_of(tiny, golden, projector_type="linear")
    model.save_pretrained(tmp_path / "linear")
    processor.save_pretrained(tmp_path / "linear")
    with pytest.raises(UserError, match="vLLM can't serve this model"):
        export_for_serving(str(tmp_path / "linear"), tmp_path / "served", "vllm")
    with pytest.raises(UserError, match="--for tgi is unknown: use vllm, sglang, llama.cpp, ollama, endpoints"):
        export_for_serving(str(tiny_checkpoint), tmp_path / "served", "tgi")
    with pytest.raises(UserError, match="--keep_adapter is for an adapter and --for vllm"):
        export_for_serving(str(tiny_checkpoint), tmp_path / "served", "vllm", keep_adapter=True)
    assert [path.name for path in tmp_path.iterdir()] == ["linear"]


def test_what_a_server_does_otherwise_is_said(tiny, golden):
    model, processor = parts_of(tiny, golden, image_aspect_ratio="square")
    (pictures,) = differences(model.config, processor, "vllm")
    assert pictures.startswith("vLLM paints transparent pixels white")
    said = " ".join(differences(model.config, processor, "llama.cpp"))
    assert "issue 25814" in said and "this model was trained on pictures cut to one" in said
    model, processor = parts_of(tiny, golden, vision="siglip")
    said = " ".join(differences(model.config, processor, "ollama"))
    assert "25814" not in said and "(122, 116, 104), training did with (127, 127, 127)" in said
