"""No call of ours gives a folder leave to run its code: every one says so."""

import ast
import json
import os
import shutil
from pathlib import Path

import pytest

from tests import warm_python

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("hf_llava_ft", "modeling", "processing", "hub_scripts")
# Classes and functions of transformers that look for code in a folder.
OPENERS = ("from_pretrained", "from_config", "pipeline", "get_class_from_dynamic_module")
# What is called on a class without code of a folder: a class that is given, PEFT's, or ours, which hand it on.
SAFE = {
    ("hf_llava_ft/checkpoints/adapters.py", "PeftConfig.from_pretrained"): "PEFT reads JSON",
    ("hf_llava_ft/checkpoints/opening.py", "LlavaConfig.from_pretrained"): "our class; transformers would warn",
    ("modeling/checkpoint_mixin_llava.py", "LlavaConfig.from_pretrained"): "our class, as above",
    ("processing/image_processing_llava.py", "kind.from_pretrained"): "a class of transformers that is given",
    ("modeling/adapters_llava.py", "peft.PeftConfig.from_pretrained"): "PEFT reads JSON",
    ("hf_llava_ft/checkpoints/reload.py", "PeftModel.from_pretrained"): "PEFT has no code of folders",
}
# They say it with a name: code that was compared with ours, byte for byte, and the handler in a folder of its own.
BY_NAME = ("hf_llava_ft/checkpoints/reload.py", "hf_llava_ft/serving/endpoint_handler.py")


def calls_without(source: str, path: str) -> list[str]:
    """Calls that open a folder and do not say `trust_remote_code=False`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        last = name.rpartition(".")[2]
        if last not in OPENERS or name.startswith("super("):
            continue
        said = {each.arg: each.value for each in node.keywords}
        trust = said.get("trust_remote_code")
        if isinstance(trust, ast.Constant) and trust.value is False:
            continue
        if isinstance(trust, ast.Name) and path in BY_NAME:
            continue
        if None in said and '"trust_remote_code": False' in ast.unparse(node).replace("'", '"'):
            continue
        if (path, name) not in SAFE:
            found.append(f"{path}:{node.lineno}: {name}")
    return found


def test_every_call_that_opens_a_folder_says_that_no_code_is_run():
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            found += calls_without(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "AutoConfig.from_pretrained(name)",
        "AutoConfig.from_pretrained(name, trust_remote_code=True)",
        "AutoConfig.from_pretrained(name, trust_remote_code=trust)",
        "AutoModel.from_config(config)",
        "kind.from_pretrained(tower, **{'dtype': dtype})",
    ],
)
def test_a_call_that_does_not_is_found(source):
    assert calls_without(source, "hf_llava_ft/train.py")


def test_a_call_that_does_is_not():
    assert not calls_without("AutoConfig.from_pretrained(name, trust_remote_code=False)", "hf_llava_ft/train.py")
    assert not calls_without("A.from_pretrained(n, **{'trust_remote_code': False, **kwargs})", "hf_llava_ft/train.py")


# ------------------------------------------------------------------------- whole processes


@pytest.fixture(scope="module")
def stranger(tiny_checkpoint, golden, tmp_path_factory):
    """Folders of a LLaVA, a tower and a language model that name code of their own, which would leave a file."""
    folder = tmp_path_factory.mktemp("stranger")
    for name, source in (("llava", tiny_checkpoint), ("tower", golden / "tiny-clip"), ("text", golden / "tiny-llama")):
        shutil.copytree(source, folder / name)
        code = f"open({str(folder / 'was_run')!r}, 'w').close()\nclass Config: pass\nclass Model: pass\n"
        (folder / name / "own.py").write_text(code)
        kinds = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor", "AutoImageProcessor")
        for file in (folder / name).glob("*config.json"):
            settings = json.loads(file.read_text())
            settings["auto_map"] = dict.fromkeys(kinds, "own.Model") | {"AutoTokenizer": ["own.Model", "own.Model"]}
            if file.name == "config.json" and name != "llava":
                settings["model_type"] = f"own_{name}"
            file.write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "--model", "llava", "--prompt", "What?", "--max_new_tokens", "2"),
        ("train", "--model_name_or_path", "text", "--vision_tower", "tower", "--dry_run", "--output_dir", "out"),
        ("train", "--model_name_or_path", "llava", "--vision_tower", "tower", "--dry_run", "--output_dir", "out"),
        ("compose", "--vision", "tower", "--language", "text", "--output_dir", "new"),
    ],
)
def test_no_command_runs_the_code_of_a_folder_or_asks_whether_it_may(stranger, words):
    if words[0] == "train":
        words = (*words, "--data_path", "data.json")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(stranger / "modules")}
    done = warm_python.run(["-m", "hf_llava_ft.cli", *words], cwd=stranger, env=environment)
    said = done.stdout + done.stderr
    assert "[y/N]" not in said
    assert "Traceback" not in said
    assert not (stranger / "was_run").exists()
