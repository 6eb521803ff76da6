"""A library that is newer than we know is told of: on import, and instead of a traceback where it may be the cause.

The newer release is one as far as Python knows: its metadata stand in front of the real ones on the path. What it
changed is taken away before our code runs.
"""

import os
import subprocess
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import transformers

from hf_llava_ft import releases
from hf_llava_ft.releases import newer_than_tried, sentence_for, warn_of_newer
from tests import warm_python

ROOT = Path(__file__).resolve().parents[2]
TRANSFORMERS_TRIED = ".".join(map(str, releases.TRIED["transformers"]))
NEXT_TRANSFORMERS = f"{releases.TRIED['transformers'][0]}.{releases.TRIED['transformers'][1] + 1}"


def write_metadata(folder: Path, **versions: str) -> None:
    for name, version in versions.items():
        metadata = folder / f"{name}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A function that makes Python believe in these versions, and in the newest that was tried of all others."""

    def install(**versions: str) -> Path:
        tried = {name: f"{major}.{minor}.0" for name, (major, minor) in releases.TRIED.items()}
        write_metadata(tmp_path / "newer", **tried | versions)
        monkeypatch.syspath_prepend(tmp_path / "newer")
        return tmp_path / "newer"

    return install


@pytest.mark.parametrize(
    "version", ["{next}.0", "{next}", "{next}.0.dev0", "{next}.0rc1", "{next}.0+local", "99", "5.100.0"]
)
def test_a_newer_minor_release_is_newer(installed, version):
    version = version.format(next=NEXT_TRANSFORMERS)
    installed(transformers=version)
    assert newer_than_tried() == {"transformers": version}


@pytest.mark.parametrize("version", ["{tried}.0", "{tried}.9", "{tried}.1.dev0", "{tried}.0+local", "5.9.0", "odd"])
def test_a_patch_an_older_or_an_unreadable_release_is_not(installed, version):
    installed(transformers=version.format(tried=TRANSFORMERS_TRIED))
    assert newer_than_tried() == {}


def warnings_of(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in caught]


def test_the_warning_names_all_versions_and_the_way_back(installed):
    installed(transformers="99.1.0", peft="98.2.0")
    (said,) = warnings_of(warn_of_newer)
    assert f"transformers 99.1.0 is newer than {TRANSFORMERS_TRIED} and peft 98.2.0 is newer than 0." in said
    assert "upgrade hf-llava-ft" in said and f'pip install "transformers<{NEXT_TRANSFORMERS}" "peft<0.' in said


def test_only_the_first_of_several_processes_warns(installed, monkeypatch):
    installed(transformers="99.1.0")
    monkeypatch.setenv("RANK", "1")
    assert warnings_of(warn_of_newer) == []
    monkeypatch.setenv("RANK", "0")
    assert len(warnings_of(warn_of_newer)) == 1


class FromHere:
    """Of a module that is none of the libraries'."""


def error_of(call) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("no error")


def wrapped():
    try:
        transformers.set_seed()
    except TypeError as error:
        raise RuntimeError("while something was built") from error


def import_missing_module():
    import transformers.modeling_no_such_module  # type: ignore[import-not-found]  # noqa: F401


def import_missing_name():
    from hf_llava_ft.errors import NoSuchName  # type: ignore[attr-defined]  # noqa: F401


OF_A_CHANGE = [
    lambda: transformers.set_seed(no_such_argument=1),
    lambda: transformers.set_seed(),
    lambda: transformers.set_seed(1, False, 3),
    lambda: transformers.set_seed(1, seed=1),
    lambda: transformers.NoSuchName,
    lambda: transformers.CLIPVisionConfig.no_such_name,
    lambda: transformers.CLIPVisionConfig().no_such_name,
    import_missing_module,
    import_missing_name,
    wrapped,
]
OF_ANYTHING_ELSE = [
    lambda: 1 + "1",
    lambda: [].no_such_name,
    lambda: FromHere().no_such_name,
    lambda: torch.no_such_name,
    lambda: __import__("no_such_module"),
    lambda: {}["missing"],
]


@pytest.mark.parametrize("call", OF_A_CHANGE)
def test_an_error_that_a_change_makes_is_told_in_one_sentence(installed, call):
    error = error_of(call)
    assert sentence_for(error) is None
    installed(transformers="99.1.0")
    sentence = sentence_for(error)
    assert "\n" not in sentence and str(error).split("\n")[0].rstrip(".") in sentence
    assert f"transformers 99.1.0 is newer than {TRANSFORMERS_TRIED}" in sentence


def test_the_traceback_comes_if_it_is_asked_for(installed, monkeypatch):
    installed(transformers="99.1.0")
    monkeypatch.setenv(releases.TRACEBACK_VARIABLE, "1")
    assert sentence_for(error_of(OF_A_CHANGE[0])) is None


@pytest.mark.parametrize("call", OF_ANYTHING_ELSE)
def test_any_other_error_keeps_its_traceback(installed, call):
    installed(transformers="99.1.0")
    error = error_of(call)
    assert sentence_for(error) is None, "".join(traceback.format_exception(error))


# ------------------------------------------------------------------------- whole processes

# Python runs a file of this name when it starts: transformers lost a name and an argument.
CHANGES = {
    "name": "import transformers.trainer_callback as changed\ndel changed.PrinterCallback\n",
    "argument": "import hf_llava_ft.checkpoints.opening as changed\n"
    "changed.load_processor = lambda model: None  # as if it took no more than that\n",
    "nothing": "",
}


def run(folder: Path, *arguments, change="nothing", **environment) -> subprocess.CompletedProcess:
    (folder / "sitecustomize.py").write_text(CHANGES[change])
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    for name in ("RANK", "LOCAL_RANK", "PYTHONWARNINGS"):
        environment.pop(name, None)
    return warm_python.run(list(map(str, arguments)), cwd=folder, env=environment)


def test_import_warns_once(installed):
    program = "import hf_llava_ft, hf_llava_ft.registration as r; r.register()"
    done = run(installed(transformers="99.1.0"), "-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("transformers 99.1.0 is newer than") == 1


# With all that it needs, or it ends before a library is imported.
WHAT_IT_NEEDS = ("--model_name_or_path", "m", "--data_path", "d", "--dry_run")
TRAINING = ("-m", "hf_llava_ft.train", *WHAT_IT_NEEDS)
COMMAND_TRAINING = ("-m", "hf_llava_ft.cli", "train", *WHAT_IT_NEEDS)
GENERATING = ("-m", "hf_llava_ft.cli", "generate", "--model", "nowhere", "--prompt", "Hello")


@pytest.mark.parametrize(
    ("words", "change", "error"),
    [
        pytest.param(TRAINING, "name", "'PrinterCallback'", marks=pytest.mark.new_python),  # one as users start it
        (COMMAND_TRAINING, "name", "'PrinterCallback'"),
        (GENERATING, "argument", "unexpected keyword argument"),
    ],
)
def test_a_command_ends_with_one_sentence(installed, words, change, error):
    folder = installed(transformers="99.1.0")
    done = run(folder, *words, change=change)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error in line and "transformers 99.1.0 is newer than" in line


@pytest.mark.parametrize(("words", "change"), [(TRAINING, "name"), (GENERATING, "argument")])
def test_the_traceback_comes_if_nothing_is_newer(installed, words, change):
    done = run(installed(), *words, change=change)
    assert done.returncode == 1 and "Traceback" in done.stderr and "is newer than" not in done.stderr


def test_bad_input_is_still_bad_input(installed):
    done = run(installed(transformers="99.1.0"), *GENERATING)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "nowhere" in line and "is newer than" not in line


def test_of_another_program_errors_stay_as_they_are(installed):
    done = run(installed(transformers="99.1.0"), "-c", "import hf_llava_ft\nhf_llava_ft.load_model(no_such=1)")
    assert done.returncode == 1 and "Traceback" in done.stderr and "error: " not in done.stderr


BROKEN_COMMAND = """
import sys
import hf_llava_ft.checkpoints.merge as broken
from hf_llava_ft.cli import main

broken.merge_adapter = None
sys.argv = ["llava-ft", "merge", "--adapter", "a", "--output_dir", "b"]
main()
"""


def test_the_last_line_below_a_traceback_asks_for_a_report(tmp_path):
    done = run(tmp_path, "-c", BROKEN_COMMAND)
    assert done.returncode == 1
    assert "TypeError" in done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("This should have been one sentence: please report it")
    assert f"transformers {transformers.__version__}" in lines[-1]
    assert sum("please report it" in line for line in lines) == 1
