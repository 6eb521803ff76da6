"""What a command does not import, and how it imports the rest: in a new Python each, since this one has all of it."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import gc, sys
sys.argv = ["llava-ft", *sys.argv[1:]]
"""
IMPORTING = (
    PROGRAM
    + """
from hf_llava_ft.start_up import importing

def states():
    with importing():
        within = gc.isenabled()
    return within, gc.isenabled(), gc.get_freeze_count() > 0

print(states())
gc.unfreeze()
try:
    with importing():
        raise ImportError
except ImportError:
    print(gc.isenabled())
sys.modules["torch"] = sys
print(states())
"""
)
LEFT_OUT = (
    PROGRAM
    + """
import importlib.util, json
from hf_llava_ft.settings.flags.first_look import models_and_words
from hf_llava_ft.start_up import leave_out_bitsandbytes

def is_left_out(models, words=()):
    sys.modules.pop("bitsandbytes", None)
    leave_out_bitsandbytes(models, words)
    return importlib.util.find_spec("bitsandbytes") is None

print(json.dumps([is_left_out(*each) for each in json.loads(sys.argv[1])]))
print(json.dumps([is_left_out(*models_and_words(each)) for each in json.loads(sys.argv[2])]))
"""
)
CHECK = (
    PROGRAM
    + """
from hf_llava_ft.cli import main
try:
    main()
except SystemExit as stop:
    print("exit", stop.code)
names = ("peft", "bitsandbytes", "torch._inductor.compile_fx", "transformers.trainer", "matplotlib")
print([name for name in names if sys.modules.get(name) is not None], gc.isenabled())
"""
)


def printed(checkout, program, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_imports_are_not_looked_through_for_garbage_and_what_comes_later_is(checkout):
    first, after_an_error, with_torch = printed(checkout, IMPORTING)
    assert first == "(False, True, True)" and after_an_error == "True"
    assert with_torch == "(True, True, False)"  # of another program than ours


def folder_of(path, name, **settings):
    path.mkdir()
    (path / name).write_text(json.dumps(settings))
    return str(path)


def test_a_library_is_left_out_only_where_nothing_can_need_it(checkout, tmp_path):
    pytest.importorskip("bitsandbytes")
    plain = folder_of(tmp_path / "plain", "config.json", model_type="llava")
    few_bits = folder_of(tmp_path / "few", "config.json", text_config={"quantization_config": {}})
    adapter, of_few_bits, of_unknown, loftq = (
        folder_of(tmp_path / name, "adapter_config.json", base_model_name_or_path=base, init_lora_weights=how)
        for name, base, how in (
            ("adapter", plain, True),
            ("of_few", few_bits, True),
            ("of_unknown", "nobody/knows", True),
            ("loftq", plain, "loftq"),
        )
    )
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text("[")
    recipe, qlora = tmp_path / "recipe.yaml", tmp_path / "qlora.yaml"
    recipe.write_text(f"model_name_or_path: {plain}\n")
    qlora.write_text(f"model_name_or_path: {plain}\ntrain_type: qlora\n")

    left_out = [[plain], [adapter], [plain, None, adapter]]
    kept = [[few_bits], [of_few_bits], [of_unknown], [loftq], [str(broken)], ["nobody/knows"], [plain, few_bits], []]
    of_runs_left_out = [["--model_name_or_path", plain], [f"--model-name-or-path={adapter}"], [str(recipe)]]
    of_runs_kept = [
        [*of_runs_left_out[0], "--bits", "4"],
        [*of_runs_left_out[0], "--optim", "paged_adamw_32bit"],
        ["--model_name_or_path", few_bits],
        [str(recipe), "--model_name_or_path", few_bits],
        [str(qlora)],
        ["--data_path", "rows.json"],
    ]
    by_models, by_words = map(
        json.loads,
        printed(
            checkout,
            LEFT_OUT,
            json.dumps([[models] for models in [*left_out, *kept]]),
            json.dumps([*of_runs_left_out, *of_runs_kept]),
        ),
    )
    assert by_models == [True] * len(left_out) + [False] * len(kept)
    assert by_words == [True] * len(of_runs_left_out) + [False] * len(of_runs_kept)


def test_a_check_imports_neither_bitsandbytes_nor_inductor(checkout, tiny_checkpoint, llava_json):
    """About three seconds of a core, with PEFT: a model's folder may be an adapter."""
    path, folder = llava_json(2)
    model = ["--model", tiny_checkpoint]
    *_, code, imported = printed(checkout, CHECK, "check", path, "--image_folder", folder, *model, "--num_proc", "1")
    assert code == "exit 0"
    assert imported == "['peft'] True"


def test_the_module_of_training_leaves_it_out_too(checkout, tiny_checkpoint, tmp_path):
    pytest.importorskip("bitsandbytes")
    command = [sys.executable, "-X", "importtime", "-m", "hf_llava_ft.train", "--output_dir", str(tmp_path / "out")]
    command += ["--model_name_or_path", str(tiny_checkpoint), "--data_path", str(tmp_path / "none.json")]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "none.json" in done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "peft" in imported and "bitsandbytes.functional" not in imported
