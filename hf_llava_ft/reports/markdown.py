"""Markdown of which no part can come from the text that is put into it."""

import re
import unicodedata

# Dots and colons only where an address could be made of them.
_MEANS_SOMETHING = re.compile(r"[#$&*<=>@\[\\\]^`{|}~_]|:(?=\S)|(?<!\d)\.(?=\S)|\.(?=[^\s\d])")
_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def escaped(text: str) -> str:
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
    return re.sub(r"^([-+]|\d+[.)](?=\s|$))", lambda found: "".join(f"&#{ord(char)};" for char in found[0]), line)


def table(header: list[str], rows: list[list[str]], numeric: frozenset[int] = frozenset()) -> str:
    """
    A table of cells that are Markdown already.

    Args:
        numeric: the columns that are aligned to the right.
    """
    rule = ["---:" if index in numeric else "---" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def code_block(language: str, code: str) -> str:
    """`code` as it stands, in a fence longer than any in it."""
    fence = "`" * max(3, *(len(found) + 1 for found in re.findall("`+", code)), 0)
    return f"{fence}{language}\n{code.strip()}\n{fence}"
