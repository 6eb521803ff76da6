"""Something else than a LLaVA where a model is asked for: one sentence, at every command."""

import json

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from hf_llava_ft.processing.tokenizer_llava import load_tokenizer

COMMANDS = {
    "check": ["check", "{data}", "--model", "{model}"],
    "train": ["train", "--model_name_or_path", "{model}", "--data_path", "{data}", "--output_dir", "{out}"],
    "estimate": ["estimate", "--model_name_or_path", "{model}", "--data_path", "{data}", "--output_dir", "{out}"],
    "generate": ["generate", "--model", "{model}", "--prompt", "q"],
    "chat": ["chat", "--model", "{model}"],
    "convert": ["convert", "--model", "{model}", "--format", "llava-hf", "--output_dir", "{out}"],
    "export": ["export", "--model", "{model}", "--for", "vllm", "--output_dir", "{out}"],
    "verify": ["verify", "--model", "{model}"],
    "merge": ["merge", "--adapter", "{model}", "--output_dir", "{out}"],
}


@pytest.fixture(scope="module")
def models(tiny, golden, tmp_path_factory):
    """Folders by what they hold; the weights are nobody's business."""
    root = tmp_path_factory.mktemp("models")
    text = tiny.config().text_config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    configs = {
        "language model": text,
        "tower": tiny.config().vision_config.to_dict() | {"architectures": ["CLIPVisionModel"]},
        "other": {"model_type": "llava_onevision", "architectures": ["LlavaOnevisionForConditionalGeneration"]},
    }
    for name, config in configs.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config, default=str))
        load_tokenizer(golden / "tokenizer_tiny").save_pretrained(root / name)
    language_model = LlamaForCausalLM(tiny.config().text_config)
    language_model.name_or_path = str(root / "language model")
    settings = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(language_model, settings).save_pretrained(root / "adapter")
    return root


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "kind, told",
    [
        ("language model", "it is a language model (llama), which sees no pictures"),
        ("tower", "it is a model of type 'clip_vision_model'"),
        ("other", "it is a model of type 'llava_onevision'"),
        ("adapter", "the base of"),
    ],
)
def test_what_is_no_llava_is_said_in_a_sentence(llava_ft, llava_json, models, tmp_path, command, kind, told):
    data, _ = llava_json(2)
    names = {"model": models / kind, "data": data, "out": tmp_path / "out"}
    code, _, err = llava_ft(*(word.format(**names) for word in COMMANDS[command]))
    assert code == 2 and err.count("error: ") == 1, err
    if command == "merge" and kind != "adapter":
        told = "is a whole model, not an adapter"
    if command == "train" and kind == "language model":
        told = "add --vision_tower"
    assert told in err, err
    assert command == "merge" or command == "train" or "is not a LLaVA" in err
