"""A tower and a language model become a LLaVA that plain transformers loads."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    SiglipVisionModel,
    set_seed,
)

import hf_llava_ft
from hf_llava_ft.checkpoints.verify import default_image
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.tokenizer_llava import load_tokenizer
from tests.hf_llava_ft.checkpoints.test_broken_folders import (
    DEEP,
    MODEL,
    Code,
    config,
    first,
    pickled,
    template,
    weights,
    written,
)

MODELS = {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM, "qwen2": Qwen2ForCausalLM}


@pytest.fixture
def parts(tiny, tmp_path, golden):
    """A function that writes the folders of a tower and a language model of 1024 words, the tokenizer's number."""

    def write(text: str, vision: str, tie: bool):
        config = tiny.config(text, vision, tie)
        config.text_config.vocab_size = 1024
        set_seed(0)
        tower_class = CLIPVisionModel if vision == "clip" else SiglipVisionModel
        tower_class(config.vision_config).save_pretrained(tmp_path / "tower")
        language = MODELS[text](config.text_config)
        language.save_pretrained(tmp_path / "language")
        load_tokenizer(golden / "tokenizer_tiny").save_pretrained(tmp_path / "language")
        return tmp_path / "tower", tmp_path / "language", language

    return write


@pytest.mark.parametrize("text", MODELS)
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_compose(parts, tmp_path, text, tie, vision):
    tower, language, source = parts(text, vision, tie)
    folder = hf_llava_ft.compose_llava(str(tower), str(language), tmp_path / "llava")
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.image_token_id == 1024 == model.config.image_token_id
    # The language model is untouched, and has a row for the image token.
    old = source.get_input_embeddings().weight
    new = model.get_input_embeddings().weight
    assert torch.equal(new[:1024], old) and len(new) == 1088
    assert (model.lm_head.weight is new) == tie
    assert 2 in model.generation_config.eos_token_id
    text_ids = torch.tensor([[1, 5, 9, 700]])
    with torch.no_grad():
        torch.testing.assert_close(model(text_ids).logits[..., :1024], source(text_ids).logits, rtol=0, atol=1e-5)
    # Text and picture make a prompt that the model takes.
    inputs = processor(text=["USER: <image>\nq ASSISTANT:"], images=[default_image()], return_tensors="pt")
    assert model(**inputs).logits.isfinite().all()


def spoilt(text):
    def change(tensors):
        tensors[first(tensors, text)].view(-1)[1] = float("nan")

    return change


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("tower", config(patch_size=0), "patch_size"),
        ("tower", config(num_hidden_layers=900), "900 layers"),
        ("tower", config(hidden_size=128), "shape"),
        ("tower", config(hidden_act="loud"), "loud"),
        ("tower", written("config.json", "[]"), "not a JSON object"),
        ("tower", weights(lambda t: t.pop(first(t, "fc1"))), "lack"),
        ("tower", weights(spoilt("fc1")), "NaN"),
        ("tower", written(MODEL, b"<html>proxy</html>"), "web page"),
        ("tower", pickled({"x": Code()}), "code"),
        ("language", config(num_hidden_layers=10**7), "num_hidden_layers"),
        ("language", config(vocab_size=8_000_000), "shape"),
        ("language", config(rms_norm_eps="small"), "rms_norm_eps"),
        ("language", written("config.json", DEEP), "nested too deeply"),
        ("language", weights(lambda t: t.pop(first(t, "down_proj"))), "lack"),
        ("language", weights(spoilt("down_proj")), "NaN"),
        ("language", written(MODEL, b""), "weights"),
        ("language", written("tokenizer_config.json", "[]"), "not a JSON object"),
        ("language", written("tokenizer.json", "{}"), ""),
        ("language", lambda folder: (folder / MODEL).unlink(), "no file"),
        ("language", template("{{ 'a' * 100000000000 }}"), "template"),
    ],
)
def test_a_part_that_is_broken_is_one_sentence(parts, tmp_path, capfd, part, change, said):
    tower, language, _ = parts("llama", "clip", False)
    change(tower if part == "tower" else language)
    with pytest.raises(UserError) as refused:
        hf_llava_ft.compose_llava(str(tower), str(language), tmp_path / "made")
    assert said in refused.value.sentence and "\n" not in refused.value.sentence
    assert str(tower if part == "tower" else language) in refused.value.sentence
    assert not (tmp_path / "made").exists() and "code of the folder" not in capfd.readouterr().out


def test_the_seed_decides_the_projector(parts, tmp_path):
    tower, language, _ = parts("llama", "clip", False)
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder = hf_llava_ft.compose_llava(str(tower), str(language), tmp_path / name, seed=seed)
        model = LlavaForConditionalGeneration.from_pretrained(folder)
        weights.append(model.model.multi_modal_projector.linear_1.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_language_model_is_no_tower(parts, tmp_path):
    _, language, _ = parts("llama", "clip", False)
    with pytest.raises(UserError, match="is a llama, not a vision tower of the CLIP or SigLIP kind"):
        hf_llava_ft.compose_llava(str(language), str(language), tmp_path / "llava")
    assert not (tmp_path / "llava").exists()


def test_what_is_no_language_model_is_refused(parts, tmp_path):
    tower, language, _ = parts("llama", "clip", False)
    folder = hf_llava_ft.compose_llava(str(tower), str(language), tmp_path / "llava")
    for wrong, reason in ((folder, "sees pictures already"), (tmp_path / "none", "is not a model that can be loaded")):
        with pytest.raises(UserError, match=f"--language .*{reason}"):
            hf_llava_ft.compose_llava(str(tower), str(wrong), tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("tower_dtype", [torch.float16, torch.float32])
def test_the_whole_has_the_dtype_of_the_language_model(parts, tmp_path, tower_dtype):
    tower, language, source = parts("llama", "clip", False)
    source.to(torch.bfloat16).save_pretrained(language)
    CLIPVisionModel.from_pretrained(tower, dtype=tower_dtype).save_pretrained(tower)
    folder = hf_llava_ft.compose_llava(str(tower), str(language), tmp_path / "llava")
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.language_model.norm.weight, source.model.norm.weight)
    inputs = AutoProcessor.from_pretrained(folder)(text=["<image>\nq"], images=[default_image()], return_tensors="pt")
    assert model(**inputs.to(torch.bfloat16)).logits.isfinite().all()


# Memory of its own over that of the imports, and mapped files, whose pages the system can take back; both at their
# peak, in units of the weights.
MEASURED = """
import json, sys, threading, time
from pathlib import Path
from hf_llava_ft.checkpoints.compose import compose_llava
from transformers import AutoModelForCausalLM, CLIPVisionModel
vision, language, output, copies = sys.argv[1:]

def memory():
    status = Path("/proc/self/status").read_text()
    return [int(status.split(f"{name}:")[1].split()[0]) * 1024 for name in ("RssAnon", "VmRSS")]

def watch():
    while not done.wait(0.01):
        peak[:] = map(max, peak, memory())

before, done = memory(), threading.Event()
peak = list(before)
watcher = threading.Thread(target=watch)
watcher.start()
compose_llava(vision, language, output)
if copies == "2":
    held = [p.detach().clone() for p in AutoModelForCausalLM.from_pretrained(language).parameters()]
    more = [p.clone() for p in held]
    time.sleep(0.1)
done.set()
watcher.join()
size = Path(language, "model.safetensors").stat().st_size
print(json.dumps([(high - low) / size for high, low in zip(peak, before)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_composing_holds_the_weights_once(parts, tmp_path, checkout):
    tower, language, _ = parts("llama", "clip", False)
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 15, "num_attention_heads": 8}
    config = LlamaConfig(**sizes, vocab_size=1024)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(language)  # 0.97 GB

    def peak(name: str, copies: int) -> list[float]:
        command = [sys.executable, "-c", MEASURED, str(tower), str(language), str(tmp_path / name), str(copies)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=checkout)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    assert max(peak("once", 1)) < 1.2
    assert max(peak("twice", 2)) > 1.8  # a second copy would be seen
