"""From a question to what `generate` takes, and where an answer ends."""

from collections.abc import Iterable, Iterator
from typing import Any

from jinja2 import TemplateError
from PIL import Image

from hf_llava_ft.errors import UserError


def question_content(question: str, num_images: int, image_token: str = "<image>") -> list[dict[str, str]]:
    """
    The content of a question about `num_images` pictures: in front of it, as in training, or where `<image>` stands
    in it.

    Raises:
        UserError: if it has `<image>`, but not once for each picture.
    """
    pieces = question.split(image_token)
    num_places = len(pieces) - 1
    if num_places not in (0, num_images):
        raise UserError(
            f"the question holds {num_places} {image_token} and comes with {num_images} "
            f"{'picture' if num_images == 1 else 'pictures'}: write it once for "
            f"each, or leave it out, which puts them in front."
        )
    if num_places == 0 or (num_places == 1 and not (pieces[0].strip() and pieces[1].strip())):
        return [{"type": "image"}] * num_images + [{"type": "text", "text": "".join(pieces).strip()}]
    content: list[dict[str, str]] = []
    for place, piece in enumerate(pieces):
        content += [{"type": "image"}] * (place > 0) + [{"type": "text", "text": piece}] * bool(piece)
    return content


def question_of(content: list[dict[str, str]]) -> str:
    """What was asked, with `<image>` where its pictures stand."""
    return "".join("<image>" if part["type"] == "image" else part["text"] for part in content)


def encode_row(processor: Any, messages: list[dict], images: list[Image.Image]) -> Any:
    """
    `input_ids` and `attention_mask`, `int64[1, T]`, of the prompt for an answer to `messages`; with pictures, what the
    image processor gives for them.

    Raises:
        UserError: if the chat template does not take them.
    """
    try:
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
    except (TemplateError, TypeError) as error:
        raise UserError(f"the model's chat template does not take this conversation: {error}.") from error
    return processor(
        text=[text],
        images=images or None,
        add_special_tokens=not processor.begins_with_bos(text),
        return_tensors="pt",
    )


def on_model(inputs: Any, model: Any) -> Any:
    """`inputs` on the model's device, pictures in its dtype."""
    return {
        name: value.to(model.device, model.dtype if name == "pixel_values" else None) for name, value in inputs.items()
    }


def encode_prompt(model: Any, processor: Any, messages: list[dict], images: list[Image.Image]) -> Any:
    """What `model.generate` takes, one row, for an answer to `messages`; see [`encode_row`]."""
    return on_model(encode_row(processor, messages, images), model)


def context_length(model: Any) -> int | None:
    """How many tokens question and answer may have together; `None` where the language model does not say."""
    return getattr(model.config.text_config, "max_position_embeddings", None)


def stop_options(processor: Any) -> dict[str, Any]:
    """Options of `generate` by which an answer ends at the string that the chat template ends it with, if any."""
    stop = processor.stop_string
    return {"stop_strings": [stop], "tokenizer": processor.tokenizer} if stop else {}


def sampling_options(temperature: float, top_p: float | None = None) -> dict[str, Any]:
    """
    Options of `generate`: greedy at temperature 0.

    Raises:
        UserError: if `top_p` is given for greedy answers.
    """
    if temperature == 0:
        if top_p is not None:
            raise UserError("--top_p chooses among sampled tokens, and at --temperature 0 none are sampled: raise it.")
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature} | ({} if top_p is None else {"top_p": top_p})


def answer_text(processor: Any, ids: Any) -> str:
    """The answer that generated `ids` `int64[K]` are, without what ends it."""
    text = processor.tokenizer.decode(ids, skip_special_tokens=True)
    stop = processor.stop_string
    return ("".join(up_to(stop, [text])) if stop else text).strip()


def up_to(stop: str, pieces: Iterable[str]) -> Iterator[str]:
    """The text of `pieces` in front of the first `stop`; what may be its beginning is held back until it is not."""
    held, found = "", False
    for piece in pieces:  # to the end, also behind `stop`: whoever makes them waits for it
        if found:
            continue
        held += piece
        before, stop_found, _ = held.partition(stop)
        found = bool(stop_found)
        size = len(before) if found else len(held) - _shared(held, stop)
        if size:
            yield held[:size]
        held = held[size:]
    if held and not found:
        yield held


def _shared(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next(size for size in range(min(len(text), len(stop)), -1, -1) if text.endswith(stop[:size]))
