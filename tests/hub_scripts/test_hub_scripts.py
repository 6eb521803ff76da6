"""Every script runs as its docstring says: the commands are read from there and run, with small models in the place of
the ones they name."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.checkpoints.verify import Probe, reference_outputs
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.training.tuning import with_lora
from tests.loopback_hub import LoopbackHub

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path for path in (ROOT / "hub_scripts").glob("*.py") if path.name != "__init__.py")
# What stands in a docstring -> what stands for it here.
STAND_INS = {
    "openai/clip-vit-large-patch14-336": "tiny-clip",
    "Qwen/Qwen1.5-4B-Chat": "tiny-llama",
    "liuhaotian/llava-v1.5-7b": "c_forward/mlp2x_patch/checkpoint",
}
# One process for all of them, since each new one pays for importing torch. A script is run as by `python
# SCRIPT`, a name without .py as by `python -m`.
PROGRAM = """
import contextlib, io, json, runpy, sys, traceback
answers = sys.stdout
for line in sys.stdin:
    script, sys.argv = json.loads(line)
    sys.argv.insert(0, script)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if script.endswith(".py"):
                runpy.run_path(script, run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            code = 1
            traceback.print_exc()
    print(json.dumps([code, out.getvalue(), err.getvalue()]), file=answers, flush=True)
"""


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


def commands_in(script: Path) -> list[list[str]]:
    """The arguments of each `python hub_scripts/NAME.py` in the docstring of `script`."""
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    lines = re.findall(r"^ *python hub_scripts/(\S+\.py) (.+)$", re.sub(r"\\\n *", "", text), re.MULTILINE)
    assert lines and {name for name, _ in lines} == {script.name}, f"{script.name} shows no command of its own"
    return [shlex.split(arguments) for _, arguments in lines]


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub
        assert hub.unknown == []


@pytest.fixture(scope="module")
def place(golden, tiny_checkpoint, tmp_path_factory):
    """A folder with everything that the commands name."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("tiny-clip", "tiny-llama", "c_forward/mlp2x_patch/checkpoint"):
        shutil.copytree(golden / name, folder / name)
    (folder / "images").mkdir()
    Image.new("RGB", (40, 30), (200, 90, 10)).save(folder / "images/cat.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    rows = [{"id": "cat", "image": "cat.png", "conversations": turns}]
    (folder / "chat.json").write_text(json.dumps(rows))

    shutil.copytree(tiny_checkpoint, folder / "base")
    processor = load_processor(str(folder / "base"))
    tuning = TuningArguments(lora_r=2, lora_alpha=4, lora_dropout=0.0)
    model = with_lora(load_model(str(folder / "base"), processor), tuning, "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder / "runs/quickstart/adapter")
    processor.save_pretrained(folder / "runs/quickstart/adapter")
    return folder


@pytest.fixture(scope="module")
def run(hub, place, tmp_path_factory):
    """A function that runs a script, or a module, with arguments, in `place`."""
    hub.upload("models/user/my-base", place / "base")
    environment = {**os.environ, **hub.environment(tmp_path_factory.mktemp("home")), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=place,
        env=environment,
    )

    def run(script: str, *arguments: str) -> Done:
        program = script if "." in script else str(_path(script))
        process.stdin.write(json.dumps([program, arguments]) + "\n")
        process.stdin.flush()
        return Done(*json.loads(process.stdout.readline()))

    yield run
    process.stdin.close()
    process.wait(60)


def run_docstring(run, script: str) -> list[Done]:
    found = [run(script, *(STAND_INS.get(word, word) for word in words)) for words in commands_in(_path(script))]
    assert [done.code for done in found] == [0] * len(found), found[-1].err
    return found


def _path(script: str) -> Path:
    return ROOT / "hub_scripts" / f"{script}.py"


@pytest.mark.parametrize("script", [path.stem for path in SCRIPTS])
def test_its_help_knows_every_flag_of_its_docstring(run, script):
    done = run(script, "--help")
    assert done.code == 0, done.err
    for words in commands_in(_path(script)):
        assert [flag for flag in words if flag.startswith("--") and flag not in done.out] == []


def test_compose_and_data_run_as_their_docstrings_say(run, place, hub):
    run_docstring(run, "compose")
    assert (place / "llava-qwen/model.safetensors").is_file()
    run_docstring(run, "push_dataset")
    assert list((place / "my-dataset").rglob("*.parquet")) and "datasets/user/my-dataset" in hub.repositories


def test_each_push_refuses_what_the_other_is_for(run, hub):
    done = run("push_model", "runs/quickstart/adapter", "--repo_id", "user/wrong")
    assert done.code == 2 and "holds an adapter, and a model was to be pushed" in done.err
    done = run("push_adapter", "base", "--repo_id", "user/wrong")
    assert done.code == 2 and "holds a model, and an adapter was to be pushed" in done.err
    done = run("push_model", "images", "--repo_id", "user/wrong")
    assert done.code == 2 and "images holds no model" in done.err
    assert "models/user/wrong" not in hub.repositories and "datasets/user/wrong" not in hub.repositories


@pytest.mark.slow
def test_the_rest_runs_as_their_docstrings_say(run, place, hub):
    """Each of these loads what it wrote in a fresh process; in this order, since one takes what the other made."""
    run_docstring(run, "convert")
    assert json.loads((place / "llava-1.5-7b-hf/config.json").read_text())["model_type"] == "llava"
    run_docstring(run, "merge_lora")
    [done] = run_docstring(run, "verify")
    assert "Verified: merged loads with transformers and answers the same" in done.err
    run_docstring(run, "push_model")
    assert "model.safetensors" in hub.repositories["models/user/my-llava"].at("main").files
    run_docstring(run, "push_adapter")
    assert "adapter_model.safetensors" in hub.repositories["models/user/my-adapter"].at("main").files


@pytest.mark.slow
def test_verify_takes_a_name_on_the_hub(run, place):
    done = run("verify", "--model", "user/my-base", "--json", "verified.json")
    assert done.code == 0, done.err
    result = json.loads((place / "verified.json").read_text())
    assert result["ok"] and result["loader"] == "transformers" and result["logit_difference"] < 1e-6


@pytest.mark.slow
def test_verify_says_what_differs(run, place):
    """This model says its stop token at once. This package stops there, as the template says; others read on, since
    generation_config.json does not name it."""
    shutil.copytree(place / "base", place / "endless")
    processor = load_processor(str(place / "endless"))
    first = reference_outputs(load_model(str(place / "endless")), processor, Probe())["answer_ids"][0, 0]
    weights = load_file(place / "endless/model.safetensors")
    head = weights["language_model.lm_head.weight"]
    head[processor.stop_token_id] = 2 * head[first]
    save_file(weights, place / "endless/model.safetensors", metadata={"format": "pt"})
    settings = json.loads((place / "endless/generation_config.json").read_text()) | {"eos_token_id": 5}
    (place / "endless/generation_config.json").write_text(json.dumps(settings))
    done = run("verify", "--model", "endless")
    assert done.code == 1 and "Not the same: endless, loaded with transformers: the answer is" in done.err


def test_verify_names_what_is_no_model(run):
    done = run("verify", "--model", "images")
    assert done.code == 2 and "not a model folder" in done.err


@pytest.mark.parametrize("script", [path.stem for path in SCRIPTS])
def test_it_runs_as_a_module_too(run, script):
    by_path, as_module = run(script, "--help"), run(f"hf_llava_ft.hub_scripts.{script}", "--help")
    assert as_module.code == 0, as_module.err
    # All but the first paragraph, in which the program is named.
    ours, theirs = (re.split(r"\n\s*\n", done.out.strip(), maxsplit=1) for done in (by_path, as_module))
    assert len(ours) == 2 and ours[1] == theirs[1]


@pytest.mark.slow
def test_it_runs_in_a_process_of_its_own():
    for program in ("hub_scripts/merge_lora.py",), ("-m", "hf_llava_ft.hub_scripts.merge_lora"):
        command = [sys.executable, *program, "--help"]
        assert "--adapter" in subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
