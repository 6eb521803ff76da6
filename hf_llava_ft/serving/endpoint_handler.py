"""Answers requests on Hugging Face Inference Endpoints: the file `handler.py` of an exported folder.

It needs transformers and Pillow, not the package that wrote the folder. A request is a conversation as OpenAI's API
has it, with pictures as data URLs:

    {"inputs": {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,..."}},
        {"type": "text", "text": "What is in the picture?"}]}]},
     "parameters": {"max_new_tokens": 256}}

The reply is `{"generated_text": "..."}`. A request comes from a stranger, so it is data and no more: only `SETTINGS`
are passed on, within their limits; links are refused, because a server that fetches what a stranger names can be sent
anywhere; and whatever is not of this form is one `ValueError`. The limits below may be edited.
"""

import base64
import binascii
import io
import json
import math
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image, UnidentifiedImageError
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.image_utils import load_image

MAX_NEW_TOKENS, MAX_SECONDS = 1024, 120.0
MAX_MESSAGES, MAX_STOPS, MAX_STOP_CHARS = 100, 4, 64
MAX_PICTURES, MAX_PICTURE_BYTES, MAX_PICTURE_PIXELS = 8, 20 * 2**20, 50_000_000
# No token is longer on average, so that a longer text need not be split into tokens to be refused.
MAX_CHARS_A_TOKEN = 16
# Not all that Pillow reads: some of its formats start other programs.
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

# name: type, smallest and largest value
SETTINGS: dict[str, tuple[type, float, float]] = {
    "max_new_tokens": (int, 1, MAX_NEW_TOKENS),
    "do_sample": (bool, 0, 1),
    "temperature": (float, 0, 10),
    "top_p": (float, 1e-3, 1),
    "top_k": (int, 1, 1000),
    "repetition_penalty": (float, 0.1, 10),
    "seed": (int, 0, 2**63 - 1),
}
SAMPLING = ("temperature", "top_p", "top_k")
KIND = {int: "a whole number", float: "a number", bool: "true or false"}


class EndpointHandler:
    """What the Inference Toolkit makes of `handler.py`: one object per server, called once per request."""

    def __init__(self, path: str = "") -> None:
        settings = json.loads(Path(path, "config.json").read_text(encoding="utf-8"))
        trust = "auto_map" in settings  # code of this very folder
        self.processor: Any = AutoProcessor.from_pretrained(path, trust_remote_code=trust)
        model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype="auto", trust_remote_code=trust)
        self.model: Any = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.max_tokens = int(self.model.config.get_text_config().max_position_embeddings)

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """
        Raises:
            ValueError: if the request is not of the form above, or past a limit.
        """
        if not isinstance(data, dict) or not set(data) <= {"inputs", "parameters"}:
            raise ValueError('a request is {"inputs": {"messages": [...]}, "parameters": {...}} and nothing else.')
        seed, stops, settings = _settings(data.get("parameters"))
        images: list[Image.Image] = []
        features = self._features(_messages(data.get("inputs"), images, self.max_tokens), images)
        num_tokens = features["input_ids"].shape[1]
        settings.setdefault("max_new_tokens", max(1, min(256, self.max_tokens - num_tokens)))
        if num_tokens + settings["max_new_tokens"] > self.max_tokens:
            raise ValueError(
                f"the conversation has {num_tokens} tokens, and with max_new_tokens {settings['max_new_tokens']} that "
                f"is more than the {self.max_tokens} this model takes."
            )
        if stops:
            settings |= {"stop_strings": stops, "tokenizer": self.processor.tokenizer}
        with torch.inference_mode(), torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            ids = self.model.generate(**features.to(self.model.device), **settings, max_time=MAX_SECONDS)
        answer = self.processor.tokenizer.decode(ids[0, num_tokens:], skip_special_tokens=True)
        for stop in stops:
            answer = answer.partition(stop)[0]
        return {"generated_text": answer.strip()}

    def _features(self, messages: list[dict[str, Any]], images: list[Image.Image]) -> Any:
        placeholder = self.processor.image_token
        if any(placeholder in item.get("text", "") for message in messages for item in message["content"]):
            raise ValueError(f"a text holds {placeholder}, which stands for a picture: leave it out.")
        try:
            text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        except (TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"the model's chat template takes no such conversation: {error}") from error
        bos = self.processor.tokenizer.bos_token  # some templates write it themselves
        starts_with_bos = bool(bos and text.startswith(bos))
        return self.processor(
            text=[text], images=images or None, add_special_tokens=not starts_with_bos, return_tensors="pt"
        )


def _settings(parameters: Any) -> tuple[int | None, list[str], dict[str, Any]]:
    """Seed, texts to stop at, and what `generate` is given."""
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, dict):
        raise ValueError('parameters have to be an object such as {"max_new_tokens": 256}.')
    settings: dict[str, Any] = {}
    stops: list[str] = []
    for name, value in parameters.items():
        if name == "stop":
            stops = _stops(value)
        elif name not in SETTINGS:
            raise ValueError(f"parameter {name!r:.80} is none of {', '.join([*SETTINGS, 'stop'])}.")
        else:
            settings[name] = _number(name, value)
    if settings.get("temperature") == 0:  # as in OpenAI's API: the likeliest token
        del settings["temperature"]
        if settings.setdefault("do_sample", False):
            raise ValueError("temperature 0 and do_sample true exclude each other: leave one out.")
    sampling = [name for name in SAMPLING if name in settings]
    if sampling and not settings.setdefault("do_sample", True):
        raise ValueError(f"{sampling[0]} does nothing without sampling: leave it or do_sample false out.")
    settings.setdefault("do_sample", False)
    return settings.pop("seed", None), stops, settings


def _number(name: str, value: Any) -> Any:
    kind, low, high = SETTINGS[name]
    whole_is_real = kind is float and isinstance(value, int) and not isinstance(value, bool)
    if type(value) is not kind and not whole_is_real:
        raise ValueError(f"parameter {name} has to be {KIND[kind]}.")
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"parameter {name} has to be from {low:g} to {high:g}.")
    return kind(value)


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_CHARS for stop in stops)
    ):
        raise ValueError(
            f"parameter stop has to be a text, or up to {MAX_STOPS} of them, of 1 to {MAX_STOP_CHARS} characters."
        )
    return stops


def _messages(inputs: Any, images: list[Image.Image], max_tokens: int) -> list[dict[str, Any]]:
    """The messages as the chat template takes them; their pictures are added to `images`."""
    messages = inputs.get("messages") if isinstance(inputs, dict) else None
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        raise ValueError(f'a request needs {{"inputs": {{"messages": [...]}}}} with 1 to {MAX_MESSAGES} messages.')
    taken = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"message {number} needs a role, system, user or assistant, and content.")
        taken.append({"role": message["role"], "content": _content(message.get("content"), number, images)})
    num_chars = sum(len(item.get("text", "")) for message in taken for item in message["content"])
    if num_chars > MAX_CHARS_A_TOKEN * max_tokens:
        raise ValueError(f"the conversation has {num_chars} characters, more than this model takes.")
    return taken


def _content(content: Any, number: int, images: list[Image.Image]) -> list[dict[str, str]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    items = []
    for each in content if isinstance(content, list) else [None]:
        item = each if isinstance(each, dict) else {}
        kind = item.get("type")
        if kind == "text" and isinstance(item.get("text"), str):
            items.append({"type": "text", "text": item["text"]})
        elif kind == "image_url" and isinstance(item.get("image_url"), dict):
            if len(images) == MAX_PICTURES:
                raise ValueError(f"a request takes at most {MAX_PICTURES} pictures.")
            images.append(_picture(item["image_url"].get("url")))
            items.append({"type": "image"})
        else:
            raise ValueError(
                f"the content of message {number} has to be a text, or a list of "
                '{"type": "text", "text": ...} and {"type": "image_url", "image_url": {"url": ...}}.'
            )
    return items


def _picture(url: Any) -> Image.Image:
    head, comma, payload = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ValueError("a picture has to be a data URL, data:image/...;base64,...")
    if len(payload) > MAX_PICTURE_BYTES * 4 / 3 + 4:
        raise ValueError(f"a picture takes at most {MAX_PICTURE_BYTES // 2**20} MiB.")
    try:
        picture = Image.open(io.BytesIO(base64.b64decode(payload, validate=True)), formats=PICTURE_FORMATS)
        if picture.width * picture.height > MAX_PICTURE_PIXELS:  # before any of them is unpacked
            raise ValueError(f"a picture of {picture.width} x {picture.height} is too large.")
        return load_image(picture)  # upright and in RGB, as by transformers' other doors
    except UnidentifiedImageError as error:
        raise ValueError(f"a picture is none of {', '.join(PICTURE_FORMATS)}, or damaged.") from error
    # Pillow's readers raise all of these for damaged files, and one of its own for bombs.
    except (binascii.Error, OSError, SyntaxError, IndexError, OverflowError, Image.DecompressionBombError) as error:
        raise ValueError(f"a picture can't be read: {error}") from error
