"""Asking a model: one question after another about pictures, with the answer streamed word by word."""

import io
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from transformers import TextIteratorStreamer

from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.picture_opening_llava import PictureOpening, rgb_picture

URL_TIMEOUT_SECONDS = 30
MAX_URL_BYTES = 64 * 2**20


def open_image(source: str | Path, opening: PictureOpening = "upright") -> Image.Image:
    """
    The picture at a path or an http(s) URL, decoded, in RGB.

    Args:
        opening (`"upright"` or `"original"`): a model's own is `processor.picture_opening`.

    Raises:
        UserError: if it is not there or no picture.
    """
    try:
        if str(source).startswith(("http://", "https://")):
            with urllib.request.urlopen(str(source), timeout=URL_TIMEOUT_SECONDS) as response:
                content = response.read(MAX_URL_BYTES + 1)
            if len(content) > MAX_URL_BYTES:
                raise UserError(f"the image at {source} is larger than {MAX_URL_BYTES >> 20} MiB.")
            return rgb_picture(Image.open(io.BytesIO(content)), opening)
        with Image.open(source) as image:
            return rgb_picture(image, opening)
    except FileNotFoundError as error:
        raise UserError(f"the image {source} does not exist.") from error
    except urllib.error.URLError as error:
        raise UserError(f"the image {source} cannot be fetched: {error.reason}.") from error
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"the image {source} cannot be read: {getattr(error, 'strerror', None) or error}.") from error


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


def encode_prompt(model: Any, processor: Any, messages: list[dict], images: list[Image.Image]) -> Any:
    """What `model.generate` takes, one row, on the model's device and in its dtype, for an answer to `messages`."""
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(
        text=[text],
        images=images or None,
        add_special_tokens=not processor.begins_with_bos(text),
        return_tensors="pt",
    ).to(model.device)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return inputs


def stop_options(processor: Any) -> dict[str, Any]:
    """Options of `generate` by which an answer ends at the string that the chat template ends it with, if any."""
    stop = processor.stop_string
    return {"stop_strings": [stop], "tokenizer": processor.tokenizer} if stop else {}


@dataclass
class Conversation:
    """
    A chat with one model. Questions and answers accumulate in `messages`, pictures in `images`.

    Args:
        model, processor: as [`load_for_answering`] gives them.
        system (`str`, *optional*): replaces the chat template's own.
    """

    model: Any
    processor: Any
    system: str | None = None
    messages: list[dict] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)

    def ask(self, question: str, images: list[Image.Image] | None = None, **generation) -> str:
        """The whole answer; see [`stream`]."""
        return "".join(self.stream(question, images, **generation)).strip()

    def stream(
        self,
        question: str,
        images: list[Image.Image] | None = None,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
    ) -> Iterator[str]:
        """
        Asks `question` about `images`, which are put in front of it as in training, and yields the answer piece by
        piece.

        Args:
            max_new_tokens (`int`): longest answer.
            temperature (`float`): 0 is greedy.
        """
        if not self.messages and self.system:
            self.messages.append({"role": "system", "content": [{"type": "text", "text": self.system}]})
        content = [{"type": "image"} for _ in images or []] + [{"type": "text", "text": question}]
        self.messages.append({"role": "user", "content": content})
        self.images.extend(images or [])
        inputs = encode_prompt(self.model, self.processor, self.messages, self.images)
        options: dict[str, Any] = {"do_sample": temperature > 0, **stop_options(self.processor)}
        if temperature > 0:
            options["temperature"] = temperature
        stop = self.processor.stop_string
        pieces = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure: list[BaseException] = []

        def generate() -> None:
            try:
                with torch.inference_mode():
                    self.model.generate(**inputs, **options, max_new_tokens=max_new_tokens, streamer=pieces)
            except BaseException as error:
                failure.append(error)
                pieces.end()

        worker = threading.Thread(target=generate, daemon=True)
        worker.start()
        answer = []
        for piece in up_to(stop, pieces) if stop else pieces:
            answer.append(piece)
            yield piece
        worker.join()
        if failure:
            raise failure[0]
        self.messages.append({"role": "assistant", "content": [{"type": "text", "text": "".join(answer).strip()}]})


def load_for_answering(
    path: str,
    *,
    base: str | None = None,
    revision: str | None = None,
    attn_implementation: str = "sdpa",
    dtype: str = "auto",
    processor: Any = None,
    allow_nan: bool = False,
):
    """Model, on the best device there is, and processor of `path`, where that is not given: an adapter, a merged,
    native or original checkpoint."""
    if processor is None:
        processor = load_processor(path, revision, base=base)
    model: Any = load_model(
        path,
        processor,
        base=base,
        revision=revision,
        attn_implementation=attn_implementation,
        dtype=dtype,
        allow_nan=allow_nan,
    )
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return model.to(device).eval(), processor
