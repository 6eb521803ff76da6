"""The Dockerfile and the conda environment speak of what is there. They are built where Docker and conda are: the
former in continuous integration."""

import json
import re
import shlex
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from tests.test_packaging import BUILT_FROM

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "examples" / "docker" / "Dockerfile"
KNOWN = {"FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT", "CMD"}


def instructions(text: str) -> list[tuple[str, str]]:
    lines = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines if line.strip()]


def ignored(name: str) -> bool:
    """By the rules of Docker: the last pattern that fits decides; a folder stands for what is in it."""
    patterns = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    result = False
    for pattern in patterns:
        bare = pattern.lstrip("!").removeprefix("**/")
        parts = (name, *(str(parent) for parent in Path(name).parents), *Path(name).parts)
        if pattern and not pattern.startswith("#") and any(fnmatch(part, bare) for part in parts):
            result = not pattern.startswith("!")
    return result


def complaints(text: str) -> list[str]:
    found, there, commands = [], set(), {}
    for word, rest in instructions(text):
        if word not in KNOWN:
            found.append(f"unknown instruction {word}")
        if word == "COPY":
            *sources, _ = rest.split()
            there.update(sources)
            found += [f"COPY {name}: not in the tree" for name in sources if not (ROOT / name).exists()]
            found += [f"COPY {name}: left out by Dockerfile.dockerignore" for name in sources if ignored(name)]
        if word == "RUN":
            if subprocess.run(["sh", "-n", "-c", rest], capture_output=True).returncode:
                found.append(f"RUN {rest}: no shell command")
            for name in re.findall(r"(?:--requirement|python) (\S+?)(?:;|\s|$)", rest):
                if (
                    not any(name == each or name.startswith(f"{each}/") for each in there)
                    or not (ROOT / name).exists()
                ):
                    found.append(f"RUN {rest}: {name} is not there yet")
            if shlex.split(rest)[-1] == "." and not set(BUILT_FROM) <= there:
                found.append(f"RUN {rest}: what the package is built from was not copied")
        if word in ("ENTRYPOINT", "CMD"):
            commands[word] = json.loads(rest)
    command = [*commands.get("ENTRYPOINT", []), *commands.get("CMD", [])]
    if command[:1] != ["llava-ft"]:
        found.append(f"{command} is not our command")
    return found


def test_every_file_and_command_of_the_dockerfile_is_there():
    text = DOCKERFILE.read_text(encoding="utf-8")
    assert complaints(text) == []
    *_, (_, command) = instructions(text)
    words = json.loads(command)
    shown = subprocess.run(
        [sys.executable, "-m", "hf_llava_ft", words[0], "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert shown.returncode == 0 and words[1] in shown.stdout
    paths = [line.split()[1] for line in text.splitlines() if line.startswith("COPY hf_llava_ft")]
    assert paths == ["hf_llava_ft"] and not ignored("hf_llava_ft/cli/__init__.py") and ignored("tests/conftest.py")


@pytest.mark.parametrize(
    "right, wrong, told",
    [
        ("COPY modeling modeling\n", "", "what the package is built from was not copied"),
        ("requirements/venv.txt", "requirements/all.txt", "requirements/all.txt is not there yet"),
        ("COPY requirements", "COPY tests", "left out by Dockerfile.dockerignore"),
        ('["llava-ft"]', '["llava"]', "is not our command"),
        ("; fi &&", " &&", "no shell command"),
    ],
)
def test_a_dockerfile_with_a_mistake_is_noticed(right, wrong, told):
    text = DOCKERFILE.read_text(encoding="utf-8")
    assert right in text
    assert told in " ".join(complaints(text.replace(right, wrong)))


def test_the_conda_environment_has_the_pytorch_of_make_venv():
    environment = yaml.safe_load((ROOT / "examples" / "conda" / "environment.yml").read_text(encoding="utf-8"))
    *plain, pip = environment["dependencies"]
    assert [re.split("[=<>]", name)[0] for name in plain] == ["python", "pip"]
    torch = [line for line in (ROOT / "requirements/torch.txt").read_text().splitlines() if not line.startswith("#")]
    assert pip == {"pip": torch}
