"""Many conversations as text, without running a template for each.

Our own templates look at nothing of a text but whether it is empty, the blanks at its ends and `<image>` in it. So
what a template writes around the texts is the same for all conversations of one shape: the roles, the places of
images, the blanks at the ends of texts. It is rendered once for each shape, with a stand-in for every text, and kept.
Any other template is run for every row, and so is ours where a text holds `<image>`.

The result is that of `LlavaProcessor.render`, which stays the one that renders.
"""

import re
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from hf_llava_ft.processing.chat_templates_llava import takes_texts_as_they_are
from hf_llava_ft.processing.processing_llava import LlavaProcessor

Turn = tuple[str, list[str | None]]  # role, and texts; None is an image
Rendered = tuple[str, list[tuple[int, int]]]

_FIRST, _LAST = 0xE000, 0xF8FF  # characters that mean nothing, each the stand-in of a text
_STAND_INS = re.compile(f"([{chr(_FIRST)}-{chr(_LAST)}])")
_MAX_SHAPES = 10_000


class _Frame(NamedTuple):
    """
    What a template writes around texts.

    Args:
        literals (`list[str]`): what stands before, between and after them.
        slots (`list[int]`): which of the texts follows each literal but the last.
        borders (`list[tuple[int, int]]`): of each place where a span begins or ends, how many slots are before it,
            and its distance from the start with each of them counted as nothing.
        num_images (`int`): image tokens among the literals.
    """

    literals: list[str]
    slots: list[int]
    borders: list[tuple[int, int]]
    num_images: int


class ConversationTexts:
    """
    Args:
        processor (`LlavaProcessor`): renders.
    """

    def __init__(self, processor: LlavaProcessor):
        self._processor = processor
        self._has_frames = takes_texts_as_they_are(str(processor.chat_template))
        self._frames: dict[tuple[Any, ...], _Frame | None] = {}

    def render(self, turns: list[Turn]) -> Rendered:
        """
        As `LlavaProcessor.render`.

        Raises:
            ValueError: if the template does not take the conversation.
        """
        framed = self._framed(turns) if self._has_frames else None
        return self._processor.render(messages_of(turns)) if framed is None else framed

    def _framed(self, turns: list[Turn]) -> Rendered | None:
        """None where it takes the template itself."""
        shape: list[Any] = []
        texts: list[str] = []
        for role, parts in turns:
            shape.append(role)
            for part in parts:
                if part is None:
                    shape.append(None)
                elif part and not part[0].isspace() and not part[-1].isspace():
                    shape.append(_BARE)
                    texts.append(part)
                else:
                    stripped = part.strip()
                    start = part.find(stripped) if stripped else len(part)
                    shape.append((part[:start], bool(stripped), part[start + len(stripped) :]))
                    if stripped:
                        texts.append(stripped)
        key = tuple(shape)
        try:
            frame = self._frames[key]
        except KeyError:
            if len(self._frames) >= _MAX_SHAPES:
                self._frames.clear()
            frame = self._frames[key] = self._frame(turns)
        if frame is None:
            return None
        pieces, ends = [frame.literals[0]], [0]
        end = 0
        for slot, literal in zip(frame.slots, frame.literals[1:], strict=True):
            pieces += (texts[slot], literal)
            end += len(texts[slot])
            ends.append(end)
        text = "".join(pieces)
        if text.count(self._processor.image_token) != frame.num_images:
            return None
        places = [ends[slots] + place for slots, place in frame.borders]
        return text, list(zip(places[::2], places[1::2], strict=True))

    def _frame(self, turns: list[Turn]) -> _Frame | None:
        """None where the template takes no such conversation; what it says then is for `render` to find."""
        number = 0
        stood_in: list[Turn] = []
        for role, parts in turns:
            stood_in.append((role, []))
            for part in parts:
                if part is not None and (stripped := part.strip()):
                    if _FIRST + number > _LAST:
                        return None
                    start = part.find(stripped)
                    part = part[:start] + chr(_FIRST + number) + part[start + len(stripped) :]
                    number += 1
                stood_in[-1][1].append(part)
        try:
            text, spans = self._processor.render(messages_of(stood_in))
        except ValueError:
            return None
        pieces = _STAND_INS.split(text)
        borders = []
        for span in spans:
            for place in span:
                slots = len(_STAND_INS.findall(text, 0, place))
                borders.append((slots, place - slots))
        slots_of = [ord(piece) - _FIRST for piece in pieces[1::2]]
        return _Frame(pieces[::2], slots_of, borders, text.count(self._processor.image_token))


_BARE = ("", True, "")


def turns_of(messages: pa.ChunkedArray | pa.Array) -> list[list[Turn]] | None:
    """
    The conversations of a column `messages` of `FEATURES` (`data/builder.py`), in Python; None if one is of another
    make. A nested column's own `to_pylist` takes ten times as long.
    """
    if isinstance(messages, pa.ChunkedArray):
        messages = messages.combine_chunks()
    try:
        turns = messages.flatten()
        parts = turns.field("content").flatten()
        roles, kinds, texts = (
            column.to_pylist() for column in (turns.field("role"), parts.field("type"), parts.field("text"))
        )
        num_turns, num_parts = (
            pc.list_value_length(column).to_pylist() for column in (messages, turns.field("content"))
        )
    except (AttributeError, KeyError, pa.ArrowException):
        return None
    if None in num_turns or None in num_parts or None in roles or not set(kinds) <= {"text", "image"}:
        return None
    if [kind == "image" for kind in kinds] != [text is None for text in texts]:
        return None
    conversations, turn, part = [], 0, 0
    for number in num_turns:
        conversation: list[Turn] = []
        for place in range(turn, turn + number):
            following = part + num_parts[place]
            conversation.append((roles[place], texts[part:following]))
            part = following
        turn += number
        conversations.append(conversation)
    return conversations


def messages_of(turns: list[Turn]) -> list[dict[str, Any]]:
    """A conversation as rows have it."""
    return [
        {
            "role": role,
            "content": [{"type": "image" if text is None else "text", "text": text} for text in parts],
        }
        for role, parts in turns
    ]
