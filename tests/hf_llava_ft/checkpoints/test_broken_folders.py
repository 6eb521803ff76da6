"""A folder in which one thing is wrong is refused in one sentence, within seconds and before memory is taken."""

import json
import shutil
import time

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from hf_llava_ft.checkpoints.checked import template_probe
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.errors import UserError
from tests import warm_python

MODEL, ADAPTER = "model.safetensors", "adapter_model.safetensors"
DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json")


def changed(name, **values):
    """Changes a JSON file; `text_config__x` is the x within."""

    def change(folder):
        settings = json.loads((folder / name).read_text())
        for path, value in values.items():
            *sections, last = path.split("__")
            inner = settings
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[last] = value
        (folder / name).write_text(json.dumps(settings))

    return change


def config(**values):
    return changed("config.json", **values)


def written(name, content):
    def write(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def weights(change, file=MODEL):
    def write(folder):
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return write


def renamed_part(tensors):
    for name in list(tensors):
        tensors[name.replace("layers.0", "layers.5")] = tensors.pop(name)


def first(tensors, text):
    return min(name for name in tensors if text in name)


def reshaped(tensors):
    tensors[first(tensors, "q_proj.weight")] = torch.zeros(7, 5)


def not_a_number(value):
    def change(tensors):
        tensors[first(tensors, "down_proj.weight")][1, 2] = value

    return change


def pickled(content):
    def write(folder):
        (folder / MODEL).unlink()
        torch.save(content, folder / "pytorch_model.bin")

    return write


class Code:
    def __reduce__(self):
        return print, ("code of the folder was run",)


def sharded(place):
    def write(folder):
        names = load_file(folder / MODEL)
        shutil.move(folder / MODEL, folder.parent / "outside.safetensors")
        where = place.format(parent=folder.parent)
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, where)}
        (folder / f"{MODEL}.index.json").write_text(json.dumps(index))

    return write


def template(text):
    def write(folder):
        (folder / "chat_template.jinja").write_text(text)

    return write


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}" * 1 + (
    "{% endfor %}{% endfor %}"
)
LOUD = "{% for a in range(99999) %}{% for b in range(99999) %}many words {% endfor %}{% endfor %}"
DOUBLED = "{% set n = namespace(x='word') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"

BROKEN = {
    # Numbers of config.json
    "10^7 layers": (config(text_config__num_hidden_layers=10**7), "num_hidden_layers"),
    "900 layers": (config(text_config__num_hidden_layers=900), "900 layers"),
    "3 layers": (config(text_config__num_hidden_layers=3), "3 layers"),
    "900 layers of the tower": (config(vision_config__num_hidden_layers=900), "900 layers"),
    "a wide model": (config(text_config__hidden_size=2**16), "shape"),
    "a wide MLP": (config(text_config__intermediate_size=2**20), "shape"),
    "a wide tower": (config(vision_config__hidden_size=2**16), "shape"),
    "10^12 words": (config(text_config__vocab_size=10**12), "vocab_size"),
    "8 million words": (config(text_config__vocab_size=8_000_000), "shape"),
    "a large picture": (config(vision_config__image_size=14_000), "shape"),
    "a huge picture": (config(vision_config__image_size=10**9), "image_size"),
    "no heads": (config(text_config__num_attention_heads=0), "num_attention_heads"),
    "3 heads": (config(text_config__num_attention_heads=3, text_config__head_dim=None), "num_attention_heads"),
    "3 heads of the tower": (config(vision_config__num_attention_heads=3), "num_attention_heads"),
    "3 groups": (config(text_config__num_key_value_heads=3), "num_key_value_heads"),
    "no patch": (config(vision_config__patch_size=0), "patch_size"),
    "a large patch": (config(vision_config__patch_size=57), "patch_size"),
    "-1 layers": (config(text_config__num_hidden_layers=-1), "num_hidden_layers"),
    "hidden_size a text": (config(text_config__hidden_size="64"), "hidden_size"),
    "hidden_size null": (config(text_config__hidden_size=None), "hidden_size"),
    "hidden_size a fraction": (config(text_config__hidden_size=64.5), "hidden_size"),
    "hidden_size true": (config(text_config__hidden_size=True), "hidden_size"),
    "image_size a text": (config(vision_config__image_size="56"), "image_size"),
    "text_config a text": (config(text_config="llama"), "text_config"),
    "text_config null": (config(text_config=None), "text_config"),
    "vision_config a list": (config(vision_config=[]), "vision_config"),
    "rms_norm_eps a text": (config(text_config__rms_norm_eps="small"), "rms_norm_eps"),
    "rope a text": (config(text_config__rope_parameters="yes"), "rope_parameters"),
    "rope without a kind": (config(text_config__rope_parameters={"rope_type": "none"}), ""),
    "layer -99": (config(vision_feature_layer=-99), "vision_feature_layer"),
    "layer a text": (config(vision_feature_layer="last"), "vision_feature_layer"),
    "layer a list with a text": (config(vision_feature_layer=[-2, "x"]), "vision_feature_layer"),
    "strategy": (config(vision_feature_select_strategy="all"), "vision_feature_select_strategy"),
    "dtype unknown": (config(dtype="float99"), "dtype"),
    "dtype a number": (config(dtype=16), "dtype"),
    "dtype of the text": (config(text_config__dtype="load"), "dtype"),
    "BERT": (config(text_config__model_type="bert"), ""),
    "GPT-2": (config(text_config__model_type="gpt2"), ""),
    "ViT": (config(vision_config__model_type="vit"), ""),
    "text_config of no kind": (config(text_config__model_type="nothing"), ""),
    "model_type a number": (config(model_type=7), ""),
    "model_type null": (config(model_type=None), ""),
    "activation unknown": (config(text_config__hidden_act="loud"), ""),
    "projector's activation unknown": (config(projector_hidden_act="loud"), ""),
    "quantised by nothing": (config(quantization_config={"quant_method": "none such"}), None),
    "quantization_config a list": (config(quantization_config=[1]), ""),
    # JSON of another kind
    **{f"{name} {kind}": (written(name, text), said) for name in FILES for kind, text, said in (
        ("nested deeply", DEEP, "nested too deeply"),
        ("a list", "[1, 2]", "not a JSON object"),
        ("cut off", '{"model_type": ', "cannot be read"),
        ("empty", "", "cannot be read"),
        ("a web page", "<!DOCTYPE html><html>Sign in</html>", "web page"),
        ("not UTF-8", b"\xff\xfe{}", "cannot be read"),
    )},
    "chat_template.json a list": (written("chat_template.json", "[]"), "not a JSON object"),
    "image_processor a list": (changed("processor_config.json", image_processor=[]), "image_processor"),
    "size a text": (changed("processor_config.json", image_processor__size="large"), "size"),
    "a huge size": (changed("processor_config.json", image_processor__size={"shortest_edge": 10**7}), "size"),
    "mean a text": (changed("processor_config.json", image_processor__image_mean="grey"), "image_mean"),
    "no kind of processor": (changed("processor_config.json", processor_class="None"), None),
    "patch_size of the processor": (changed("processor_config.json", patch_size=0), "patch_size"),
    "a token beyond all": (
        changed("tokenizer_config.json", added_tokens_decoder={"x": {"content": "<a>"}}), ""),
    # Chat templates
    "template empty": (template(""), "chat template"),
    "template without pictures": (template("{{ messages[0]['role'] }}"), "pictures"),
    "template refused": (template("{{ messages.__class__.__mro__ }}{{ ''.__class__.__subclasses__() }}"), "template"),
    "template with an error": (template("{% for x in %}"), "template"),
    "template that raises": (template("{{ raise_exception('no') }}"), "template"),
    "template that divides": (template("{{ 1 // 0 }}"), "template"),
    "template without end": (template(ENDLESS), "does not end"),
    "template that talks": (template(LOUD), "does not end"),
    "template that doubles": (template(DOUBLED), "does not end"),
    "template of 10^11 letters": (template("{{ 'a' * 100000000000 }}"), "template"),
    "no template": (lambda f: (f / "chat_template.jinja").unlink(), "no chat template"),
    # Weights
    "a tensor of another shape": (weights(reshaped), "[7, 5]"),
    "a missing tensor": (weights(lambda t: t.pop(first(t, "down_proj"))), "no weights for 1"),
    "other layers": (weights(renamed_part), "layers"),
    "NaN": (weights(not_a_number(float("nan"))), "NaN"),
    "infinite": (weights(not_a_number(float("inf"))), "infinite"),
    "cut off": (lambda f: (f / MODEL).write_bytes((f / MODEL).read_bytes()[:5000]), "weights"),
    "no weights": (lambda f: (f / MODEL).unlink(), "no file"),
    "empty weights": (written(MODEL, b""), "weights"),
    "web page for weights": (written(MODEL, b"<html>proxy</html>"), "web page"),
    "pointer for weights": (written(MODEL, b"version https://git-lfs.github.com/spec/v1\noid sha256:1"), "Git LFS"),
    "code in a pickle": (pickled({"x": Code()}), "code"),
    "a pickle of no tensors": (pickled([1, 2]), "tensors"),
    "shards above": (sharded("../outside.safetensors"), "no file in this folder"),
    "shards elsewhere": (sharded("{parent}/outside.safetensors"), "no file in this folder"),
    "shards missing": (sharded("model-1.safetensors"), "not there"),
    "index without a map": (
        lambda f: ((f / MODEL).unlink(), written(f"{MODEL}.index.json", '{"weight_map": 3}')(f)), "weight_map"),
}  # fmt: skip
BROKEN_ADAPTERS = {
    "base a number": (changed("adapter_config.json", base_model_name_or_path=7), "base_model_name_or_path"),
    "base a folder that is not there": (
        changed("adapter_config.json", base_model_name_or_path="/no/such"),
        "/no/such",
    ),
    "alpha a text": (changed("adapter_config.json", lora_alpha="much"), "lora_alpha"),
    "rank a text": (changed("adapter_config.json", r="8"), "r in"),
    "rank 10^9": (changed("adapter_config.json", r=10**9), "r in"),
    "another rank": (changed("adapter_config.json", r=16), "shape"),
    "no targets": (changed("adapter_config.json", target_modules=["nothing"]), ""),
    "targets a number": (changed("adapter_config.json", target_modules=5), ""),
    "kind unknown": (changed("adapter_config.json", peft_type="NONE"), ""),
    "nested deeply": (written("adapter_config.json", DEEP), "nested too deeply"),
    "a list": (written("adapter_config.json", "[]"), "not a JSON object"),
    "no weights": (lambda f: (f / ADAPTER).unlink(), "copy it there"),
    "damaged": (written(ADAPTER, b"\x00" * 40), ""),
    "code": (lambda f: ((f / ADAPTER).unlink(), torch.save({"x": Code()}, f / "adapter_model.bin")), "code"),
    "garbage": (lambda f: ((f / ADAPTER).unlink(), (f / "adapter_model.bin").write_bytes(b"x" * 99)), ""),
}


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Templates without end are given up sooner."""
    monkeypatch.setattr(template_probe, "MAX_SECONDS", 1)
    monkeypatch.setattr(template_probe, "MAX_BYTES", 2**29)


def sentence_about(folder) -> str:
    start = time.monotonic()
    with pytest.raises(UserError) as refused:
        load_model(str(folder), load_processor(str(folder)))
    assert time.monotonic() - start < 25
    sentence = refused.value.sentence
    assert "\n" not in sentence
    assert len(sentence) < 600
    assert str(folder) in sentence
    assert "weights_only" not in sentence
    return sentence


@pytest.fixture(scope="module")
def adapter(tiny, tiny_checkpoint, tmp_path_factory):
    from hf_llava_ft.modeling.modeling_llava import LlavaForCausalLM

    folder = tmp_path_factory.mktemp("adapter") / "good"
    model = LlavaForCausalLM.from_pretrained(tiny_checkpoint)
    model.add_adapter(LoraConfig(r=4, target_modules=r".*language_model.*q_proj", task_type="CAUSAL_LM"))
    model.save_pretrained(folder)
    return folder


def test_the_good_folders_load(tiny_checkpoint, adapter):
    for folder in (tiny_checkpoint, adapter):
        assert load_model(str(folder), load_processor(str(folder))) is not None


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_sentence(tiny_checkpoint, tmp_path, name, capfd):
    change, said = BROKEN[name]
    shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    change(tmp_path / "broken")
    if said is None:  # nothing reads it
        load_model(str(tmp_path / "broken"), load_processor(str(tmp_path / "broken")))
        return
    assert said in sentence_about(tmp_path / "broken")
    assert "code of the folder" not in capfd.readouterr().out


@pytest.mark.parametrize("name", BROKEN_ADAPTERS)
def test_a_broken_adapter_is_one_sentence(adapter, tmp_path, name, capfd):
    change, said = BROKEN_ADAPTERS[name]
    shutil.copytree(adapter, tmp_path / "broken")
    change(tmp_path / "broken")
    with pytest.raises(UserError) as refused:
        load_model(str(tmp_path / "broken"), load_processor(str(tmp_path / "broken")))
    assert said in refused.value.sentence
    assert "\n" not in refused.value.sentence
    assert "code of the folder" not in capfd.readouterr().out


def without(name):
    def change(folder):
        settings = json.loads((folder / "adapter_config.json").read_text())
        del settings[name]
        (folder / "adapter_config.json").write_text(json.dumps(settings))

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("target_modules"), "target_modules"),
        (without("r"), "does not say r"),
        (changed("adapter_config.json", target_modules=5), ""),
        (changed("adapter_config.json", r=3), ""),
        (changed("adapter_config.json", bias="some"), "some"),
        (weights(lambda tensors: tensors[first(tensors, "lora_B")].fill_(float("nan")), ADAPTER), "NaN"),
        (weights(lambda tensors: tensors.pop(first(tensors, "lora_A")), ADAPTER), "in one of them only"),
        (written(ADAPTER, b"<html>proxy</html>"), ""),
        (written("non_lora_trainables.bin", b"PK"), ""),
    ],
)
def test_a_broken_lora_folder_of_the_original_is_one_sentence(golden, tmp_path, monkeypatch, change, said):
    monkeypatch.chdir(golden)  # its base and its tower are named from there
    shutil.copytree("f_lora/llava-tiny-lora", tmp_path / "broken")
    binary = tmp_path / "broken/adapter_model.bin"
    if binary.exists():
        save_file(torch.load(binary, weights_only=True), tmp_path / "broken" / ADAPTER)
        binary.unlink()
    change(tmp_path / "broken")
    with pytest.raises(UserError) as refused:
        load_model(str(tmp_path / "broken"))
    assert said in refused.value.sentence and "\n" not in refused.value.sentence


@pytest.mark.parametrize(
    "name", ["text_config null", "rope without a kind", "activation unknown", "config.json nested deeply"]
)
def test_what_loads_no_weights_says_it_too(llava_ft, tiny_checkpoint, llava_json, tmp_path, name):
    """`estimate` makes the model without them, and `push --no_verify` reads the settings alone."""
    shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    BROKEN[name][0](tmp_path / "broken")
    (data, images), model = llava_json(1), tmp_path / "broken"
    words = ["estimate", "--model_name_or_path", model, "--data_path", data, "--image_folder", images]
    code, _, err = llava_ft(*words, "--output_dir", tmp_path / "out")
    assert code == 2 and err.count("error: ") == 1
    code, _, err = llava_ft("push", model, "--repo_id", "user/name", "--dry_run", "--no_verify")
    assert code == (0 if name in ("rope without a kind", "activation unknown") else 2)


@pytest.mark.parametrize("name", ["10^7 layers", "NaN", "template that talks"])
def test_the_command_line_says_it_and_exits_with_2(tiny_checkpoint, tmp_path, name):
    shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    BROKEN[name][0](tmp_path / "broken")
    words = ("generate", "--model", tmp_path / "broken", "--prompt", "What?", "--max_new_tokens", "2")
    command = ["-m", "hf_llava_ft.cli", *map(str, words)]
    done = warm_python.run(command)
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert BROKEN[name][1] in line
    assert "Traceback" not in done.stderr
    if name == "NaN":
        taken = warm_python.run([*command, "--allow_nan"])
        assert taken.returncode == 0


@pytest.mark.parametrize("command", ["merge --adapter", "export --for vllm --model", "estimate --model_name_or_path"])
def test_a_base_that_is_no_text_is_refused_by_every_command(llava_ft, adapter, tmp_path, command):
    shutil.copytree(adapter, tmp_path / "broken")
    BROKEN_ADAPTERS["base a number"][0](tmp_path / "broken")
    words = [*command.split(), tmp_path / "broken", "--output_dir", tmp_path / "out"]
    code, _, err = llava_ft(*words, *(["--data_path", "d.json"] if "estimate" in command else []))
    assert code == 2 and "base_model_name_or_path" in err


def test_a_base_that_is_broken_is_not_merged_into(llava_ft, tiny_checkpoint, adapter, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "base")
    BROKEN["text_config a text"][0](tmp_path / "base")
    shutil.copytree(adapter, tmp_path / "adapter")
    changed("adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))(tmp_path / "adapter")
    code, _, err = llava_ft("merge", "--adapter", tmp_path / "adapter", "--output_dir", tmp_path / "merged")
    assert code == 2 and err.count("error: ") == 1 and "text_config" in err


@pytest.mark.parametrize("name", ["targets a number", "another rank", "rank a text", "damaged"])
def test_a_broken_adapter_is_not_trained_further(llava_ft, adapter, llava_json, tmp_path, name):
    shutil.copytree(adapter, tmp_path / "broken")
    BROKEN_ADAPTERS[name][0](tmp_path / "broken")
    data, images = llava_json(1)
    words = ["train", "--model_name_or_path", tmp_path / "broken", "--data_path", data, "--image_folder", images]
    code, _, err = llava_ft(*words, "--output_dir", tmp_path / "out", "--use_cpu", "True", "--max_steps", "1")
    assert code == 2 and err.count("error: ") == 1 and str(tmp_path / "broken") in " ".join(err.split())
