"""A recipe: the settings of a run in a YAML file, under the names of the command line's flags."""

import json
import re
from collections.abc import Collection, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from hf_llava_ft.errors import UserError
from hf_llava_ft.settings.flags.wrong_names import meant_by

_NAMES_OF_COLUMNS = ("columns", "eval_columns")


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which takes a key that stands there twice for a mistake."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def split_recipe(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe, if the first word is none of the flags, and the other words."""
    words = list(argv)
    for index, word in enumerate(words):
        if re.match(r"--local[_-]rank=", word):
            continue  # the launcher of DeepSpeed puts it in front
        return (None, words) if word.startswith("-") else (word, words[:index] + words[index + 1 :])
    return None, words


def read_recipe(path: str | Path, known: Collection[str]) -> dict[str, list[str]]:
    """
    The settings in the file, each as the words that would stand behind its flag: `{"learning_rate": ["1e-3"]}`. A
    setting without a value, or `null`, is left to its default.

    Args:
        known (`Collection[str]`): the names a recipe may hold.

    Raises:
        UserError: if the file cannot be read, is no mapping of names to values, or holds an unknown name.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        content, written = yaml.load(text, Loader=_Loader), yaml.load(text, Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the recipe {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"the recipe {path}{place}: {getattr(error, 'problem', None) or error}.") from error
    if content is None:
        content, written = {}, {}
    if not isinstance(content, dict):
        raise UserError(f"the recipe {path} holds a {type(content).__name__} and not lines of the form name: value.")
    for name in content:
        if name not in known:
            meant = meant_by(str(name), known)
            hint = f"did you mean {meant}?" if meant else "llava-ft train --help-all lists all names."
            raise UserError(f"the recipe {path} holds {name!r}, which is not a setting: {hint}")
    return {name: as_words(name, value, written.get(name)) for name, value in content.items() if value is not None}


def as_words(name: str, value: Any, written: Any = None) -> list[str]:
    """
    The words that would stand behind the flag of a setting.

    Args:
        value: from Python, or as YAML takes it: `no` is false, `1.10` is 1.1, `2026-11-28` is a date.
        written (*optional*): of YAML, the same with every scalar as the text that stands there.
    """
    if value is False and name.endswith("_strategy"):
        return ["no"]  # which YAML takes for false
    if isinstance(value, dict):
        return [json.dumps(written if name in _NAMES_OF_COLUMNS and written else value)]
    if isinstance(value, (list, tuple)):
        each = written if isinstance(written, list) else [None] * len(value)
        return [word for item, text in zip(value, each, strict=True) for word in as_words(name, item, text)]
    if isinstance(value, Enum):
        value = value.value
    return [_text(value, written)]


def _text(value: Any, written: Any) -> str:
    """What stands there, but where only YAML can read it: `on`, `true`, `.inf`, `0x10`."""
    if not isinstance(written, str) or (isinstance(value, bool) and written.lower() not in ("yes", "no")):
        return str(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            float(written)
        except ValueError:
            return written if ":" in written else str(value)  # to YAML 1:30 is 90
    return written
