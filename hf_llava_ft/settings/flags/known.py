"""The flags of `llava-ft train`, read from the source that declares them.

Importing them takes the seconds that torch and transformers take. A mistyped flag is to be told at once, so the two
dataclasses that need these libraries, ours and transformers' `TrainingArguments`, are read and not run.
"""

import ast
import dataclasses
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hf_llava_ft.settings.arguments import DataArguments, ModelArguments, TuningArguments
from hf_llava_ft.settings.original_table import FLAGS, SWITCHES, SWITCHES_OF_NEXT

OF_THE_PARSER = {
    "preset": "Begin with the flags of a recipe of LLaVA-1.5.",
    "dry_run": "Print all settings as JSON, and where each comes from, and stop: no weights or data are loaded.",
}
_OF_THE_ORIGINAL = {*FLAGS, *SWITCHES, *SWITCHES_OF_NEXT}


@dataclass(frozen=True)
class Flag:
    """
    Args:
        name (`str`): without dashes.
        kind (`str`): the annotation, as it is written.
        help (`str`): empty where the source composes it.
        default: None where there is none, or where the source composes it.
    """

    name: str
    kind: str
    help: str = ""
    default: Any = None

    @property
    def choices(self) -> list[str]:
        """The words that it may be; empty where any will do."""
        kind = self.kind.removesuffix(" | None").removeprefix("Optional[")
        if not kind.startswith("Literal["):
            return []
        return kind.removeprefix("Literal[").rstrip("]").replace("'", "").replace('"', "").split(", ")


@cache
def own_flags() -> dict[str, Flag]:
    """Those that this package declares, transformers' own that it declares anew among them."""
    found = {}
    for part in (ModelArguments, DataArguments, TuningArguments):
        for field in dataclasses.fields(part):
            if field.init:
                default = None if field.default is dataclasses.MISSING else field.default
                kind = field.type if isinstance(field.type, str) else _written(field.type)
                found[field.name] = Flag(field.name, kind, field.metadata["help"], default)
    return found | _declared_in(Path(__file__).parent.with_name("training_arguments.py"), "LlavaTrainingArguments")


@cache
def flags_of_transformers() -> dict[str, Flag]:
    """Those of the installed `TrainingArguments`; empty if its source is not there to be read."""
    package = importlib.util.find_spec("transformers")  # found, and not imported
    for folder in (package and package.submodule_search_locations) or ():
        return _declared_in(Path(folder, "training_args.py"), "TrainingArguments")
    return {}


def is_known(name: str) -> bool:
    """Whether `llava-ft train` takes `--name`; true also where that cannot be known without importing transformers."""
    theirs, ours = flags_of_transformers(), own_flags()
    every = ours.keys() | theirs.keys() | OF_THE_PARSER.keys() | _OF_THE_ORIGINAL
    name = name.replace("-", "_")
    return not theirs or name in every or name.removeprefix("no_") in every


def all_names() -> set[str]:
    """What may stand in a recipe too."""
    return {*own_flags(), *flags_of_transformers(), "preset", *_OF_THE_ORIGINAL}


def _written(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def _declared_in(path: Path, class_name: str) -> dict[str, Flag]:
    """The fields of a dataclass that a command line may set."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return {}
    found = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef) or node.name != class_name:
            continue
        for line in node.body:
            if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
                continue
            given = {each.arg: each.value for each in line.value.keywords} if isinstance(line.value, ast.Call) else {}
            if _literal(given.get("init")) is False:
                continue
            default = _literal(given["default"] if "default" in given else line.value)
            words = _literal(given.get("metadata"))
            text = words.get("help", "") if isinstance(words, dict) else ""
            found[line.target.id] = Flag(line.target.id, ast.unparse(line.annotation), " ".join(text.split()), default)
    return found


def _literal(node: ast.AST | None) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except (ValueError, TypeError):
        return None
