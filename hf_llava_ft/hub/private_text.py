"""What must not be published with a model: paths of this machine, which tell who works here on what, and tokens."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from hf_llava_ft.errors import UserError

# Of the Hub, GitHub, OpenAI and Amazon.
_TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36,}|sk-[A-Za-z0-9_-]{32,}|AKIA[0-9A-Z]{16})\b")
_HOME = re.compile(r"/(?:home|Users)/[^/\s\"'<>]+/|[A-Za-z]:\\{1,2}Users\\")
# Words of a language, among which may be anything that looks like a path.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
_TEXT = (".json", ".jinja", ".md", ".txt", ".py", "")
_MAX_HEADER = 100_000_000


def check_nothing_private(staged: Path, source: Path) -> None:
    """
    Args:
        staged (`Path`): the folder that goes to the Hub.
        source (`Path`): where it comes from.

    Raises:
        UserError: if a text, or what a file of weights says of itself, holds a token or a folder of this machine.
    """
    folders = {str(path) for path in (source.resolve(), staged.resolve(), Path.home()) if len(path.parts) > 2}
    token = get_token()
    for path in sorted(path for path in staged.rglob("*") if path.is_file()):
        name = path.relative_to(staged).as_posix()
        text = _text_of(path)
        if (token and token in text) or _TOKEN.search(text):
            raise UserError(f"{source}: {name} holds an access token: remove it, and create a new one.")
        found = next((folder for folder in folders if folder in text), None)
        if found is None and path.name not in _VOCABULARIES:
            match = _HOME.search(text)
            found = match[0] if match else _folder_in_settings(text) if path.suffix == ".json" else None
        if found is not None:
            raise UserError(
                f"{source}: {name} names {found!r}, a folder of this machine, which nobody else should read: take it "
                f"out of the file."
            )


def _text_of(path: Path) -> str:
    if path.suffix in _TEXT:
        return path.read_text(encoding="utf-8", errors="replace")
    with open(path, "rb") as file:
        if path.suffix == ".safetensors":
            length = int.from_bytes(file.read(8), "little")
            return file.read(min(length, _MAX_HEADER)).decode("utf-8", errors="replace")
        return file.read().decode("latin-1") if path.suffix in (".bin", ".model") else ""


def _folder_in_settings(text: str) -> str | None:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return next((value for value in _strings(content) if _is_folder_here(value)), None)


def _is_folder_here(value: str) -> bool:
    if not value.startswith("/") or value.count("/") < 2 or len(value) > 1000 or "\0" in value:
        return False
    try:
        return Path(value).exists()
    except OSError:
        return False


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


def without_token(text: str) -> str:
    """`text`, in which no token can be read."""
    token = get_token()
    if token:
        text = text.replace(token, "***")
    return _TOKEN.sub("***", text)
