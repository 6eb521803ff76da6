"""The tables of docs/upstream.md, and where they and the code differ."""

import re
from typing import NamedTuple

from tests.upstream_names import ROOT, UNKNOWN, Use, is_there

DOCUMENT = ROOT / "docs" / "upstream.md"
KINDS = ("private", "reached", "subclassed", "overridden", "assigned")


class Row(NamedTuple):
    uses: tuple[Use, ...]
    files: frozenset[str]
    tried: str
    line: int


def documented(text: str) -> list[Row]:
    """
    The rows of the tables: names, files, kind, why, releases tried, what is lost.

    A name such as `transformers.Trainer.{evaluate, train}` stands for several.
    """
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("| `") or len(cells) != 6:
            continue
        names, files, kind, _, tried, _ = cells
        uses = [Use(name, kind) for found in re.findall(r"`([^`]+)`", names) for name in _expanded(found)]
        rows.append(Row(tuple(uses), frozenset(re.findall(r"`([^`]+)`", files)), tried, number))
    return rows


def _expanded(name: str) -> list[str]:
    grouped = re.fullmatch(r"(.+)\{(.+)\}(.*)", name)
    return [f"{grouped[1]}{part.strip()}{grouped[3]}" for part in grouped[2].split(",")] if grouped else [name]


def missing_rows(uses: dict[Use, set[str]], rows: list[Row]) -> list[str]:
    """What the code uses and no row says."""
    return sorted(
        f"`{use.name}` in {file} ({use.kind})"
        for use, files in uses.items()
        for file in files
        if not any(file in row.files and any(_agree(use, each) for each in row.uses) for row in rows)
    )


def stale_rows(uses: dict[Use, set[str]], rows: list[Row]) -> list[str]:
    """What rows say and the code does not, names and files. A row of "only" some releases is no debt in others."""
    stale = []
    for row in rows:
        found: set[str] = set()
        is_partly = row.tried.startswith("only ")
        for each in row.uses:
            files = {file for use, where in uses.items() if _agree(use, each) for file in where} & row.files
            found |= files
            if not files and not (is_partly and not is_there(each.name)):
                stale.append(f"line {row.line}: `{each.name}` ({each.kind})")
        if not is_partly:
            stale += [f"line {row.line}: {file}, which uses none of its names" for file in sorted(row.files - found)]
    return stale


def _agree(use: Use, row: Use) -> bool:
    if use.kind != row.kind:
        return False
    owner, _, attribute = use.name.rpartition(".")
    return use.name == row.name or (owner == UNKNOWN and row.name.endswith(f".{attribute}"))
