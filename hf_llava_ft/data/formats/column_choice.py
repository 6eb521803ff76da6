"""What `--columns` says: of a table's columns, which is the picture, the question and the answer.

    choice = parse_choice(["image=img,prompt=question", "b.tsv:response=text"])
    given_for(choice, "b.tsv", ["img", "question", "text"], is_only_one=False)     # {"response": ("text",)} and others

Not what the columns hold, nor what is found without being named (`columns.py`).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from hf_llava_ft.data.formats.columns import EXAMPLE, ROLES, Given, listed, role_of
from hf_llava_ft.data.values import json_type
from hf_llava_ft.errors import UserError


class ColumnChoice(NamedTuple):
    """
    What `--columns` says.

    Args:
        everywhere (`dict`): for each dataset that has all of these columns.
        of_dataset (`dict[str, dict]`): by the dataset's name in `--data_path`, without split and weight.
        is_inherited (`bool`): it was said of other data, and need not fit these.
    """

    everywhere: Given = {}
    of_dataset: Mapping[str, Given] = {}
    is_inherited: bool = False


# As `--columns` is written, or a recipe has it.
SaidOfColumns = str | Sequence[str] | Mapping[str, Any] | ColumnChoice | None


def parse_choice(columns: SaidOfColumns) -> ColumnChoice:
    """
    Args:
        columns: `image=img,prompt=question,response=answer`; `a.csv:prompt=...` for one dataset of a mixture; a list
            of such; or a mapping, also as JSON. `image=left+right` are two pictures, and `image=` is none.

    Raises:
        UserError: if it is not written so.
    """
    if columns is None or isinstance(columns, ColumnChoice):
        return columns or ColumnChoice()
    everywhere: dict[str, tuple[str, ...]] = {}
    of_dataset: dict[str, dict[str, tuple[str, ...]]] = {}
    words: list[Any] = [columns] if isinstance(columns, (str, Mapping)) else list(columns)
    for word in words:
        for dataset, role, value in _said(word):
            chosen = everywhere if dataset is None else of_dataset.setdefault(dataset, {})
            _choose(chosen, role, value)
    return ColumnChoice(everywhere, of_dataset)


def _said(word: Any) -> Iterable[tuple[str | None, str, Any]]:
    """(dataset, role, column or columns) of one word or mapping."""
    if isinstance(word, str) and word.lstrip().startswith("{"):
        try:
            word = json.loads(word)
        except ValueError:
            raise UserError(f"--columns {word} is no JSON; write {EXAMPLE}.") from None
    if isinstance(word, Mapping):
        for name, value in word.items():
            if isinstance(value, Mapping):
                yield from ((str(name), str(role), inner) for role, inner in value.items())
            elif name not in ROLES and isinstance(value, str) and "=" in value:
                yield from _said(f"{name}:{value}")
            else:
                yield None, str(name), value
        return
    dataset = None
    for piece in str(word).split(","):
        head, equals, value = piece.partition("=")
        if not equals:
            raise UserError(f"--columns: {piece.strip()!r} names no column; write {EXAMPLE}.")
        name, colon, role = head.rpartition(":")
        dataset = name.strip() if colon else dataset
        yield dataset, role.strip(), value.strip()


def _choose(chosen: dict[str, tuple[str, ...]], role: str, value: Any) -> None:
    if role not in ROLES:
        meant = role_of(role)
        hint = f"; write {meant}= for {role!r}" if meant else ""
        raise UserError(f"--columns: {role!r} is none of {', '.join(ROLES)}{hint}.")
    names = value.split("+") if isinstance(value, str) else [] if value is None else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"--columns: {role} is {json_type(value)}; write the name of a column.")
    names = [name.strip() for name in names if name.strip()]
    if role in chosen and chosen[role] != tuple(names):
        raise UserError(f"--columns: {role} is given twice; keep one, or join columns of pictures, image=left+right.")
    if len(names) > 1 and role != "image":
        raise UserError(f"--columns: {role} is one column and not {listed(names)}; choose one of them.")
    if not names and role == "response":
        raise UserError("--columns: response has no column, and the answers are what is learned; name it.")
    chosen[role] = tuple(names)


def given_for(choice: ColumnChoice, path: str, names: Sequence[str], is_only_one: bool) -> Given:
    """
    What is said of a dataset.

    Args:
        path (`str`): its name in `--data_path`.
        names (`list[str]`): its columns.
        is_only_one (`bool`): there is no other dataset that could be meant.

    Returns:
        `dict`: columns by role; of a mixture, what is said of all is for those that have all of these columns.
    """
    of_this = choice.of_dataset.get(path, {})
    is_meant = is_only_one and not choice.is_inherited
    if not is_meant and not of_this:
        # A dataset that holds whole conversations has no other columns to choose from.
        is_meant = not {"conversations", "messages"} & {*names} and all(
            name in names for columns in choice.everywhere.values() for name in columns
        )
    return {**choice.everywhere, **of_this} if is_meant else of_this
