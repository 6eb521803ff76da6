"""Answers requests on Hugging Face Inference Endpoints: the file `handler.py` of an exported folder.

It needs transformers and Pillow, not the package that wrote the folder. A request is a conversation as OpenAI's API
has it, with pictures as data URLs:

    {"inputs": {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,..."}},
        {"type": "text", "text": "What is in the picture?"}]}]},
     "parameters": {"max_new_tokens": 256}}

The reply is `{"generated_text": "..."}`. Links are refused: a server that fetches what a stranger names can be sent
anywhere.
"""

import base64
import binascii
import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from transformers import AutoModelForImageTextToText, AutoProcessor


class EndpointHandler:
    """What the Inference Toolkit makes of `handler.py`: one object per server, called once per request."""

    def __init__(self, path: str = "") -> None:
        settings = json.loads(Path(path, "config.json").read_text(encoding="utf-8"))
        trust = "auto_map" in settings  # code of this very folder
        self.processor: Any = AutoProcessor.from_pretrained(path, trust_remote_code=trust)
        model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype="auto", trust_remote_code=trust)
        self.model: Any = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """
        Raises:
            ValueError: if the request is not of the form above.
        """
        inputs = data.get("inputs")
        if not isinstance(inputs, dict) or not isinstance(inputs.get("messages"), list):
            raise ValueError('a request needs {"inputs": {"messages": [...]}}.')
        images: list[Image.Image] = []
        messages = [
            {"role": message["role"], "content": _content(message["content"], images)}
            for message in inputs["messages"]
        ]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        bos = self.processor.tokenizer.bos_token  # some templates write it themselves
        features = self.processor(
            text=[text],
            images=images or None,
            add_special_tokens=not (bos and text.startswith(bos)),
            return_tensors="pt",
        ).to(self.model.device)
        settings = {"max_new_tokens": 256, "do_sample": False} | (data.get("parameters") or {})
        with torch.inference_mode():
            ids = self.model.generate(**features, **settings)
        answer = self.processor.tokenizer.decode(ids[0, features["input_ids"].shape[1] :], skip_special_tokens=True)
        return {"generated_text": answer.strip()}


def _content(content: Any, images: list[Image.Image]) -> list[dict[str, str]]:
    """The content of a message as the chat template takes it; its pictures are added to `images`."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    items = []
    for item in content:
        if item.get("type") == "image_url":
            images.append(_picture(item["image_url"]["url"]))
            items.append({"type": "image"})
        else:
            items.append({"type": "text", "text": str(item["text"])})
    return items


def _picture(url: str) -> Image.Image:
    head, comma, payload = url.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ValueError("a picture has to be a data URL, data:image/...;base64,...")
    try:
        return Image.open(io.BytesIO(base64.b64decode(payload, validate=True))).convert("RGB")
    except (binascii.Error, UnidentifiedImageError, OSError) as error:
        raise ValueError(f"a picture can't be read: {error}") from error
