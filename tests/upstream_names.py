"""Which names of other libraries our code stands on that they may take away, found in the code; and whether they are
still there."""

import ast
import importlib
import inspect
import re
from collections import defaultdict
from collections.abc import Set as AbstractSet
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("hf_llava_ft", "modeling", "processing", "hub_scripts")
LIBRARIES = ("transformers", "peft", "accelerate", "datasets", "huggingface_hub")
# Of these only what is private.
STABLE_LIBRARIES = ("torch", "bitsandbytes", "deepspeed")
# Where the code says `object.name`, nothing tells whose object it is; the document has to.
UNKNOWN = "?"

# Attributes that a class has without anybody having written them.
_MADE_BY_PYTHON = {
    "__slotnames__",
    "__module__",
    "__doc__",
    "__qualname__",
    "__dict__",
    "__weakref__",
    "__annotations__",
} | {
    *("__parameters__", "__orig_bases__", "__abstractmethods__", "_abc_impl", "__firstlineno__"),
    *("__static_attributes__", "__annotations_cache__", "__annotate_func__", "__annotate__", "__hash__"),
    *("__dataclass_fields__", "__dataclass_params__", "__match_args__", "__replace__", "__eq__", "__repr__"),
}
# By `dataclass` and by `strict` of huggingface_hub, in classes that have fields.
_MADE_FOR_FIELDS = {"__init__", "__setattr__", "validate", "__validators__", "__class_validators__"}
# Private, and promised by Python's documentation.
_OF_PYTHON = {"__class__", "excepthook", "unraisablehook", "_exit", "_asdict", "_replace", "_fields"}


class Use(NamedTuple):
    """A name of theirs, such as `transformers.Trainer._save`, and what we do with it."""

    name: str
    kind: str


# ---------------------------------------------------------------------- what the code uses


def sources() -> dict[str, str]:
    """Our files by their path from the root, with slashes."""
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}


def written_uses(files: dict[str, str], overridden: AbstractSet[str] = frozenset()) -> dict[Use, set[str]]:
    """
    What stands in the source: imports from below the top of a library, private attributes, and assignments to
    attributes that are none of our own.

    Args:
        overridden: names that our classes define and that are theirs all the same.
    """
    trees = {file: ast.parse(source) for file, source in files.items()}
    own = set().union(*(_own_names(tree) for tree in trees.values())) - overridden
    uses: dict[Use, set[str]] = defaultdict(set)
    for file, tree in trees.items():
        theirs = _imported_objects(tree)
        for node in ast.walk(tree):
            for use in (*_imported(node), *_through_an_import(node, theirs), *_of_an_object(node, own, theirs)):
                uses[use].add(file)
    return uses


def all_uses(files: dict[str, str]) -> dict[Use, set[str]]:
    in_classes = class_uses(*own_classes(files))
    overridden = {use.name.rpartition(".")[2] for use in in_classes if use.kind == "overridden"}
    uses = defaultdict(set, in_classes)
    for use, where in written_uses(files, {name for name in overridden if _is_private(name)}).items():
        uses[use] |= where
    # A method that we override, we call too.
    known = {(use.name.rpartition(".")[2], file) for use, where in in_classes.items() for file in where}
    for use in [use for use in uses if use.name.startswith(f"{UNKNOWN}.") and use.kind == "private"]:
        uses[use] = {file for file in uses[use] if (use.name.rpartition(".")[2], file) not in known}
    return {use: where for use, where in uses.items() if where}


def class_uses(classes: list[type], file_of: dict[str, str]) -> dict[Use, set[str]]:
    """What `classes`, ours, take over from theirs: base classes, and attributes of a base that one of ours defines or
    sets. `file_of` says which modules are ours, and where they lie."""
    uses: dict[Use, set[str]] = defaultdict(set)
    for last in classes:
        line = last.__mro__
        for place, ours in enumerate(line):
            if ours.__module__ not in file_of:
                continue
            file = file_of[ours.__module__]
            for base in ours.__bases__:
                if _is_theirs(base):
                    uses[Use(public_name(base), "subclassed")].add(file)
            theirs = [base for base in line[place + 1 :] if _is_theirs(base, LIBRARIES)]
            made = _MADE_BY_PYTHON | (_MADE_FOR_FIELDS if "__dataclass_fields__" in vars(ours) else set())
            for attribute in vars(ours).keys() - made:
                base = next((base for base in theirs if hasattr(base, attribute)), None)
                # `object` has an __init__ too.
                if base is not None and getattr(base, attribute) is not getattr(object, attribute, base):
                    uses[Use(f"{public_name(base)}.{attribute}", "overridden")].add(file)
            for attribute in _set_on_self(ours) - vars(ours).keys():
                base = next((base for base in theirs if has_attribute(base, attribute)), None)
                if base is not None:
                    uses[Use(f"{public_name(base)}.{attribute}", "assigned")].add(file)
    return uses


def own_classes(files: dict[str, str]) -> tuple[list[type], dict[str, str]]:
    """All classes of ours, and the file of each of our modules."""
    file_of = {}
    for file in files:
        parts = Path(file).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts[-1] == "__main__":
            continue
        file_of[".".join(parts if parts[0] == "hf_llava_ft" else ("hf_llava_ft", *parts))] = file
    modules = [importlib.import_module(name) for name in file_of]
    members = [member for module in modules for member in vars(module).values()]
    return [each for each in dict.fromkeys(_classes(members)) if each.__module__ in file_of], file_of


def _classes(members: list[Any]) -> list[type]:
    return [member for member in members if isinstance(member, type)]


def _own_names(tree: ast.AST) -> set[str]:
    """Functions, classes, arguments, variables and attributes that this file defines."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_name(node.value, "self"):
            names.add(node.attr)
    return names


def _imported_objects(tree: ast.AST) -> dict[str, str]:
    """Local names of their modules and classes: `import datasets as d` gives `{"d": "datasets"}`."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and (module := _by_import_module(node.value)):
            aliases |= {target.id: module for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if _library(alias.name):
                    name = alias.name if alias.asname else alias.name.split(".")[0]
                    aliases[alias.asname or name] = name
        elif isinstance(node, ast.ImportFrom) and not node.level and _library(node.module or ""):
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return aliases


def _by_import_module(node: ast.AST) -> str | None:
    """Of `import_module("peft.utils")` the name of the module, where it is one of theirs."""
    is_call = isinstance(node, ast.Call) and _is_name(node.func, "import_module") and len(node.args) == 1
    name = node.args[0].value if is_call and isinstance(node.args[0], ast.Constant) else None
    return name if isinstance(name, str) and _library(name) else None


def _imported(node: ast.AST) -> list[Use]:
    if isinstance(node, ast.Attribute) and (module := _by_import_module(node.value)):
        return _deep(f"{module}.{node.attr}")
    if not isinstance(node, ast.ImportFrom) or node.level:
        return []
    names = [f"{node.module}.{alias.name}" for alias in node.names]
    # What is taken out of a module is found where it is taken.
    return [use for name in names for use in _deep(name) if not isinstance(_found(name), ModuleType)]


def _through_an_import(node: ast.AST, theirs: dict[str, str]) -> list[Use]:
    chain = _chain(node)
    if chain is None or chain[0] not in theirs:
        return []
    first, rest = theirs[chain[0]], ".".join(chain[1:])
    found = _found(first)
    if isinstance(found, ModuleType):
        return _deep(f"{first}.{rest}")
    is_class = isinstance(found, type) and _library(found.__module__)
    return [Use(f"{public_name(found)}.{rest}", "private")] if is_class and any(map(_is_private, chain)) else []


def _deep(name: str) -> list[Use]:
    library = _library(name)
    parts = name.split(".")
    if library is None:
        return []
    if any(_is_private(part) for part in parts):
        return [Use(name, "private")]
    # `datasets.Split.TRAIN` is an attribute of a class at the top.
    is_deep = len(parts) > 2 and isinstance(_found(".".join(parts[:2])), ModuleType)
    return [Use(name, "reached")] if is_deep and library in LIBRARIES else []


def _of_an_object(node: ast.AST, own: set[str], theirs: dict[str, str]) -> list[Use]:
    if isinstance(node, ast.Attribute):
        chain = _chain(node)
        if chain is not None and chain[0] in theirs:
            return []
        is_stored, name, value = isinstance(node.ctx, ast.Store), node.attr, node.value
    elif (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("getattr", "hasattr", "setattr", "delattr")
        and isinstance(node.args[1], ast.Constant)
    ):
        is_stored, name, value = node.func.id == "setattr", str(node.args[1].value), node.args[0]
    elif isinstance(node, ast.keyword) and _is_private(node.arg or ""):
        is_stored, name, value = False, str(node.arg), node.value
    else:
        return []
    if name in own or name in _OF_PYTHON:
        return []
    if is_stored and not _is_name(value, "self"):
        return [Use(f"{UNKNOWN}.{name}", "assigned")]
    return [Use(f"{UNKNOWN}.{name}", "private")] if _is_private(name) else []


def _set_on_self(ours: type) -> set[str]:
    try:
        tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(ours)))
    except (OSError, SyntaxError):  # made at run time: a NamedTuple's base, say
        return set()
    stored = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    return {node.attr for node in stored if _is_name(node.value, "self")}


def _chain(node: ast.AST) -> list[str] | None:
    """`a.b.c` as a list; `None` where it does not begin with a plain name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) and parts else None


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _library(name: str) -> str | None:
    top = name.split(".")[0]
    return top if top in (*LIBRARIES, *STABLE_LIBRARIES) else None


def _is_theirs(kind: type, libraries: tuple[str, ...] = (*LIBRARIES, *STABLE_LIBRARIES)) -> bool:
    parts = kind.__module__.split(".")
    if parts[0] in STABLE_LIBRARIES and not any(_is_private(part) for part in (*parts, kind.__name__)):
        # torch.nn.Module lies in a private file, and is public.
        return False
    return parts[0] in libraries and not (parts[0] in STABLE_LIBRARIES and _is_exported(kind))


def _is_exported(kind: type) -> bool:
    parts = kind.__module__.split(".")
    above = [".".join(parts[:end]) for end in range(1, len(parts)) if not any(map(_is_private, parts[:end]))]
    return any(getattr(_found(name), kind.__name__, None) is kind for name in above)


# ---------------------------------------------------------------------- what a library has


def public_name(kind: type) -> str:
    """`transformers.Trainer` for what lies in `transformers.trainer`."""
    top = kind.__module__.split(".")[0]
    is_exported = getattr(importlib.import_module(top), kind.__name__, None) is kind
    return f"{top if is_exported else kind.__module__}.{kind.__name__}"


def is_there(name: str) -> bool:
    """Whether the installed libraries have `name`."""
    owner, _, attribute = name.rpartition(".")
    if _found(name) is not None:
        return True
    found = _found(owner)
    if isinstance(found, type):
        return has_attribute(found, attribute)
    return callable(found) and attribute in inspect.signature(found).parameters


@cache
def _found(name: str) -> Any:
    """Module, class, function or class attribute; `None` if there is none."""
    parts = name.split(".")
    found: Any = None
    for end, part in enumerate(parts, start=1):
        # First the attribute, as `from datasets.utils import tqdm` does it: there is a module of that name too.
        found = getattr(found, part, None)
        if found is None:
            try:
                found = importlib.import_module(".".join(parts[:end]))
            except ImportError:
                return None
    return found


@cache
def has_attribute(kind: type, attribute: str) -> bool:
    """Whether instances of `kind` have it: in the class, or set on `self` in the source of the class or a base."""
    if hasattr(kind, attribute) or attribute in getattr(kind, "__dataclass_fields__", {}):
        return True
    if any(attribute in vars(base).get("__annotations__", {}) for base in kind.__mro__):
        return True
    if attribute in getattr(kind, "SPECIAL_TOKENS_ATTRIBUTES", ()):  # of a tokenizer, through __getattr__
        return True
    # A quantizer sets it on the model that it is given.
    written = re.compile(rf"\bself\.{attribute}\b[^=\n]*=[^=]|\bsetattr\(model, \"{attribute}\"")
    return any(written.search(_source(base)) for base in kind.__mro__ if base is not object)


@cache
def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""
