"""Rows as the model sees them, for `--preview N`: the text it reads, with what it learns marked.

In a terminal the learned text is green; elsewhere it stands between [[ and ]]. The marks come from the labels
themselves, token by token, mapped back onto the text of the tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from hf_llava_ft.checking.images import stored_sizes
from hf_llava_ft.data.formats import Source
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.processing_llava import LlavaProcessor

LEARNED_STYLE = "bold green"
_IMAGE_STYLE = "cyan"
_PLACE_STYLE = "bold"
MAX_CHARS = 4000  # of a row; one of a hundred pages is no preview


class Piece(NamedTuple):
    """
    A stretch of a row's text.

    Args:
        text (`str`): as the chat template writes it; of an image, its placeholder.
        learned (`bool`): whether the loss is computed on its tokens.
        image_tokens (`int`): of an image, how many placeholders it takes; 0 for text.
    """

    text: str
    learned: bool
    image_tokens: int = 0


def marked_pieces(
    processor: LlavaProcessor, messages: list[dict[str, Any]], image_sizes: Sequence[tuple[int, int]] = ()
) -> list[Piece]:
    """
    A conversation's text in stretches that are learned or not.

    Args:
        image_sizes: `(height, width)` of each picture; needed only where the number of placeholders depends on it.

    Returns:
        `list[Piece]`: their texts joined are what the model reads, with one placeholder an image, and with the token
        that the tokenizer puts in front of it.

    Raises:
        ValueError: if the chat template does not take the conversation.
    """
    text, spans = processor.render(messages)
    [(ids, supervised)] = processor.tokenize_rendered([(text, spans)])
    adds_bos = not processor.begins_with_bos(text)
    encoding = processor.tokenizer(text, add_special_tokens=adds_bos, return_offsets_mapping=True, verbose=False)
    learned = [False] * len(text)
    begun = 0  # where the tokens so far end: what a tokenizer leaves out of its offsets belongs to the next token
    for (start, end), is_learned in zip(encoding["offset_mapping"], supervised.tolist(), strict=True):
        if is_learned:
            first = min(start, begun)
            learned[first:end] = [True] * (end - first)
        begun = max(begun, end)
    pieces: list[Piece] = []
    bos = processor.tokenizer.bos_token
    if adds_bos and bos and len(ids) and ids[0] == processor.tokenizer.bos_token_id:
        pieces.append(Piece(bos, False))
    sizes = iter(image_sizes or [(1, 1)] * text.count(processor.image_token))
    position = 0
    while position < len(text):
        if text.startswith(processor.image_token, position):
            pieces.append(Piece(processor.image_token, False, processor.num_image_tokens_at(*next(sizes))))
            position += len(processor.image_token)
            continue
        image = text.find(processor.image_token, position)
        stop = len(text) if image < 0 else image
        end = position
        while end < stop and learned[end] == learned[position]:
            end += 1
        pieces.append(Piece(text[position:end], learned[position]))
        position = end
    return pieces


def preview_text(pieces: Iterable[Piece], in_colour: bool) -> Text:
    """The pieces as rich text; without colour, learned ones stand between [[ and ]]."""
    shown = Text()
    length = 0
    for piece in pieces:
        text = f"{piece.text} x {piece.image_tokens}" if piece.image_tokens else visible(piece.text)
        text = text[: max(0, MAX_CHARS - length)]
        length += len(text)
        if not in_colour:
            shown.append(f"[[{text}]]" if piece.learned else text)
        else:
            shown.append(text, LEARNED_STYLE if piece.learned else _IMAGE_STYLE if piece.image_tokens else "")
        if length >= MAX_CHARS:
            shown.append(" ... (the rest is not shown)")
            break
    return shown


def print_preview(
    console: Console, processor: LlavaProcessor, rows: Iterable[tuple[str, dict[str, Any] | UserError]]
) -> None:
    """
    Args:
        console (`rich.console.Console`): colours are used where it has them.
        rows: (place, row with `messages` and undecoded `images`) each, or in place of a row what is wrong with it.
    """
    in_colour = console.is_terminal and not console.no_color
    marks = "in green" if in_colour else "between [[ and ]]"
    console.print(f"What is learned stands {marks}.", highlight=False, markup=False)
    for place, row in rows:
        console.print(f"\n{visible(place)}", style=_PLACE_STYLE, highlight=False, markup=False, soft_wrap=True)
        try:
            if isinstance(row, UserError):
                raise row
            pieces = marked_pieces(processor, row["messages"], stored_sizes(processor, row["images"]))
        except ValueError as error:
            what = visible(str(error).removeprefix(place).lstrip(": "))
            console.print(what, highlight=False, markup=False, soft_wrap=True)
            continue
        console.print(preview_text(pieces, in_colour), soft_wrap=True, highlight=False)
    console.print()


def visible(text: str) -> str:
    """Without the characters that steer a terminal: data from elsewhere must not."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else f"\\x{ord(character):02x}"
        for character in text
    )


def first_rows(sources: Iterable[Source], number: int) -> Iterator[tuple[str, dict[str, Any] | UserError]]:
    """(place, row) of the first rows of some sources, with its images undecoded, or what is wrong with it."""
    for source in sources:
        for row_number, raw in source.iter_raw():
            if number <= 0:
                return
            number -= 1
            place = source.place(raw, row_number)
            try:
                yield place, source.row(raw, row_number)
            except UserError as error:
                yield place, error
