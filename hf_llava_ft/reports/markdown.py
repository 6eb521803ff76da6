"""Markdown of which no part can come from the text that is put into it.

A card is a template of huggingface_hub, whose jinja2 escapes nothing. So a template gets its values from
[`card_values`], which escapes every text but [`Markdown`].
"""

import re
import unicodedata
from dataclasses import fields, is_dataclass
from typing import Any

from jinja2 import UndefinedError

# Dots and colons only where an address could be made of them.
_MEANS_SOMETHING = re.compile(r"[#$&*<=>@\[\\\]^`{|}~_]|:(?=\S)|(?<!\d)\.(?=\S)|\.(?=[^\s\d])")
_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Markdown(str):
    """Text that is Markdown already: made here, or of names that were checked."""


class _Named(dict[str, Any]):
    """To jinja2 an entry that is missing is empty; here it is an error."""

    def __missing__(self, name: str) -> Any:
        raise UndefinedError(f"the template names {name!r}, and there are {', '.join(map(repr, self))}")


def card_values(value: Any) -> Any:
    """
    `value` with all text escaped but [`Markdown`], at any depth of dictionaries, dataclasses, lists and tuples.

    Raises:
        TypeError: for anything else but numbers and None, since nobody knows what it would say.
    """
    if value is None or isinstance(value, (bool, int, float, Markdown)):
        return value
    if isinstance(value, str):
        return escaped(value)
    if isinstance(value, (list, tuple)):
        return [card_values(each) for each in value]
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict):
        return _Named((name, card_values(each)) for name, each in value.items())
    raise TypeError(f"a card shows text and numbers, and no {type(value).__name__}: {value!r}")


def escaped(text: str) -> Markdown:
    """
    `text` as one line that stands for itself in a paragraph, a list or the cell of a table.

    What could mean something to Markdown or HTML becomes a character reference, which neither reads as its own signs.
    Control characters, and those that turn the direction of the text after them, are left out.
    """
    shown = (
        char
        for char in " ".join(text.split())
        if char not in _DIRECTIONS and (char.isprintable() or unicodedata.category(char) == "Cf")
    )
    line = _MEANS_SOMETHING.sub(lambda found: f"&#{ord(found[0])};", "".join(shown))
    # At the beginning of a line a sign or a number makes a list.
    return Markdown(
        re.sub(r"^([-+]|\d+[.)](?=\s|$))", lambda found: "".join(f"&#{ord(char)};" for char in found[0]), line)
    )


def code_span(text: str) -> Markdown:
    """`text` in the letters of code, in a paragraph, a list or the cell of a table."""
    # Between backticks nothing can be escaped.
    return Markdown(f"`{text}`" if re.fullmatch(r"[\w.+-]+", text) else f"<code>{escaped(text)}</code>")


def fence(*code: str) -> Markdown:
    """What begins and ends a block of code that holds `code`: longer than any in it."""
    return Markdown("`" * max(3, *(len(found) + 1 for each in code for found in re.findall("`+", each)), 0))
