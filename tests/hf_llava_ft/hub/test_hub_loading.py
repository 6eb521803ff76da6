"""Everything by its id on the Hub, pushed as transformers' and PEFT's users push: with this package and without it, at
any revision, offline, and when the Hub refuses.

The Hub is the one of `loopback_hub.py`, the client the real one. It has to know the address when it is imported, so
programs run in processes of their own; each does many things, since each pays for its imports.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hf_llava_ft
from hf_llava_ft.checkpoints.opening import fit_to_processor, load_model
from hf_llava_ft.checkpoints.verify import Probe, default_image, reference_outputs
from hf_llava_ft.processing.tokenizer_llava import load_tokenizer
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.training.tuning import with_tuning
from tests import warm_python
from tests.loopback_hub import CutRequest, LoopbackHub, Status

ROOT = Path(__file__).resolve().parents[3]
QUESTION = "What is in the picture?"

# Pushes with the calls that users know, and reads back with this package, from an empty cache.
PUSH_AND_LOAD = """
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

import hf_llava_ft
from hf_llava_ft import LlavaForCausalLM
from hf_llava_ft.checkpoints.inspection import inspect_checkpoint
from hf_llava_ft.checkpoints.opening import fit_to_processor, load_config
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.checkpoints.verify import Probe, reference_outputs

folders, output = Path(sys.argv[1]), Path(sys.argv[2])
api = HfApi()

# What save_pretrained, push_to_hub and PEFT make of it.
for name in ("native", "nested", "original"):
    model = load_model(str(folders / name))
    if name == "original":
        with pytest.raises(ValueError, match="is a folder that nobody else has"):
            model.push_to_hub("user/original")
        with pytest.raises(ValueError, match="is a folder that nobody else has"):
            model.save_pretrained(output / "saved" / name, push_to_hub=True, repo_id="user/original")
        model.config.vision_tower_name = "org/tower"
    model.save_pretrained(output / "saved" / name, push_to_hub=True, repo_id=f"user/{name}", private=name == "nested")
    load_processor(str(folders / "native")).push_to_hub(f"user/{name}")
    model.push_to_hub(f"user/{name}-again", commit_message="Again")
api.create_tag("user/native", tag="v1")
first = api.model_info("user/native").sha
LlavaForCausalLM.from_pretrained(folders / "native-2").push_to_hub("user/native")
for name in ("adapter", "adapter-2"):
    base = load_model("user/native", revision="v1")
    adapter = PeftModel.from_pretrained(base, folders / name)
    adapter.peft_config["default"].base_model_name_or_path = "user/native"
    adapter.peft_config["default"].revision = first
    adapter.push_to_hub("user/adapter", revision=None if name == "adapter" else "second")
load_processor(str(folders / "native")).push_to_hub("user/adapter", revision="second")
load_processor(str(folders / "native")).push_to_hub("user/adapter")

shutil.rmtree(constants.HF_HUB_CACHE)
processor = load_processor("user/native")
results, facts = {}, {}

def ask(key, model, reader=processor):
    if "original" in key:
        fit_to_processor(model, processor)  # which has another id for an image than an original of this size
    results[key] = reference_outputs(model.eval(), reader, Probe(max_new_tokens=1))["logits"]
    facts[key] = f"{type(model).__module__.split('.')[0]}.{type(model).__name__}"

for name in ("native", "nested", "original"):
    for repo in (f"user/{name}", f"user/{name}-again"):
        ask(f"{repo} AutoModelForCausalLM", AutoModelForCausalLM.from_pretrained(repo))
        ask(f"{repo} load_model", load_model(repo))
    ask(f"user/{name} AutoProcessor", load_model(f"user/{name}"), AutoProcessor.from_pretrained(f"user/{name}"))
ask("user/native AutoModelForImageTextToText", AutoModelForImageTextToText.from_pretrained("user/native"))
for revision in ("v1", first, "main"):
    key, at = f"user/native@{revision}", {"revision": revision}
    ask(f"{key} AutoModelForCausalLM", AutoModelForCausalLM.from_pretrained("user/native", **at))
    ask(f"{key} load_model", load_model("user/native", load_processor("user/native", **at), **at))
ask("user/adapter AutoModelForCausalLM", AutoModelForCausalLM.from_pretrained("user/adapter"))
ask("user/adapter LlavaForCausalLM", LlavaForCausalLM.from_pretrained("user/adapter"))
ask("user/adapter load_model", load_model("user/adapter"))
ask("user/adapter --base", load_model("user/adapter", base=str(folders / "native")))
second = {"adapter_kwargs": {"revision": "second"}}
ask("user/adapter@second AutoModelForCausalLM", AutoModelForCausalLM.from_pretrained("user/adapter", **second))
ask("user/adapter@second LlavaForCausalLM", LlavaForCausalLM.from_pretrained("user/adapter", revision="second"))
ask("user/adapter@second load_model", load_model("user/adapter", revision="second"))
for revision in ("main", "second"):
    assert AutoProcessor.from_pretrained("user/adapter", revision=revision).chat_template == processor.chat_template
assert inspect_checkpoint("user/adapter", "second").revision == first
save_file({key: tensor.contiguous() for key, tensor in results.items()}, output / "with.safetensors")

def refusal(call, *arguments, **environment):
    os.environ.update(environment)
    try:
        call(*arguments)
    except ValueError as error:
        return str(error)
    finally:
        os.environ["HF_TOKEN"] = "hf_loopback"
    raise AssertionError(arguments)

facts["refusals"] = {
    "nothing": refusal(load_model, "user/nothing"),
    "no id": refusal(load_model, "no/such/folder"),
    "a dataset's name": refusal(load_processor, "user/nothing-at-all"),
    "revision": refusal(load_processor, "user/native", "v9"),
    "revision of an adapter": refusal(inspect_checkpoint, "user/adapter", "v9"),
    "gated": refusal(load_model, "someone/gated"),
    "private": refusal(load_model, "user/nested", HF_TOKEN=""),
    "expired": refusal(load_model, "user/nested", HF_TOKEN="hf_expired"),
    "no model": refusal(load_model, "org/empty"),
    "config": refusal(load_config, "user/nothing"),
    "base": refusal(load_model, "org/adapter-of-nothing"),
    "original LoRA": refusal(LlavaForCausalLM.from_pretrained, "org/original-lora"),
    "other shapes": refusal(load_model, "org/of-other-shapes"),
}
# By the headers of its weights, which were not fetched for that.
facts["fetched"] = try_to_load_from_cache("org/of-other-shapes", "model.safetensors")
(output / "with.json").write_text(json.dumps(facts))
"""
# What people do who do not have this package.
LOAD_WITHOUT = """
import json
import sys
sys.modules["hf_llava_ft"] = None
from pathlib import Path

import torch
from huggingface_hub import constants
from peft import PeftConfig, PeftModel
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

image, output, question = Image.open(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
results, answers = {}, {}

def ask(key, model, processor):
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        results[key] = model(**inputs).logits

def load(repo, revision=None, trust=False):
    return AutoModelForImageTextToText.from_pretrained(repo, revision=revision, trust_remote_code=trust)

assert not Path(constants.HF_HUB_CACHE).exists()
for repo, revision, trust in (
    ("user/native", None, False),
    ("user/native", "v1", False),
    ("user/native-again", None, False),
    ("user/nested", None, True),
    ("user/nested-again", None, True),
):
    processor = AutoProcessor.from_pretrained("user/native")
    ask(f"{repo}@{revision or ''}", load(repo, revision, trust), processor)
for revision in (None, "second"):
    settings = PeftConfig.from_pretrained("user/adapter", revision=revision)
    base = load(settings.base_model_name_or_path, settings.revision)
    adapted = PeftModel.from_pretrained(base, "user/adapter", revision=revision)
    ask(f"user/adapter@{revision or ''}", adapted, AutoProcessor.from_pretrained("user/adapter", revision=revision))
save_file({key: tensor.contiguous() for key, tensor in results.items()}, output / "without.safetensors")
ask_pipeline = pipeline("image-text-to-text", model="user/native", revision="v1")
answer = ask_pipeline(text=messages, max_new_tokens=8, return_full_text=False)[0]["generated_text"]
(output / "answer.json").write_text(json.dumps(answer))
"""
# Everything again with HF_HUB_OFFLINE, from the cache that the first program left.
LOAD_OFFLINE = """
import json
import sys
from pathlib import Path

from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoProcessor

from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.cli import main
from hf_llava_ft.errors import UserError
from hf_llava_ft.checkpoints.verify import Probe, reference_outputs

output, results, said = Path(sys.argv[1]), {}, []
processor = load_processor("user/native", "v1")
for name in ("native", "nested", "original", "adapter"):
    repo = f"user/{name}"
    AutoProcessor.from_pretrained(repo)
    model = load_model(repo, processor if name == "original" else None)
    results[repo] = reference_outputs(model, processor, Probe(max_new_tokens=1))["logits"]
    if name != "original":
        auto = AutoModelForCausalLM.from_pretrained(repo).eval()
        results[f"{repo} Auto"] = reference_outputs(auto, processor, Probe(max_new_tokens=1))["logits"]
for repo, revision in (("user/native", "v1"), ("user/adapter", "second")):
    model = load_model(repo, revision=revision)
    results[f"{repo}@{revision}"] = reference_outputs(model, processor, Probe(max_new_tokens=1))["logits"]
save_file({key: tensor.contiguous() for key, tensor in results.items()}, output / "offline.safetensors")
for repo, revision in (("user/never", None), ("user/native", "v9")):
    try:
        load_model(repo, revision=revision)
    except UserError as error:
        said.append(str(error))

def command(*words):
    sys.argv = ["llava-ft", *map(str, words)]
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0

merged, second = ("--output_dir", output / "merged", "--json", output / "m.json"), ("--revision", "second")
native_hf = ("--format", "llava-hf", "--output_dir")
ask = ("generate", "--prompt", "What?", "--max_new_tokens", 8, "--json")
codes = [
    command("merge", "--adapter", "user/adapter", *second, *merged),
    command("convert", "--model", "user/adapter", *native_hf, output / "converted"),
    command("convert", "--model", "user/native", "--revision", "v1", *native_hf, output / "v1"),
    command(*ask, output / "1.json", "--model", "user/native", "--revision", "v1"),
    command(*ask, output / "2.json", "--model", "user/native"),
    command(*ask, output / "3.json", "--model", "user/adapter", *second),
    command(*ask, output / "4.json", "--model", "user/native", "--revision", "v9"),
]
(output / "offline.json").write_text(json.dumps({"said": said, "codes": codes}))
"""
# While the Hub is not well.
LOAD_FROM_A_BROKEN_HUB = """
import sys
from hf_llava_ft.checkpoints.opening import load_processor
from hf_llava_ft.errors import UserError

for repo in sys.argv[1:]:
    try:
        load_processor(repo)
    except UserError as error:
        assert chr(10) not in str(error)
        print("refusal:", error)
    else:
        raise AssertionError(repo)
"""


@pytest.fixture(scope="module")
def folders(tiny, golden, tmp_path_factory):
    """One folder of each kind, and what the model in memory makes of the default question, by its name."""
    root, expected = tmp_path_factory.mktemp("folders"), {}
    processor = None

    def write(name, model, **kwargs):
        fit_to_processor(model, processor)
        expected[name] = reference_outputs(model, processor, Probe(max_new_tokens=8))
        model.save_pretrained(root / name, **kwargs)
        processor.save_pretrained(root / name)

    def another(model):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        return model.eval()

    native = tiny.model()
    processor = hf_llava_ft.LlavaProcessor.build(
        load_tokenizer(golden / "tokenizer_tiny"), native.config.vision_config, version="v1", image_aspect_ratio="pad"
    )
    write("native", native)
    write("native-2", another(tiny.model()))
    write("nested", tiny.model(projector_type="linear"))
    original = tiny.model(vision_tower_name=str(root / "tower"))
    original.model.vision_tower.save_pretrained(root / "tower")
    write("original", original, checkpoint_format="llava")
    for index, name in enumerate(("adapter", "adapter-2")):
        torch.manual_seed(index)
        base = load_model(str(root / "native"), processor)
        adapted = another(with_tuning(base, TuningArguments(train_type="lora"), str(root / "native")))
        expected[name] = reference_outputs(adapted, processor, Probe())
        adapted.save_pretrained(root / name)
    return root, expected


@pytest.fixture(scope="module")
def hub(folders):
    root, _ = folders
    with LoopbackHub() as hub:
        hub.upload("models/org/tower", root / "tower")
        hub.upload("models/org/empty", {"README.md": b"Nothing yet."})
        nobodys = {"peft_type": "LORA", "base_model_name_or_path": "user/nothing"}
        hub.upload("models/org/adapter-of-nothing", {"adapter_config.json": json.dumps(nobodys).encode()})
        lora = {"adapter_config.json": b'{"base_model_name_or_path": "user/native"}', "non_lora_trainables.bin": b"PK"}
        hub.upload("models/org/original-lora", lora)
        settings = json.loads((root / "native/config.json").read_text())
        settings["text_config"]["hidden_size"] *= 2
        weights = (root / "native/model.safetensors").read_bytes()
        other_shapes = {"config.json": json.dumps(settings).encode(), "model.safetensors": weights}
        hub.upload("models/org/of-other-shapes", other_shapes)
        for name in ("gated", "failing", "breaking"):
            hub.upload(f"models/someone/{name}", root / "native")
        hub.repositories["models/someone/gated"].gated = True
        hub.fail(Status(503), "/someone/failing/", times=1000)
        hub.fail(CutRequest(), "/someone/breaking/", times=1000)
        yield hub


def run(hub, program: str, *arguments, home: Path, **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, **hub.environment(home), **environment}
    done = warm_python.run(["-c", program, *map(str, arguments)], cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:] + str(hub.unknown)
    return done


@pytest.fixture(scope="module")
def pushed(hub, folders, tmp_path_factory):
    """The folder with what the program saw."""
    output = tmp_path_factory.mktemp("pushed")
    run(hub, PUSH_AND_LOAD, folders[0], output, home=output / "home")
    assert hub.unknown == []
    return output


def name_of(key: str) -> str:
    """Which folder what loads by `key`, "user/NAME@REVISION HOW", was made of."""
    name, _, revision = key.partition(" ")[0].removeprefix("user/").partition("@")
    if name == "native" and revision in ("", "main"):
        return "native-2"  # main has moved on
    return "adapter-2" if (name, revision) == ("adapter", "second") else name.removesuffix("-again")


def assert_as_expected(file: Path, folders) -> None:
    _, expected = folders
    for key, logits in load_file(file).items():
        wanted = expected[name_of(key)]["logits"]
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


def test_the_artefacts_differ(folders):
    """So that the wrong one, or the wrong revision, would be noticed."""
    logits = [outputs["logits"][0, -1] for _, outputs in sorted(folders[1].items()) if "original" not in _]
    for index, one in enumerate(logits):
        assert all((one - other).abs().max() > 1e-2 for other in logits[:index])


def test_with_this_package_every_kind_loads_by_its_id(pushed, folders):
    assert_as_expected(pushed / "with.safetensors", folders)
    classes = json.loads((pushed / "with.json").read_text())
    assert classes["user/native AutoModelForCausalLM"] == "hf_llava_ft.LlavaForCausalLM"
    assert classes["user/native AutoModelForImageTextToText"] == "transformers.LlavaForConditionalGeneration"
    assert classes["user/adapter AutoModelForCausalLM"] == "hf_llava_ft.LlavaForCausalLM"


def test_what_is_pushed_is_all_and_nothing_else(hub, pushed, folders):
    weights = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    processor = {"chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    for name in ("native", "original"):
        assert set(hub.commits[f"models/user/{name}"][0]) == weights
        assert weights | processor <= set(hub.repos[f"models/user/{name}"])
    architectures = json.loads(hub.repos["models/user/native"]["config.json"])["architectures"]
    assert architectures == ["LlavaForConditionalGeneration"]
    assert json.loads(hub.repos["models/user/original"]["config.json"])["model_type"] == "llava_llama"
    code = {path.name for path in (folders[0] / "nested").glob("*.py")}
    assert "modeling_llava.py" in code and set(hub.commits["models/user/nested"][0]) == weights | code
    assert hub.private["models/user/nested"] and not hub.private["models/user/native"]
    for repository in hub.repositories.values():
        for commit in repository.at("main").history():
            content = b"".join(file.content for file in commit.files.values())
            assert str(pushed.parent).encode() not in content and b"hf_loopback" not in content, repository.name


def test_refusals_are_one_sentence(pushed):
    refusals = json.loads((pushed / "with.json").read_text())["refusals"]
    for key, says in {
        "nothing": "user/nothing is neither a folder nor a model on the Hub",
        "no id": "no/such/folder is neither a folder nor",
        "a dataset's name": "user/nothing-at-all is neither",
        "revision": "user/native has no revision v9",
        "revision of an adapter": "user/adapter has no revision v9",
        "gated": "someone/gated is gated: ask for access",
        "private": "a private one asks for a token",
        "expired": "is wrong or has expired",
        "no model": "org/empty is a repository without a model",
        "config": "user/nothing is neither a folder nor",
        "base": "user/nothing is neither a folder nor",
        "original LoRA": "open it with load_model",
    }.items():
        assert says in refusals[key] and "\n" not in refusals[key], (key, refusals[key])
        assert "hf_expired" not in refusals[key]


def test_weights_of_other_shapes_are_refused_before_they_are_fetched(pushed):
    facts = json.loads((pushed / "with.json").read_text())
    assert "has the shape [" in facts["refusals"]["other shapes"] and "by config.json it has" in str(facts["refusals"])
    assert facts["fetched"] is None


def test_without_this_package(hub, pushed, folders, tmp_path):
    default_image().save(tmp_path / "image.png")
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    command = ["-I", "-c", LOAD_WITHOUT, str(tmp_path / "image.png"), str(tmp_path), QUESTION]
    done = warm_python.run(command, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_as_expected(tmp_path / "without.safetensors", folders)
    processor = hf_llava_ft.load_processor(str(folders[0] / "native"))
    ids = folders[1]["native"]["answer_ids"][0]
    assert json.loads((tmp_path / "answer.json").read_text()) == processor.decode(ids, skip_special_tokens=True)


@pytest.mark.slow
def test_offline_nothing_is_asked(hub, pushed, folders, tmp_path):
    before = len(hub.requests)
    run(hub, LOAD_OFFLINE, tmp_path, home=pushed / "home", HF_HUB_OFFLINE="1")
    assert hub.requests[before:] == []
    assert_as_expected(tmp_path / "offline.safetensors", folders)
    told = json.loads((tmp_path / "offline.json").read_text())
    assert ["HF_HUB_OFFLINE forbids" in sentence for sentence in told["said"]] == [True, True]
    assert told["codes"] == [0, 0, 0, 0, 0, 0, 2]
    answers = [json.loads((tmp_path / f"{number}.json").read_text())["answer"] for number in (1, 2, 3)]
    assert len(set(answers)) == 3  # each revision its own
    assert json.loads((tmp_path / "m.json").read_text())["loader"] == "transformers"
    processor = hf_llava_ft.load_processor(str(folders[0] / "native"))
    for folder, name in (("merged", "adapter-2"), ("v1", "native")):
        logits = reference_outputs(load_model(str(tmp_path / folder)), processor, Probe())["logits"]
        torch.testing.assert_close(logits, folders[1][name]["logits"], rtol=0, atol=1e-3)
    settings = json.loads((tmp_path / "converted" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "user/native"
    assert settings["revision"] == hub.repositories["models/user/native"].tags["v1"]


@pytest.mark.slow
def test_a_hub_that_is_not_well(hub, tmp_path):
    done = run(hub, LOAD_FROM_A_BROKEN_HUB, "someone/failing", "someone/breaking", home=tmp_path)
    failing, breaking = [line for line in done.stdout.splitlines() if line.startswith("refusal:")]
    assert "with its own failure 503" in failing
    assert "the Hub cannot be reached for someone/breaking" in breaking
