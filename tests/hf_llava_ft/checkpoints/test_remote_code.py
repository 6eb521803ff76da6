"""Models that transformers' own LLaVA cannot express leave with their code: for people who do not have this package,
and without anybody's code being run by it."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

import hf_llava_ft
from hf_llava_ft.checkpoints.convert import convert
from hf_llava_ft.checkpoints.merge import merge_adapter
from hf_llava_ft.checkpoints.opening import fit_to_processor, load_config, load_model, load_processor
from hf_llava_ft.checkpoints.remote_code import carries_our_code, note_on_code
from hf_llava_ft.checkpoints.verify import Probe, default_image, loader_for, reference_outputs, verify
from hf_llava_ft.cli import main
from hf_llava_ft.errors import UserError
from hf_llava_ft.modeling.checkpoint_mixin_llava import AUTO_MAP
from hf_llava_ft.processing.tokenizer_llava import load_tokenizer
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.training.tuning import with_tuning
from tests import warm_python

ANYRES = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[112, 56], [56, 112], [112, 112]]}
# name: (language model, tower, fields of the configuration). Native `llava` and `llava_next` lack the projector, or
# the way to merge the crops of a picture.
CASES = {
    "identity": ("llama", "clip", {"projector_type": "identity"}),
    "linear": ("llama", "clip", {"projector_type": "linear"}),
    "mlp3x": ("llama", "clip", {"projector_type": "mlp3x_gelu"}),
    "mlp3x at the last layer": ("llama", "clip", {"projector_type": "mlp3x_gelu", "vision_feature_layer": -1}),
    "linear with the class token": (
        "llama",
        "clip",
        {"projector_type": "linear", "vision_feature_select_strategy": "full", "image_seq_length": 17},
    ),
    "linear over two layers": ("llama", "clip", {"projector_type": "linear", "vision_feature_layer": [-3, -2]}),
    "Mistral": ("mistral", "clip", {"projector_type": "mlp3x_gelu"}),
    "Qwen2, tied": ("qwen2", "clip", {"projector_type": "linear", "tie_word_embeddings": True}),
    "SigLIP": ("llama", "siglip", {"projector_type": "mlp3x_gelu"}),
    "LLaVA-1.6": ("llama", "clip", {"projector_type": "mlp3x_gelu", "patch_merge_type": "spatial_unpad", **ANYRES}),
    "LLaVA-1.6, flat": ("llama", "clip", {"projector_type": "mlp2x_gelu", "patch_merge_type": "flat", **ANYRES}),
    "LLaVA-1.6, spatial": (
        "mistral",
        "clip",
        {"projector_type": "mlp2x_gelu", "patch_merge_type": "spatial", **ANYRES},
    ),
}
# Those whose processor is not a native one either.
OWN_PROCESSOR = ("LLaVA-1.6, flat", "LLaVA-1.6, spatial")
QUESTION = "What is in the picture?"

# What people do who do not have this package.
STRANGER = """
import sys
sys.modules["hf_llava_ft"] = None
import json
from pathlib import Path
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from transformers import AutoTokenizer, pipeline

try:
    import hf_llava_ft
except ImportError:
    pass
else:
    sys.exit("the package is there")

def report(result):
    print("\\nresult:", json.dumps(result))  # other lines are those of transformers

def answers(model, processor, image):
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=MOST)
        logits = model(**inputs).logits
    answer_ids = ids[:, inputs["input_ids"].shape[1]:].contiguous()
    return {"input_ids": inputs["input_ids"], "logits": logits, "answer_ids": answer_ids}
"""
LOADS = """
image, output = Image.open(sys.argv[1]), Path(sys.argv[2])
for folder in map(Path, sys.argv[3:]):
    native_processor = "auto_map" not in json.loads((folder / "processor_config.json").read_text())
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=not native_processor)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    save_file(answers(model, processor, image), output / f"{folder.name}.safetensors")
    causal = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    body = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(output / "again" / folder.name)
    processor.save_pretrained(output / "again" / folder.name)
    again = AutoModelForImageTextToText.from_pretrained(output / "again" / folder.name, trust_remote_code=True)
    weights = model.state_dict()
    facts = {
        "classes": [f"{type(m).__module__.split('.')[0]}.{type(m).__name__}" for m in (model, causal, body)],
        "config": AutoConfig.from_pretrained(folder, trust_remote_code=True).projector_type,
        "processor": f"{type(processor).__module__.split('.')[0]}.{type(processor).__name__}",
        "tokenizer": AutoTokenizer.from_pretrained(folder, trust_remote_code=False).convert_tokens_to_ids("<image>"),
        "equal": [
            all(torch.equal(tensor, weights[prefix + name]) for name, tensor in m.state_dict().items())
            for prefix, m in (("", causal), ("model.", body), ("", again))
        ],
    }
    report(facts)
"""
PIPELINE = """
image, folder = Image.open(sys.argv[1]), sys.argv[2]
ask = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
messages = [{"role": "user", "content": content}]
report(ask(text=messages, max_new_tokens=MOST, return_full_text=False)[0]["generated_text"])
"""


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A function that runs a program without this package; returns what it reports, or fails with its error."""
    cwd = tmp_path_factory.mktemp("elsewhere")

    def run(program: str, *args, **environment) -> list:
        known = f"QUESTION, MOST = {QUESTION!r}, {Probe().max_new_tokens}"
        done = warm_python.run(
            ["-I", "-c", f"{known}\n{STRANGER}\n{program}", *map(str, args)],
            cwd=cwd,
            env={**os.environ, "HF_MODULES_CACHE": str(cwd / "modules"), **environment},
        )
        assert done.returncode == 0, done.stderr
        lines = [line.partition(": ") for line in done.stdout.splitlines()]
        return [json.loads(result) for kind, _, result in lines if kind == "result"]

    return run


def build(tiny, golden, case: str):
    """Model and processor of a case, with weights large enough that every part of the input shows in the logits."""
    text, vision, fields = CASES[case]
    settings = tiny.config(text, vision).to_dict() | fields
    if case == "identity":
        settings["vision_config"]["hidden_size"] = settings["text_config"]["hidden_size"]
    settings["text_config"]["tie_word_embeddings"] = settings["tie_word_embeddings"]
    config = hf_llava_ft.LlavaConfig.from_dict(settings)
    torch.manual_seed(list(CASES).index(case))
    model = hf_llava_ft.LlavaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    processor = hf_llava_ft.LlavaProcessor.build(
        load_tokenizer(golden / "tokenizer_tiny"),
        config.vision_config,
        version="v1",
        image_aspect_ratio=config.image_aspect_ratio or "pad",
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_grid_pinpoints=config.image_grid_pinpoints,
        patch_merge_type=config.patch_merge_type,
    )
    fit_to_processor(model, processor)
    return model, processor


@pytest.fixture(scope="module")
def written(tiny, golden, tmp_path_factory):
    """One folder per case, and what the model in memory makes of the default question."""
    root = tmp_path_factory.mktemp("with-code")
    expected = {}
    for index, case in enumerate(CASES):
        model, processor = build(tiny, golden, case)
        model.save_pretrained(root / f"case{index}")
        processor.save_pretrained(root / f"case{index}")
        expected[case] = root / f"case{index}", reference_outputs(model, processor, Probe())
    return expected


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "ramps.png"
    default_image().save(path)
    return path


@pytest.fixture(scope="module")
def loaded_elsewhere(written, stranger, photo, tmp_path_factory):
    """For each case: what a stranger saw, the stranger's outputs, and the folder that the stranger saved again."""
    output = tmp_path_factory.mktemp("elsewhere-outputs")
    facts = stranger(LOADS, photo, output, *(folder for folder, _ in written.values()))
    return {
        case: (fact, load_file(output / f"{folder.name}.safetensors"), output / "again" / folder.name)
        for (case, (folder, _)), fact in zip(written.items(), facts, strict=True)
    }


@pytest.fixture
def folder(written, tmp_path):
    """A copy of one of the folders."""
    return Path(shutil.copytree(written["mlp3x"][0], tmp_path / "folder"))


def assert_same_files(one: Path, other: Path) -> None:
    """Weights to the byte; settings but for the dtype of the parts, which transformers adds when it loads them."""
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    settings = [json.loads((folder / "config.json").read_text()) for folder in (one, other)]
    for parts in settings:
        parts["text_config"].pop("dtype", None)
        parts["vision_config"].pop("dtype", None)
    assert settings[0] == settings[1]


# ---------------------------------------------------------------------- without this package


@pytest.mark.parametrize("case", CASES)
def test_a_stranger_gets_the_same_logits_and_answer(written, loaded_elsewhere, case):
    _, expected = written[case]
    _, found, _ = loaded_elsewhere[case]
    assert torch.equal(found["input_ids"], expected["input_ids"])
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=0, atol=1e-4)
    assert torch.equal(found["answer_ids"], expected["answer_ids"])


def test_the_cases_differ(written):
    """So that a stranger who got the wrong model would be noticed."""
    logits = [outputs["logits"][0, -1] for _, outputs in written.values()]
    for index, one in enumerate(logits):
        assert all((one - other).abs().max() > 1e-2 for other in logits[:index])


@pytest.mark.parametrize("case", CASES)
def test_every_auto_class_serves_a_stranger(loaded_elsewhere, case):
    facts, _, _ = loaded_elsewhere[case]
    names = ["LlavaForCausalLM", "LlavaForCausalLM", "LlavaBaseModel"]
    assert facts["classes"] == [f"transformers_modules.{name}" for name in names]
    assert facts["config"] == CASES[case][2]["projector_type"]
    assert facts["equal"] == [True, True, True]
    module, name = facts["processor"].split(".")
    assert name == ("LlavaNextProcessor" if case.startswith("LLaVA-1.6") else "LlavaProcessor")
    assert module == ("transformers_modules" if case in OWN_PROCESSOR else "transformers")
    assert facts["tokenizer"] == 1024


@pytest.mark.parametrize("case", CASES)
def test_what_a_stranger_saves_is_whole_again(written, loaded_elsewhere, case):
    folder, _ = written[case]
    _, _, again = loaded_elsewhere[case]
    assert carries_our_code(again)
    assert_same_files(again, folder)


@pytest.mark.new_python
def test_a_pipeline_answers_a_stranger(written, stranger, photo, golden):
    folder, expected = written["mlp3x"]
    [answer] = stranger(PIPELINE, photo, folder)
    assert answer == load_processor(str(folder)).decode(expected["answer_ids"][0], skip_special_tokens=True)


def test_a_stranger_loads_it_from_the_hub(written, stranger, tmp_path):
    """Offline, from the cache that a download leaves."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub/models--someone--tiny-llava"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    shutil.copytree(written["linear"][0], repository / "snapshots" / commit)
    program = """
model = AutoModelForImageTextToText.from_pretrained("someone/tiny-llava", trust_remote_code=True)
report([type(model).__module__, model.lm_head.weight.double().sum().item()])
"""
    [[module, total]] = stranger(program, HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    assert module.startswith("transformers_modules.someone.") and commit in module
    weights = load_file(written["linear"][0] / "model.safetensors")
    assert total == pytest.approx(weights["lm_head.weight"].double().sum().item(), abs=1e-9)


def test_a_stranger_who_trusts_nobody_gets_an_error(folder, stranger):
    program = """
try:
    AutoModelForImageTextToText.from_pretrained(sys.argv[1])
except ValueError as error:
    report(str(error))
"""
    [error] = stranger(program, folder)
    assert "trust_remote_code=True" in error


# ---------------------------------------------------------------------- with this package


@pytest.mark.parametrize("case", CASES)
def test_with_this_package_nothing_is_to_be_trusted(written, case):
    folder, expected = written[case]
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
        assert type(auto_class.from_pretrained(folder)) is hf_llava_ft.LlavaForCausalLM
        assert type(auto_class.from_pretrained(folder, trust_remote_code=True)) is hf_llava_ft.LlavaForCausalLM
    assert AutoProcessor.from_pretrained(folder).chat_template
    processor = load_processor(str(folder))
    outputs = reference_outputs(load_model(str(folder), processor), processor, Probe())
    assert torch.equal(outputs["logits"], expected["logits"])


def test_it_goes_out_as_it_came(written, tmp_path):
    folder, _ = written["mlp3x"]
    load_model(str(folder)).save_pretrained(tmp_path)
    assert carries_our_code(tmp_path)
    assert_same_files(tmp_path, folder)


def test_native_and_original_folders_carry_no_code(tiny, tmp_path):
    tiny.model().save_pretrained(tmp_path / "native")
    model = tiny.model(projector_type="linear", vision_tower_name="tiny-clip")
    model.save_pretrained(tmp_path / "original", checkpoint_format="llava")
    for folder in ("native", "original"):
        assert not list((tmp_path / folder).glob("*.py"))
        assert "auto_map" not in json.loads((tmp_path / folder / "config.json").read_text())
        assert not carries_our_code(tmp_path / folder)


@pytest.mark.new_python
def test_verification_is_a_strangers(written, monkeypatch, tmp_path):
    """In the fresh process the package cannot be imported, and the user's cache of code stays as it is."""
    folder, expected = written["mlp3x"]
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    verification = verify(folder, expected, load_processor(str(folder)), Probe())
    assert verification.ok and verification.loader == "trust_remote_code" and verification.logit_difference < 1e-6
    assert not (tmp_path / "modules").exists()


def test_verification_notices_code_that_a_stranger_could_not_run(folder, written, monkeypatch):
    """Code that needs this package: it would load here, where the package is, and nowhere else."""
    import hf_llava_ft.checkpoints.verify as module

    code = (folder / "modeling_llava.py").read_text()
    (folder / "modeling_llava.py").write_text(code.replace("import torch\n", "import torch\nimport hf_llava_ft\n", 1))
    monkeypatch.setattr(module, "loader_for", lambda *folders: "trust_remote_code")
    with pytest.raises(UserError, match="does not load in a fresh process: .*hf_llava_ft"):
        verify(folder, written["mlp3x"][1], load_processor(str(folder)), Probe())


# ---------------------------------------------------------------------- what writes such folders


def write_adapter(base: str, folder: Path):
    """An adapter that changes the answers; returns the adapted model and its processor."""
    processor = load_processor(base)
    adapter = with_tuning(load_model(base, processor), TuningArguments(lora_r=4), base)
    torch.manual_seed(1)
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.03)
    adapter.save_pretrained(folder)
    processor.save_pretrained(folder)
    return adapter, processor


def test_an_adapter_on_a_base_with_code(written, tmp_path):
    base, untuned = written["mlp3x"]
    adapter, processor = write_adapter(str(base), tmp_path)
    reference = reference_outputs(adapter, processor, Probe())
    assert (reference["logits"] - untuned["logits"]).abs().max() > 1e-2
    verification = verify(tmp_path, reference, processor, Probe(), base=str(base))
    assert verification.ok and verification.loader == "trust_remote_code"
    assert not carries_our_code(tmp_path)  # its base does


@pytest.mark.parametrize("case", ["identity", "LLaVA-1.6, flat"])
def test_what_an_adapter_merges_to(written, tmp_path, case):
    write_adapter(str(written[case][0]), tmp_path / "adapter")
    merged = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert merged.verification.ok and merged.verification.loader == "trust_remote_code"
    assert carries_our_code(tmp_path / "merged")


@pytest.fixture
def original(tiny, golden, tmp_path, monkeypatch):
    """A checkpoint of the original with a projector of three layers; its tower is named by a path."""
    shutil.copytree(golden / "tiny-clip", tmp_path / "tower")
    model = tiny.model(projector_type="mlp3x_gelu", vision_tower_name=str(tmp_path / "tower"))
    model.resize_token_embeddings(1024)
    model.save_pretrained(tmp_path / "original", checkpoint_format="llava")
    load_tokenizer(golden / "tokenizer_tiny").save_pretrained(tmp_path / "original")
    return tmp_path / "original"


def run(monkeypatch, capfd, *args) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["llava-ft", *map(str, args)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main()
    return int(exit_info.value.code or 0), capfd.readouterr().err


def test_convert_says_that_it_wrote_code(original, tmp_path, monkeypatch, capfd):
    output, report = tmp_path / "converted", tmp_path / "report.json"
    flags = ("--model", original, "--format", "llava-hf", "--output_dir", output, "--json", report)
    code, err = run(monkeypatch, capfd, "convert", *flags)
    assert code == 0 and note_on_code(output) in err and "trust_remote_code=True" in note_on_code(output)
    assert json.loads(report.read_text())["loader"] == "trust_remote_code"
    assert carries_our_code(output)
    # Nothing of this machine, and not an original any more when it is saved again.
    assert str(tmp_path) not in (output / "config.json").read_text()
    assert load_config(str(output)).default_checkpoint_format == "nested"


def test_and_back_to_the_original(original, tmp_path):
    convert(str(original), tmp_path / "with-code", "llava-hf")
    tower = str(tmp_path / "tower")
    back = convert(str(tmp_path / "with-code"), tmp_path / "back", "llava", vision_tower=tower)
    assert back.verification.loader == "hf_llava_ft"
    first, second = (load_file(path / "model.safetensors") for path in (original, tmp_path / "back"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor[: len(first[name])], first[name]) for name, tensor in second.items())


def test_training_whole_parts_ends_with_code(written, llava_json, tmp_path, monkeypatch, capfd):
    data, images = llava_json(2)
    flags = {
        "model_name_or_path": written["linear"][0],
        "data_path": data,
        "image_folder": images,
        "output_dir": tmp_path / "out",
        "train_type": "projector",
        "max_steps": 1,
        "save_steps": 1,
        "use_cpu": True,
    }
    code, err = run(
        monkeypatch, capfd, "train", *(text for name, value in flags.items() for text in (f"--{name}", value))
    )
    assert code == 0 and "trust_remote_code=True" in err
    assert carries_our_code(tmp_path / "out") and carries_our_code(tmp_path / "out/checkpoint-1")
    processor = load_processor(str(tmp_path / "out"))
    trained = reference_outputs(load_model(str(tmp_path / "out"), processor), processor, Probe())
    assert verify(tmp_path / "out", trained, processor, Probe()).loader == "trust_remote_code"


# ---------------------------------------------------------------------- code of others


def spring(tmp_path) -> str:
    """Code that shows that it was run."""
    return f"open({str(tmp_path / 'sprung')!r}, 'w').close()\n"


@pytest.fixture
def trap(folder, tmp_path):
    """A folder whose model code is not ours."""
    for name in ("modeling_llava.py", "configuration_llava.py"):
        (folder / name).write_text(spring(tmp_path) + (folder / name).read_text())
    return folder


def test_a_trap_springs_under_who_trusts_it(trap, stranger, tmp_path):
    stranger("AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)", trap)
    assert (tmp_path / "sprung").exists()


def test_no_code_of_a_folder_is_run(trap, written, tmp_path):
    processor = load_processor(str(trap))
    load_model(str(trap), processor)
    AutoModelForImageTextToText.from_pretrained(trap, trust_remote_code=True)
    verification = verify(trap, written["mlp3x"][1], processor, Probe())
    assert verification.ok and verification.loader == "hf_llava_ft"
    load_model(str(trap)).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "sprung").exists()
    assert carries_our_code(tmp_path / "saved")


def test_nobody_is_asked_to_trust_an_unknown_model(trap, tmp_path, monkeypatch):
    settings = json.loads((trap / "config.json").read_text()) | {"model_type": "unheard_of"}
    (trap / "config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda question="": "y")
    with pytest.raises(UserError, match="is not a LLaVA: it is a model of type .unheard_of"):
        load_model(str(trap))
    assert not (tmp_path / "sprung").exists()


def test_nobody_is_asked_to_trust_a_processor(folder, tmp_path, monkeypatch):
    (folder / "tokenization_trap.py").write_text(spring(tmp_path) + "class Trap:\n    pass\n")
    for name, auto_map in (
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_trap.Trap", None]}),
        ("processor_config.json", {"AutoProcessor": "tokenization_trap.Trap"}),
    ):
        settings = json.loads((folder / name).read_text()) | {"auto_map": auto_map, "tokenizer_class": "Trap"}
        (folder / name).write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda question="": "y")
    try:
        load_processor(str(folder))
    except UserError:
        pass
    assert not (tmp_path / "sprung").exists()
    assert loader_for(folder) == "hf_llava_ft"


def without(name):
    return lambda folder: (folder / name).unlink()


def with_file(name):
    def change(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("pass\n")

    return change


def with_auto_map(auto_map, name="config.json", part=None):
    def change(folder):
        settings = json.loads((folder / name).read_text())
        (settings[part] if part else settings)["auto_map"] = auto_map
        (folder / name).write_text(json.dumps(settings))

    return change


@pytest.mark.parametrize(
    "change",
    [
        without("config.json"),
        without("modeling_llava.py"),
        lambda folder: (folder / "config.json").write_text("["),
        lambda folder: (folder / "projector_llava.py").write_text("pass\n"),
        with_file("custom_generate/generate.py"),  # transformers runs it, too
        with_file("tokenization_llava.py"),
        with_auto_map({**AUTO_MAP, "AutoModelForCausalLM": "someone/else--modeling_llava.LlavaForCausalLM"}),
        with_auto_map({**AUTO_MAP, "AutoTokenizer": ["modeling_llava.LlavaForCausalLM", None]}),
        with_auto_map({}),
        with_auto_map(["someone/else--module.Class", None], "tokenizer_config.json"),
        with_auto_map({"AutoTokenizer": ["/tmp/module.Class", None]}, "tokenizer_config.json"),
        with_auto_map({"AutoImageProcessor": "a--module.Class"}, "processor_config.json", "image_processor"),
        with_auto_map({"AutoModel": "a--module.Class"}, "config.json", "text_config"),
    ],
)
def test_what_is_not_ours_to_the_byte_is_not_ours(folder, change):
    assert carries_our_code(folder)
    change(folder)
    assert not carries_our_code(folder)
