"""What a row may look like, whatever file holds it: six dialects, each translated to the one `Row`.

| dialect | recognised by the keys |
| --- | --- |
| LLaVA, ShareGPT | `conversations` |
| messages | `messages` |
| prompt/completion | `prompt` and `completion` |
| image-caption | an image (`file_name` or `image`) and `text` or `caption` |
| preference | `chosen` and `rejected`, which `check` reads and training refuses |

and a table of one's own, whose columns are named or have usual names (`columns.py`).

What may surprise:
* Where a row of the messages or prompt/completion dialect has images and no place for them at all, they go to the
  front of the first human turn, a line each. TRL does so with such rows, and its datasets are written that way.
* In typed parts, `{"type": "image"}` is the place; the word `<image>` beside it in a text is refused, since no reader
  could tell whether it is meant.
* Every answer is learned. TRL would learn the completion alone, so a prompt that holds answers is refused.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from hf_llava_ft.data.formats.columns import Columns
from hf_llava_ft.data.schema import (
    IMAGE_PLACEHOLDER,
    Row,
    build_row,
    identify_row,
    known_role,
    parse_llava_row,
    refuse_other_media,
    system_key,
)
from hf_llava_ft.data.values import ImageRef, clean_text, image_ref, json_type, row_images
from hf_llava_ft.errors import UserError

CAPTION_IMAGE_KEYS = ("file_name", "image", "images")
CAPTION_KEYS = ("text", "caption")


class Dialect(NamedTuple):
    """
    Args:
        name (`str`): in words, for messages.
        parse (`Callable`): (raw row, file for messages, row number from 1) to `Row`; raises `UserError`.
        columns (`Columns`, *optional*): of a table of one's own, what is read.
    """

    name: str
    parse: Callable[[Any, str, int], Row]
    columns: Columns | None = None


def detect_dialect(row: Any) -> Dialect | None:
    """The dialect that a raw row is written in, by its keys; None if it is none of them."""
    if not isinstance(row, dict):
        return None
    keys = {key for key, value in row.items() if value is not None}
    if "conversations" in keys:
        return SHAREGPT if _is_sharegpt(row) else LLAVA
    if "messages" in keys:
        return MESSAGES
    if {"chosen", "rejected"} <= keys:
        return PREFERENCE
    if {"prompt", "completion"} <= keys:
        return PROMPT_COMPLETION
    if keys & set(CAPTION_IMAGE_KEYS) and keys & set(CAPTION_KEYS):
        return IMAGE_CAPTION
    return None


def _is_sharegpt(row: dict[str, Any]) -> bool:
    turns = row["conversations"]
    roles = isinstance(turns, list) and any(isinstance(turn, dict) and "role" in turn for turn in turns)
    return roles or bool(row.get("system")) or (isinstance(row.get("images"), list) and row.get("image") is None)


def parse_messages_row(row: Any, where: str, number: int = 1) -> Row:
    """
    Translate a row of `messages`, as chat templates take them.

    Args:
        row (`dict`):
            `{"id", "messages": [{"role", "content"}], "images": [...], "system"}`. Content is text with `<image>` in
            it, or a list of parts: `{"type": "text", "text"}`, `{"type": "image"}` (the next of `images`, or the one
            at its `index`), an image part with its own `image`, `path`, `url` or `base64`, or OpenAI's `{"type":
            "image_url", "image_url": {"url"}}`.
        where (`str`): the file's name, for messages.
        number (`int`): the row's number from 1.

    Raises:
        UserError: if the row can't be trained on; the sentence names row and turn.
    """
    row_id, place = identify_row(row, where, number)
    return _row_of_messages(row_id, row, _messages(row.get("messages"), f'{place}: "messages"'), place)


def parse_prompt_completion_row(row: Any, where: str, number: int = 1) -> Row:
    """
    Translate a row of `prompt` and `completion`, each text or a list of messages, with `image` or `images`.

    Raises:
        UserError: if the row can't be trained on; also if the prompt holds answers, which would be learned too.
    """
    row_id, place = identify_row(row, where, number)
    prompt, completion = _said(row, "prompt", place), _said(row, "completion", place)
    if any(message.get("role") in ("assistant", "gpt") for message in prompt):
        raise UserError(
            f'{place}: "prompt" holds an answer, and every answer is learned here; write the row as "messages" if it '
            "is to be learned, or leave it out."
        )
    return _row_of_messages(row_id, row, prompt + completion, place)


def parse_preference_row(row: Any, where: str, number: int = 1) -> Row:
    """The conversation that ends in the chosen answer; the other one is checked too ([`parse_preference`])."""
    return parse_preference(row, where, number)[0]


def parse_preference(row: Any, where: str, number: int = 1) -> tuple[Row, Row]:
    """
    Check a row of `prompt`, `chosen` and `rejected`, each text or a list of messages, with `image` or `images`.

    Returns:
        The conversation with the chosen answer, and that with the rejected one.

    Raises:
        UserError: if one of the two is no conversation that can be trained on, or they are the same.
    """
    row_id, place = identify_row(row, where, number)
    prompt = _said(row, "prompt", place)
    chosen, rejected = _said(row, "chosen", place), _said(row, "rejected", place)
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        if len(answer) != 1 or answer[0].get("role") not in ("assistant", "gpt"):
            raise UserError(f'{place}: "{key}" is not one answer; write what both begin with as "prompt".')
    preferred, other = (
        _row_of_messages(row_id, row, prompt + answer, f'{place}, with "{key}"')
        for key, answer in (("chosen", chosen), ("rejected", rejected))
    )
    if preferred["messages"] == other["messages"]:
        raise UserError(f'{place}: "chosen" and "rejected" are the same, so that nothing is preferred; change one.')
    return preferred, other


def _said(row: dict[str, Any], key: str, place: str) -> list[dict[str, Any]]:
    """The messages under `key`; a text is the user's under `prompt`, and else an answer."""
    value = row.get(key)
    if value is None:
        raise UserError(f'{place} has no "{key}"; add it, as text or as a list of messages.')
    if isinstance(value, str):
        value = [{"role": "user" if key == "prompt" else "assistant", "content": value}]
    return _messages(value, f'{place}: "{key}"')


def parse_image_caption_row(row: Any, where: str, number: int = 1) -> Row:
    """
    Translate an image with a caption, as `metadata.csv` of an `imagefolder` has it: the human turn is the image alone,
    and the caption is the answer, as in the first stage of LLaVA's training.

    Args:
        row (`dict`): `{"file_name" or "image": image, "text" or "caption": str}`.

    Raises:
        UserError: if image or caption is missing.
    """
    row_id, place = identify_row(row, where, number)
    refuse_other_media(row, place)
    images = row_images(row, place, CAPTION_IMAGE_KEYS)
    if len(images) != 1:
        raise UserError(f'{place} has {len(images)} images; give a caption\'s row one, as "file_name" or "image".')
    captions = [(key, row[key]) for key in CAPTION_KEYS if row.get(key) is not None]
    if not captions:
        raise UserError(f'{place} has no caption; add it as "text" or "caption".')
    if len(captions) == 2 and captions[0][1] != captions[1][1]:
        raise UserError(f'{place} has both "text" and "caption", and they differ; keep one of them.')
    key, caption = captions[0]
    if not isinstance(caption, str):
        raise UserError(f'{place}: "{key}" is {json_type(caption)}; make it text.')
    turns = [("user", IMAGE_PLACEHOLDER), ("assistant", clean_text(caption, f'{place}: "{key}"'))]
    return build_row(row_id, turns, images, place)


LLAVA = Dialect("LLaVA", parse_llava_row)
SHAREGPT = Dialect("ShareGPT", parse_llava_row)
MESSAGES = Dialect("messages", parse_messages_row)
PROMPT_COMPLETION = Dialect("prompt/completion", parse_prompt_completion_row)
IMAGE_CAPTION = Dialect("image-caption", parse_image_caption_row)
PREFERENCE = Dialect("preference", parse_preference_row)


def own_table(columns: Columns) -> Dialect:
    """The dialect of a table whose columns are known."""
    return Dialect("image-caption table" if columns.prompt is None else "question/answer", columns.parse, columns)


def _messages(value: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise UserError(f'{place} is {json_type(value)}; make it a list of {{"role": ..., "content": ...}}.')
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise UserError(
                f'{place}: turn {number} is {json_type(message)}; write it as {{"role": ..., "content": ...}}.'
            )
    return value


def _row_of_messages(row_id: str, row: dict[str, Any], messages: list[dict[str, Any]], place: str) -> Row:
    refuse_other_media(row, place)
    column = row_images(row, place)
    turns: list[tuple[str, str]] = []
    sources: list[ImageRef | int | None] = []  # of each place: its own image, its index among `images`, or the next
    for number, message in enumerate(messages, start=1):
        turn = f"{place}: turn {number}"
        if not isinstance(message.get("role"), str):
            raise UserError(f'{turn}: "role" is {json_type(message.get("role"))}; make it user, assistant or system.')
        if message.get("tool_calls"):
            raise UserError(f"{turn} calls a tool, which can't be trained on here; remove the row.")
        text, own = _content(message.get("content"), turn)
        turns.append((known_role(message["role"], turn), text))
        sources += own

    if column and not sources:
        first = next((index for index, (role, _) in enumerate(turns) if role == "user"), None)
        if first is not None:
            turns[first] = ("user", f"{IMAGE_PLACEHOLDER}\n" * len(column) + turns[first][1])
            sources = [None] * len(column)
    return build_row(row_id, turns, _in_reading_order(sources, column, place), place, system=system_key(row, place))


def _in_reading_order(sources: list[ImageRef | int | None], column: list[ImageRef], place: str) -> list[ImageRef]:
    images: list[ImageRef] = []
    used: set[int] = set()
    following = 0
    for source in sources:
        if source is None:
            source, following = following, following + 1
            if source >= len(column):
                break  # too few: build_row names both numbers
        if isinstance(source, int):
            if not 0 <= source < len(column):
                raise UserError(f'{place}: an image part has the index {source}, and "images" has {len(column)}.')
            used.add(source)
            source = column[source]
        images.append(source)
    # Those that no place asks for are counted too, so that the numbers do not agree.
    return images + [image for index, image in enumerate(column) if index not in used]


def _content(content: Any, place: str) -> tuple[str, list[ImageRef | int | None]]:
    """A message's text with `<image>` where an image stands, and what each of the images is."""
    if isinstance(content, str):
        return clean_text(content, place), [None] * content.count(IMAGE_PLACEHOLDER)
    if not isinstance(content, list):
        raise UserError(f'{place}: "content" is {json_type(content)}; make it text or a list of parts.')
    texts, pieces, sources = "", [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts += part["text"]
            pieces.append(clean_text(part["text"], place))
        elif kind in ("image", "image_url"):
            pieces.append(IMAGE_PLACEHOLDER)
            sources.append(_part_image(part, place))
        else:
            shown = f"a part of type {kind[:40]!r}" if isinstance(kind, str) else f"a part that is {json_type(part)}"
            raise UserError(
                f'{place} holds {shown}; a part is {{"type": "text", "text": "..."}} or {{"type": "image"}}.'
            )
    if IMAGE_PLACEHOLDER in texts:
        if sources:
            raise UserError(f"{place} holds {IMAGE_PLACEHOLDER} in a text beside image parts; remove the word.")
        sources = [None] * texts.count(IMAGE_PLACEHOLDER)
    return "".join(pieces), sources


def _part_image(part: dict[str, Any], place: str) -> ImageRef | int | None:
    # In Parquet every part has every key of every other part, as null.
    address = part.get("image_url")
    if isinstance(address, dict):
        address = address.get("url")
    if part["type"] == "image_url" and address is None:
        raise UserError(f'{place}: an image_url part has no address; write {{"image_url": {{"url": "..."}}}}.')
    encoded = part.get("base64")
    if isinstance(encoded, str):
        return image_ref(f"data:image;base64,{encoded}", place)
    for value in (address, *(part.get(key) for key in ("image", "path", "url"))):
        if value is not None:
            return image_ref(value, place)
    index = part.get("index")
    if index is None:
        return None
    if isinstance(index, bool) or not isinstance(index, int):
        raise UserError(f'{place}: the "index" of an image part is {json_type(index)}; make it a whole number.')
    return index
