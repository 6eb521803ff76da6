"""The conversation every reader produces, and the LLaVA and ShareGPT dialects translated into it.

A row in memory is plain data, whatever file it came from:

    {"id": "cat-1",
     "messages": [
         {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "\\nWhat is it?"}]},
         {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}],
     "images": ["cats/1.jpg"]}

An image is a place in the content; the n-th place belongs to the n-th image. An image is the path that the row gives,
or its bytes. No torch, no transformers and no datasets here: this module only knows what a conversation is.

What may surprise:
* A turn's only `<image>`, standing at its start or end, goes to the front as `<image>` + newline + the stripped text.
  That is how the original LLaVA trains (`preprocess_multimodal`), so its checkpoints expect it. It moves one from the
  middle there too, and collapses several to one; here those stay where the user wrote them.
* A row that could only train wrongly (an `<image>` in an answer, an empty answer, a question nobody answers) is
  refused. The original masks such a row, or moves the placeholder, and trains on.
* Of two equal keys in one JSON object the last wins, as in Python's json and so in the original.
* ShareGPT is LLaVA JSON with a few more spellings (`system` as a key, `role` and `content` in a turn), so one reader
  takes both.
"""

from typing import Any, TypedDict

from hf_llava_ft.data.values import ImageRef, clean_text, json_type, row_images
from hf_llava_ft.errors import UserError

IMAGE_PLACEHOLDER = "<image>"

# Exact case only, as in the original, where "Human" is a KeyError in the middle of training.
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_SPOKEN_ROLES = {"user": "human", "assistant": "assistant", "system": "system"}


class PlaceholderMismatch(UserError):
    """A row whose `<image>` placeholders and images differ in number."""


class WrongTurnOrder(UserError):
    """A row whose turns are not system, if any, then human and assistant by turns."""


class EmptyAnswer(UserError):
    """A row with an answer that says nothing."""


class MisplacedImage(UserError):
    """A row with `<image>` in an answer or a system turn."""


class Part(TypedDict):
    """One piece of a message: `{"type": "text", "text": str}` (never empty) or `{"type": "image", "text": None}`."""

    type: str
    text: str | None


class Message(TypedDict):
    """One turn: `role` is "system", "user" or "assistant"; `content` is empty for an empty human or system turn."""

    role: str
    content: list[Part]


class Row(TypedDict):
    """One conversation; `images` holds one path or picture per image part of `messages`, in reading order."""

    id: str
    messages: list[Message]
    images: list[ImageRef]


def row_place(where: str, number: int, row_id: Any = None) -> str:
    """How messages name a row: `data.json: row 3 (id 'cat')`. `number` starts at 1; no id, no parenthesis."""
    if row_id is None:
        return f"{where}: row {number}"
    shown = repr(row_id)
    return f"{where}: row {number} (id {shown if len(shown) <= 80 else shown[:77] + '...'})"


def parse_llava_row(row: dict[str, Any], where: str, number: int = 1) -> Row:
    """
    Translate one row of a LLaVA or ShareGPT file.

    Args:
        row (`dict`):
            `{"id": str | int, "image" or "images": image or list of images, "system": str, "conversations": [{"from":
            str, "value": str}]}`, of which only `conversations` is required. Roles are human or user, gpt or
            assistant, and system; a turn may also be `{"role": str, "content": str}`. An image is a path, or, out of
            a Parquet file, `{"path": str | None, "bytes": bytes | None}` or bytes. Other keys (mix665k's `model`) are
            ignored.
        where (`str`):
            The file's name, for messages.
        number (`int`, defaults to 1):
            The row's number in the file, counted from 1: for messages, and the id of a row that has none.

    Returns:
        `Row`: image paths as the row has them, not yet looked up.

    Raises:
        UserError: if the row can't be trained on as it stands; the sentence names row and turn.
    """
    row_id, place = identify_row(row, where, number)
    refuse_other_media(row, place)
    conversations = row.get("conversations")
    if conversations is None:
        raise UserError(
            f'{place} has no "conversations"; add the list of its turns, {{"from": "human", "value": "..."}}.'
        )
    if not isinstance(conversations, list):
        raise UserError(f'{place}: "conversations" is {json_type(conversations)}; make it a list of turns.')
    turns = [_turn(turn, turn_number, place) for turn_number, turn in enumerate(conversations, start=1)]
    return build_row(row_id, turns, row_images(row, place), place, system=system_key(row, place))


def build_row(
    row_id: str, turns: list[tuple[str, str]], images: list[ImageRef], place: str, system: str | None = None
) -> Row:
    """
    The row of a conversation whose texts hold `<image>` where an image stands; everything that could only train
    wrongly is refused here, whatever dialect it was written in.

    Args:
        row_id (`str`): the id.
        turns (`list[tuple[str, str]]`): (role, text); roles as in `Message`.
        images (`list[ImageRef]`): one per `<image>`, in reading order.
        place (`str`): [`row_place`], for messages.
        system (`str`, *optional*): the system turn, where it is no turn of the conversation but a key of the row.

    Raises:
        UserError: naming the turn.
    """
    _check_turns(turns, place)
    messages = []
    if system:
        if turns[0][0] == "system":
            raise UserError(f'{place} has both "system" and a system turn; keep one of them.')
        messages.append(Message(role="system", content=[_text(system)]))
    for turn_number, (role, text) in enumerate(turns, start=1):
        if role == "user":
            content = user_content(text)
        else:
            if IMAGE_PLACEHOLDER in text:
                kind = "an answer" if role == "assistant" else "the system turn"
                raise MisplacedImage(
                    f"{place}: turn {turn_number}, {kind}, holds {IMAGE_PLACEHOLDER}; "
                    "remove it, since images belong to human turns."
                )
            content = [_text(text)] if text else []
        messages.append(Message(role=role, content=content))

    num_placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    if num_placeholders != len(images):
        numbers = f"{_count(num_placeholders, f'{IMAGE_PLACEHOLDER} placeholder')} and {_count(len(images), 'image')}"
        raise PlaceholderMismatch(
            f"{place}: {numbers}; make the numbers equal, with one {IMAGE_PLACEHOLDER} in a human turn for each image."
        )
    return Row(id=row_id, messages=messages, images=images)


def identify_row(row: Any, where: str, number: int) -> tuple[str, str]:
    """
    Returns:
        `tuple[str, str]`: the row's id, its number if it has none; and how messages name it ([`row_place`]).

    Raises:
        UserError: if the row is no object, or its id neither text nor a whole number.
    """
    if not isinstance(row, dict):
        place = row_place(where, number)
        raise UserError(
            f'{place} is {json_type(row)}, not an object; write it as {{"id": ..., "conversations": [...]}}.'
        )
    return _row_id(row.get("id"), number, row_place(where, number)), row_place(where, number, row.get("id"))


def count_words(row: dict[str, Any]) -> int:
    """
    The original's measure of a row's length: whitespace-separated words over all turns, `<image>` included.

    It is the absolute value of the original's `modality_lengths`, computed from text alone, before tokens exist.

    Args:
        row (`dict`): a LLaVA JSON row that `parse_llava_row` accepts.
    """
    words = sum(len(turn.get("value", turn.get("content")).split()) for turn in row["conversations"])
    return words + len((row.get("system") or "").split())


def count_message_words(messages: list[Message]) -> int:
    """The measure of [`count_words`], for a row of any dialect: `<image>` counts as the text it is in LLaVA JSON."""
    texts = ("".join(part["text"] or IMAGE_PLACEHOLDER for part in message["content"]) for message in messages)
    return sum(len(text.split()) for text in texts)


def _row_id(value: Any, number: int, place: str) -> str:
    if value is None:
        return str(number)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise UserError(f'{place}: the "id" is {json_type(value)}; make it text or a whole number, or leave it out.')
    return clean_text(str(value), f'{place}: the "id"')


def system_key(row: dict[str, Any], place: str) -> str | None:
    """The system turn that ShareGPT writes as a key of the row, if there is one."""
    system = row.get("system")
    if system is None:
        return None
    if not isinstance(system, str):
        raise UserError(f'{place}: "system" is {json_type(system)}; make it text.')
    if IMAGE_PLACEHOLDER in system:
        raise MisplacedImage(f'{place}: "system" holds {IMAGE_PLACEHOLDER}; images belong to human turns.')
    return clean_text(system, f'{place}: "system"')


def refuse_other_media(row: dict[str, Any], place: str) -> None:
    """
    Raises:
        UserError: if the row comes with video or audio, which it would otherwise be trained without.
    """
    for key in ("video", "videos", "audio", "audios"):
        if row.get(key):
            raise UserError(f'{place} has "{key}", and only images can be trained on; remove the row.')


def _check_turns(turns: list[tuple[str, str]], place: str) -> None:
    """Refuses an order that can't be trained on: anything but system?, then user and assistant by turns."""
    if not any(role == "assistant" for role, _ in turns):
        raise WrongTurnOrder(f"{place} is a conversation without an answer; add a gpt turn or remove the row.")
    previous = None
    for number, (role, value) in enumerate(turns, start=1):
        if role == "system" and number > 1:
            raise WrongTurnOrder(
                f"{place}: turn {number} is a system turn; only the first turn may be one, so move or remove it."
            )
        if role == "assistant" and previous in (None, "system"):
            raise WrongTurnOrder(f"{place} begins with an assistant turn; put a human turn before it or remove it.")
        if role == previous:
            raise WrongTurnOrder(
                f"{place}: turns {number - 1} and {number} are both {_SPOKEN_ROLES[role]} turns; "
                "join them, or add the turn that is missing between them."
            )
        if role == "assistant" and not value.strip():
            raise EmptyAnswer(
                f"{place}: turn {number} is an empty answer; write the answer, or remove it with its question."
            )
        previous = role
    if previous != "assistant":
        raise WrongTurnOrder(f"{place} ends with a human turn that has no answer; add the answer or remove the turn.")


def _turn(turn: Any, number: int, place: str) -> tuple[str, str]:
    place = f"{place}: turn {number}"
    if not isinstance(turn, dict):
        raise UserError(f'{place} is {json_type(turn)}; write it as {{"from": "human" or "gpt", "value": "..."}}.')
    keys = ("role", "content") if "from" not in turn and "role" in turn else ("from", "value")
    for key in keys:
        if key not in turn:
            raise UserError(f'{place} has no "{key}"; write it as {{"from": "human" or "gpt", "value": "..."}}.')
        if not isinstance(turn[key], str):
            raise UserError(f'{place}: "{key}" is {json_type(turn[key])}; make it text.')
    return known_role(turn[keys[0]], place), clean_text(turn[keys[1]], place)


def known_role(name: str, place: str) -> str:
    """The role that `name` stands for in [`ROLES`]; a `UserError` if none."""
    role = ROLES.get(name)
    if role is None:
        raise UserError(f"{place} has the unknown role {name[:40]!r}; use human, gpt or, for the first turn, system.")
    return role


def user_content(value: str) -> list[Part]:
    """The parts of a human turn, whose text may hold `<image>`."""
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
