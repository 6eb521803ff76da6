"""JSON from outside, checked against a list of names and types: what does not fit is left out, and nothing raises.

A reader takes a value and returns it, or None if it has the wrong type.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

_WORD = re.compile(r"[\w.+-]{1,80}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TOO_LARGE = 1e18
MAX_TEXT = 200


def mapping(value: Any) -> dict[str, Any]:
    """`value`, or an empty one."""
    return value if isinstance(value, dict) else {}


def items(value: Any) -> list[Any]:
    """`value`, or an empty list."""
    return value if isinstance(value, list) else []


def known(value: Any, kinds: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    """What of a mapping has one of the names, and is of that kind."""
    found = {name: kind(mapping(value).get(name)) for name, kind in kinds.items()}
    return {name: each for name, each in found.items() if each is not None}


def each_known(values: Any, kinds: Mapping[str, Callable[[Any], Any]]) -> list[dict[str, Any]]:
    """[`known`] of each, for those that have the first of the names."""
    first = next(iter(kinds))
    found = [known(value, kinds) for value in items(values)]
    return [value for value in found if first in value]


def points(values: Any, width: int) -> list[list[float]]:
    """Those of the rows that are `width` numbers."""
    numbers = [[number(each) for each in items(row)] for row in items(values) if len(items(row)) == width]
    return [[each for each in row if each is not None] for row in numbers if None not in row]


def number(value: Any) -> float | None:
    """Finite, and of a size that can be shown."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and abs(value) < _TOO_LARGE else None  # NaN is not either


def count(value: Any) -> int | None:
    """A whole number from 0 on."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _TOO_LARGE else None


def flag(value: Any) -> bool | None:
    """True or False, and no number."""
    return value if isinstance(value, bool) else None


def word(value: Any) -> str | None:
    """Letters, digits and `_ . + -`, at most 80."""
    return value if isinstance(value, str) and _WORD.fullmatch(value) else None


def text(value: Any) -> str | None:
    """Without a slash, so that it is no path; its beginning, if it is long."""
    return value[:MAX_TEXT] if isinstance(value, str) and not re.search(r"[/\\~]", value) else None


def commit_hash(value: Any) -> str | None:
    """Of git, in full."""
    return value if isinstance(value, str) and _COMMIT.fullmatch(value) else None
