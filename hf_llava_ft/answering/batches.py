"""Many questions at once: the answers are those that one by one would get, in a fraction of the time.

Rows of a batch are padded on the left, so that all answers begin at one position. What keeps them equal is that
`generate` counts each row's positions from its own first token, by the attention mask. Questions are sorted by length,
the longest first: padding is short, and what does not fit into memory is known at once.

A question that can't be answered gets an answer that says why; the others go on.

Legend of the shapes: B rows, T positions of the prompt, K new tokens.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from PIL import Image
from torch.nn.functional import pad

from hf_llava_ft.answering.prompts import (
    answer_text,
    context_length,
    encode_row,
    on_model,
    sampling_options,
    stop_options,
)
from hf_llava_ft.data.collator import open_picture
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.picture_opening_llava import size_when_opened

_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Question:
    """
    Args:
        messages (`list[dict]`): up to the one that is to be answered.
        images (`list`): in the order of their places, as `open_picture` takes them: decoded, or where they are.
        max_new_tokens (`int`, *optional*): longest answer to this one.
    """

    messages: list[dict[str, Any]]
    images: list[Any] = field(default_factory=list)
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Answer:
    """
    Args:
        text (`str`): empty if there is none.
        finish_reason (`str`): `stop` for a finished answer, `length` for one that was cut, `error` for none.
        error (`str`): why there is none.
    """

    text: str
    finish_reason: Literal["stop", "length", "error"]
    error: str = ""


def answer_all(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float | None = None,
) -> Iterator[tuple[int, Answer]]:
    """
    Yields (place of a question, its answer), batch by batch. Whoever calls it chooses between `torch.no_grad` and
    `torch.inference_mode`.

    Args:
        model, processor: as [`~hf_llava_ft.answering.loading.load_for_answering`] gives them.
        batch_size (`int`): questions at a time.
        max_new_tokens (`int`): longest answer to a question that does not say it.
        temperature, top_p: see [`~hf_llava_ft.answering.conversation.Conversation.stream`].

    Raises:
        UserError: if a batch does not fit into the GPU's memory.
    """
    options = {**sampling_options(temperature, top_p), **stop_options(processor)}
    lengths: dict[int, int] = {}
    for place, question in enumerate(questions):
        try:
            lengths[place] = _num_tokens(processor, question)
        except _UNREADABLE as error:
            yield place, _failed(error)
    order = sorted(lengths, key=lambda place: -lengths[place])
    limit = context_length(model)
    for start in range(0, len(order), batch_size):
        rows: dict[int, Any] = {}
        for place in order[start : start + batch_size]:
            question = questions[place]
            try:
                pictures = [open_picture(image, processor.picture_opening) for image in question.images]
                rows[place] = encode_row(processor, question.messages, pictures)
            except _UNREADABLE as error:
                yield place, _failed(error)
        longest = {place: questions[place].max_new_tokens or max_new_tokens for place in rows}
        for places, num_new in _by_room(rows, longest, limit):
            if num_new < 1:
                length = rows[places[0]]["input_ids"].shape[1]
                reason = f"it has {length:,} tokens, and the model's context {limit:,}: no room for an answer"
                yield places[0], Answer("", "error", reason)
                continue
            try:
                batch = [rows[place] for place in places]
                ids = generated_ids(model, batch, processor.tokenizer.pad_token_id, max_new_tokens=num_new, **options)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"{len(places)} questions at once need more memory than the GPU has: use a smaller --batch_size, "
                    f"in training --per_device_eval_batch_size."
                ) from error
            for place, row in zip(places, ids, strict=True):
                yield place, _answer_in(row[: longest[place]], model, processor)


def _num_tokens(processor: Any, question: Question) -> int:
    sizes = [(1, 1)] * len(question.images)
    if processor.depends_on_image_size:
        sizes = [_size(image, processor.picture_opening) for image in question.images]
    return processor.num_tokens(question.messages, sizes)


def _size(image: Any, opening: Any) -> tuple[int, int]:
    """`(height, width)`, from the file's header."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    with Image.open(io.BytesIO(image["bytes"]) if image.get("bytes") else image["path"]) as opened:
        return size_when_opened(opened, opening)


def _failed(error: BaseException) -> Answer:
    sentence = error.sentence if isinstance(error, UserError) else str(error) or type(error).__name__
    return Answer("", "error", " ".join(sentence.split()))


def _by_room(rows: dict[int, Any], longest: dict[int, int], limit: int | None) -> list[tuple[list[int], int]]:
    """(places, new tokens): all rows together, but those alone for which the context has less room than that."""
    most = max(longest.values(), default=0)
    room = {place: most if limit is None else limit - row["input_ids"].shape[1] for place, row in rows.items()}
    together = [place for place in rows if room[place] >= most]
    alone = [([place], min(room[place], longest[place])) for place in rows if room[place] < most]
    return ([(together, most)] if together else []) + alone


def generated_ids(model: Any, rows: list[Any], pad_id: int, **options: Any) -> torch.Tensor:
    """`int64[B, K]`, on the CPU: what `generate` adds to B prompts, as [`encode_row`] gives them."""
    inputs = on_model(padded_left(rows, pad_id), model)
    ids = model.generate(**inputs, **options, use_cache=True)  # (B, T + K)
    return ids[:, inputs["input_ids"].shape[1] :].cpu()


def _answer_in(row: torch.Tensor, model: Any, processor: Any) -> Answer:
    """The answer that new ids `int64[K]` are; what is behind its end is padding."""
    ends = model.generation_config.eos_token_id
    ends = torch.tensor(ends if isinstance(ends, list) else [] if ends is None else [ends])
    found = torch.isin(row, ends).nonzero().flatten().tolist()
    row = row[: found[0] + 1] if found else row
    stop = processor.stop_string
    is_finished = bool(found) or (stop is not None and stop in processor.tokenizer.decode(row))
    return Answer(answer_text(processor, row), "stop" if is_finished else "length")


def padded_left(rows: list[Any], pad_id: int) -> dict[str, torch.Tensor]:
    """
    A batch of what [`encode_row`] gives: `input_ids` and `attention_mask` `int64[B, T]`, and the pictures of all rows
    one after the other, absent where no row has one.
    """
    length = max(row["input_ids"].shape[1] for row in rows)
    batch = {
        name: torch.cat([pad(row[name], (length - row[name].shape[1], 0), value=fill) for row in rows])
        for name, fill in (("input_ids", pad_id), ("attention_mask", 0))
    }
    pixels = [row["pixel_values"] for row in rows if "pixel_values" in row]
    if pixels and pixels[0].dim() == 5:  # LLaVA-1.6: (pictures, crops, 3, H, W), where blank crops are dropped again
        most = max(part.shape[1] for part in pixels)
        pixels = [pad(part, (0, 0) * 3 + (0, most - part.shape[1])) for part in pixels]
    if pixels:
        batch["pixel_values"] = torch.cat(pixels)
    sizes = [row["image_sizes"] for row in rows if "image_sizes" in row]
    if sizes:
        batch["image_sizes"] = torch.cat(sizes)
    return batch
