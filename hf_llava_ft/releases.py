"""The newest releases of other libraries that this version was tested with, and the warning about newer ones.

We subclass inside these libraries, where a minor release may rename what we use. With a newer one a warning
appears when the package is imported, and again if a command ends with an error that such a change may cause.
"""

import os
import platform
import re
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType, TracebackType

from packaging.version import InvalidVersion, Version

# The suite passed with these. pyproject.toml allows one minor release more; tests/test_lock.py compares the two.
TRIED = {"transformers": (5, 24), "peft": (0, 21), "accelerate": (1, 15), "datasets": (5, 2)}
# Set, to any text: a traceback comes in spite of the sentence.
TRACEBACK_VARIABLE = "HF_LLAVA_FT_TRACEBACK"

_OURS = ("hf_llava_ft", "transformers_modules")  # the second: code that came with a checkpoint
_WHERE_NAMES_MOVE = (*TRIED, "huggingface_hub", *_OURS)
_WRONG_ARGUMENTS = re.compile(
    r"unexpected keyword argument|invalid keyword argument|missing \d+ required|multiple values for"
    r"|takes (no|from|at most|at least|exactly|\d+)\b.* argument"
)


def newer_than_tried() -> dict[str, str]:
    """The installed version of each library of [`TRIED`] whose minor release is newer; imports none of them."""
    newer = {}
    for name, tried in TRIED.items():
        try:
            installed = version(name)
            if Version(installed).release[:2] > tried:
                newer[name] = installed
        except (PackageNotFoundError, InvalidVersion):
            continue
    return newer


def _what_is_newer(newer: dict[str, str]) -> str:
    each = (f"{name} {installed} is newer than {TRIED[name][0]}.{TRIED[name][1]}" for name, installed in newer.items())
    return f"{' and '.join(each)}, the newest that this hf-llava-ft was tried with"


def _what_to_do(newer: dict[str, str]) -> str:
    older = " ".join(f'"{name}<{TRIED[name][0]}.{TRIED[name][1] + 1}"' for name in newer)
    return f"upgrade hf-llava-ft, or go back: pip install {older}"


def warn_of_newer() -> None:
    """Warns if a library is newer than tried; of several processes, only in the first."""
    newer = newer_than_tried()
    # As machine.is_first_process, which this must not import: it brings torch.
    if newer and int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) <= 0:
        warnings.warn(f"{_what_is_newer(newer)}. If something fails, {_what_to_do(newer)}", stacklevel=2)


def is_of_a_changed_library(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, is of the kind that a renamed or removed name makes."""
    while error is not None:
        if isinstance(error, TypeError) and _WRONG_ARGUMENTS.search(str(error)):
            return True
        if isinstance(error, ImportError) and _is_where_names_move(error.name):
            return True
        if isinstance(error, AttributeError) and _is_where_names_move(_module_of(getattr(error, "obj", None))):
            return True
        error = error.__cause__
    return False


def _is_where_names_move(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] in _WHERE_NAMES_MOVE


def _module_of(thing: object) -> str:
    if isinstance(thing, ModuleType):
        return thing.__name__
    return (thing if isinstance(thing, type) else type(thing)).__module__


def sentence_for(error: BaseException) -> str | None:
    """What is said instead of the traceback of `error`; `None` if the traceback is to come."""
    if os.environ.get(TRACEBACK_VARIABLE) or not is_of_a_changed_library(error):
        return None
    newer = newer_than_tried()
    if not newer:
        return None
    what = " ".join(str(error).split()).rstrip(".")
    return (
        f"{type(error).__name__}: {what}. That may be because {_what_is_newer(newer)}. What to do: "
        f"{_what_to_do(newer)} (with {TRACEBACK_VARIABLE}=1 the traceback is shown)"
    )


def report_request() -> str:
    """What stands below a traceback."""
    found = {}
    for name in ("hf-llava-ft", "torch", *TRIED):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    versions = ", ".join(f"{name} {number}" for name, number in found.items())
    return (
        f"This should have been one sentence: please report it, with the lines above and these versions: {versions}, "
        f"Python {platform.python_version()} on {platform.system()} {platform.machine()}."
    )


_ASKING: list[object] = []  # hooks that do it already


def ask_for_report_when_uncaught() -> None:
    """The traceback of the error that is about to leave the program is followed by [`report_request`]."""
    shown_otherwise = sys.excepthook
    if shown_otherwise in _ASKING:
        return

    def show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        shown_otherwise(kind, error, traceback)
        if isinstance(error, Exception):
            print(report_request(), file=sys.stderr)

    _ASKING.append(show)
    sys.excepthook = show


def say_it_of_uncaught_errors() -> None:
    """For a process that is a program of ours from its start, whose imports may fail too."""
    ask_for_report_when_uncaught()
    shown_otherwise = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        sentence = sentence_for(error)
        if sentence is None:
            shown_otherwise(kind, error, traceback)
        else:
            print(f"error: {sentence}", file=sys.stderr)

    _ASKING.append(show)
    sys.excepthook = show
