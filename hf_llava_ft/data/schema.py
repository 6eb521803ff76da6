"""The conversation every reader produces, and the LLaVA JSON dialect translated into it.

A row in memory is plain data, whatever file it came from:

    {"id": "cat-1",
     "messages": [
         {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "\\nWhat is it?"}]},
         {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}],
     "images": ["cats/1.jpg"]}

An image is a place in the content; the n-th place belongs to the n-th path. No torch, no transformers and no datasets
here: this module only knows what a conversation is.

What may surprise:
* A turn's only `<image>`, standing at its start or end, goes to the front as `<image>` + newline + the stripped text.
  That is how the original LLaVA trains (`preprocess_multimodal`), so its checkpoints expect it. It moves one from the
  middle there too, and collapses several to one; here those stay where the user wrote them.
* A row that could only train wrongly (an `<image>` in an answer, an empty answer, a question nobody answers) is
  refused. The original masks such a row, or moves the placeholder, and trains on.
* Of two equal keys in one JSON object the last wins, as in Python's json and so in the original.
"""

import re
from typing import Any, TypedDict

from hf_llava_ft.errors import UserError

IMAGE_PLACEHOLDER = "<image>"

# Exact case only, as in the original, where "Human" is a KeyError in the middle of training.
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_SPOKEN_ROLES = {"user": "human", "assistant": "assistant", "system": "system"}

_SURROGATE = re.compile("[\ud800-\udfff]")


class Part(TypedDict):
    """One piece of a message: `{"type": "text", "text": str}` (never empty) or `{"type": "image", "text": None}`."""

    type: str
    text: str | None


class Message(TypedDict):
    """One turn: `role` is "system", "user" or "assistant"; `content` is empty for an empty human or system turn."""

    role: str
    content: list[Part]


class Row(TypedDict):
    """One conversation; `images` holds one path per image part of `messages`, in reading order."""

    id: str
    messages: list[Message]
    images: list[str]


def row_place(where: str, number: int, row_id: Any = None) -> str:
    """How messages name a row: `data.json: row 3 (id 'cat')`. `number` starts at 1; no id, no parenthesis."""
    if row_id is None:
        return f"{where}: row {number}"
    shown = repr(row_id)
    return f"{where}: row {number} (id {shown if len(shown) <= 80 else shown[:77] + '...'})"


def parse_llava_row(row: dict[str, Any], where: str, number: int = 1) -> Row:
    """
    Translate one row of a LLaVA JSON file.

    Args:
        row (`dict`):
            `{"id": str | int, "image" or "images": str | list[str], "conversations": [{"from": str, "value": str}]}`,
            of which only `conversations` is required. Roles are human or user, gpt or assistant, and system. Other
            keys (mix665k's `model`) are ignored.
        where (`str`):
            The file's name, for messages.
        number (`int`, defaults to 1):
            The row's number in the file, counted from 1: for messages, and the id of a row that has none.

    Returns:
        `Row`: image paths as the row has them, not yet looked up.

    Raises:
        `UserError`: if the row can't be trained on as it stands; the sentence names row and turn.
    """
    if not isinstance(row, dict):
        place = row_place(where, number)
        raise UserError(
            f'{place} is {json_type(row)}, not an object; write it as {{"id": ..., "conversations": [...]}}.'
        )
    row_id = _row_id(row.get("id"), number, row_place(where, number))
    place = row_place(where, number, row.get("id"))

    images = _image_paths(row, place)
    messages = []
    for turn_number, (role, value) in enumerate(_turns(row, place), start=1):
        if role == "user":
            content = _user_content(value)
        else:
            if IMAGE_PLACEHOLDER in value:
                kind = "an answer" if role == "assistant" else "the system turn"
                raise UserError(
                    f"{place}: turn {turn_number}, {kind}, holds {IMAGE_PLACEHOLDER}; "
                    "remove it, since images belong to human turns."
                )
            content = [_text(value)] if value else []
        messages.append(Message(role=role, content=content))

    num_placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    if num_placeholders != len(images):
        numbers = f"{_count(num_placeholders, f'{IMAGE_PLACEHOLDER} placeholder')} and {_count(len(images), 'image')}"
        raise UserError(
            f"{place}: {numbers}; make the numbers equal, with one {IMAGE_PLACEHOLDER} in a human turn for each image."
        )
    return Row(id=row_id, messages=messages, images=images)


def count_words(row: dict[str, Any]) -> int:
    """
    The original's measure of a row's length: whitespace-separated words over all turns, `<image>` included.

    It is the absolute value of the original's `modality_lengths`, computed from text alone, before tokens exist.

    Args:
        row (`dict`): a LLaVA JSON row that `parse_llava_row` accepts.
    """
    return sum(len(turn["value"].split()) for turn in row["conversations"])


def json_type(value: Any) -> str:
    """The JSON name of a Python value's type, with its article, for messages."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a Python {type(value).__name__}")


def _row_id(value: Any, number: int, place: str) -> str:
    if value is None:
        return str(number)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise UserError(f'{place}: the "id" is {json_type(value)}; make it text or a whole number, or leave it out.')
    return _clean(str(value), f'{place}: the "id"')


def _image_paths(row: dict[str, Any], place: str) -> list[str]:
    # null and an empty list say "no image": data frames export text-only rows that way.
    given = []
    for key in ("image", "images"):
        value = row.get(key)
        if value is None:
            continue
        paths = value if isinstance(value, list) else [value]
        for path in paths:
            if not isinstance(path, str):
                raise UserError(f'{place}: "{key}" holds {json_type(path)}; give the image\'s path as text.')
            if not path.strip():
                raise UserError(f'{place}: "{key}" holds an empty path; write the image\'s path or remove "{key}".')
            _clean(path, f'{place}: "{key}"')
        given.append(paths)
    if len(given) == 2 and given[0] != given[1]:
        raise UserError(f'{place} has both "image" and "images", and they differ; keep one of them.')
    return list(given[0]) if given else []


def _turns(row: dict[str, Any], place: str) -> list[tuple[str, str]]:
    """(role, value) of each turn, in an order that can be trained on: system?, then user and assistant by turns."""
    conversations = row.get("conversations")
    if conversations is None:
        raise UserError(
            f'{place} has no "conversations"; add the list of its turns, {{"from": "human", "value": "..."}}.'
        )
    if not isinstance(conversations, list):
        raise UserError(f'{place}: "conversations" is {json_type(conversations)}; make it a list of turns.')

    turns = [_turn(turn, number, place) for number, turn in enumerate(conversations, start=1)]
    if not any(role == "assistant" for role, _ in turns):
        raise UserError(f"{place} is a conversation without an answer; add a gpt turn or remove the row.")
    previous = None
    for number, (role, value) in enumerate(turns, start=1):
        if role == "system" and number > 1:
            raise UserError(
                f"{place}: turn {number} is a system turn; only the first turn may be one, so move or remove it."
            )
        if role == "assistant" and previous in (None, "system"):
            raise UserError(f"{place} begins with an assistant turn; put a human turn before it or remove it.")
        if role == previous:
            raise UserError(
                f"{place}: turns {number - 1} and {number} are both {_SPOKEN_ROLES[role]} turns; "
                "join them, or add the turn that is missing between them."
            )
        if role == "assistant" and not value.strip():
            raise UserError(
                f"{place}: turn {number} is an empty answer; write the answer, or remove it with its question."
            )
        previous = role
    if previous != "assistant":
        raise UserError(f"{place} ends with a human turn that has no answer; add the answer or remove the turn.")
    return turns


def _turn(turn: Any, number: int, place: str) -> tuple[str, str]:
    place = f"{place}: turn {number}"
    if not isinstance(turn, dict):
        raise UserError(f'{place} is {json_type(turn)}; write it as {{"from": "human" or "gpt", "value": "..."}}.')
    for key in ("from", "value"):
        if key not in turn:
            raise UserError(f'{place} has no "{key}"; write it as {{"from": "human" or "gpt", "value": "..."}}.')
        if not isinstance(turn[key], str):
            raise UserError(f'{place}: "{key}" is {json_type(turn[key])}; make it text.')
    role = ROLES.get(turn["from"])
    if role is None:
        raise UserError(
            f"{place} has the unknown role {turn['from'][:40]!r}; use human, gpt or, for the first turn, system."
        )
    return role, _clean(turn["value"], place)


def _clean(text: str, place: str) -> str:
    # Both pass through json and then break a C string, a file name or Arrow's UTF-8, far from the row that holds them.
    if "\x00" in text:
        raise UserError(f"{place} holds a NUL character (\\u0000); remove it.")
    if not text.isascii() and _SURROGATE.search(text):
        raise UserError(
            f"{place} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character; remove it."
        )
    return text


def _user_content(value: str) -> list[Part]:
    pieces = value.split(IMAGE_PLACEHOLDER)
    if len(pieces) == 2 and not (pieces[0].strip() and pieces[1].strip()):
        text = (pieces[0] + pieces[1]).strip()
        pieces = ["", "\n" + text if text else ""]
    content: list[Part] = []
    for index, piece in enumerate(pieces):
        if index:
            content.append(Part(type="image", text=None))
        if piece:
            content.append(_text(piece))
    return content


def _text(text: str) -> Part:
    return Part(type="text", text=text)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
