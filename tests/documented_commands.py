"""The commands that the documentation shows."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
# A block of code, and what is said of it: `<!-- not run ...: the reason -->` on the line above it.
_BLOCK = re.compile(r"(?:<!-- (not run[^\n]*) -->\n)?```(\w*)\n(.*?)```", re.DOTALL)
_PROGRAM = re.compile(r"^(?:\$ )?(?:\.venv/bin/)?llava-ft (?=[a-z])")


@dataclass(frozen=True)
class Command:
    """
    Args:
        words (`list[str]`): behind `llava-ft`.
        not_run (`str`): why no test runs it; empty where one should.
    """

    page: str
    words: list[str]
    not_run: str = ""


def commands_in(page: Path) -> list[Command]:
    """Those that stand in blocks of code."""
    found = []
    for not_run, language, block in _BLOCK.findall(page.read_text(encoding="utf-8")):
        if language in ("", "bash", "console"):
            lines = block.replace("\\\n", " ").splitlines()
            found += [Command(page.name, words, not_run) for line in lines for words in _words(line)]
    return found


def inline_commands_in(page: Path) -> list[Command]:
    """Those that stand in a sentence, between backticks."""
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    return [Command(page.name, words) for code in re.findall(r"`([^`\n]+)`", text) for words in _words(code)]


def _words(line: str) -> list[list[str]]:
    if (program := _PROGRAM.match(line)) is None:
        return []
    try:
        return [shlex.split(line[program.end() :], comments=True)]
    except ValueError:  # half a command, to show its beginning
        return []
