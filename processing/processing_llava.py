"""`LlavaProcessor`: transformers' own, plus labels for training.

It keeps the native name and saves native files, because what it computes from text and pictures is the same: without
this package the folder loads as transformers' `LlavaProcessor`. What it adds is `encode_conversation`, which turns a
whole conversation into ids, labels and pixels in one call, `pad`, which makes a batch of several, and
`from_pretrained` on folders of the original LLaVA, which hold no processor.

It alone decides how many placeholders an image takes; the model checks.
"""

from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig
from transformers.models.llava.processing_llava import LlavaProcessor as NativeLlavaProcessor
from transformers.utils import cached_file
from transformers.utils.chat_template_utils import render_jinja_template

from .chat_templates_llava import chat_template_for
from .image_processing_llava import build_image_processor
from .tokenizer_llava import IMAGE_START_TOKEN, IMAGE_TOKEN, load_tokenizer, prepare_tokenizer

IGNORE_INDEX = -100


class LlavaProcessor(NativeLlavaProcessor):
    """See the module; arguments as in transformers."""

    # ------------------------------------------------------------------ building

    @classmethod
    def build(
        cls,
        tokenizer,
        vision_config,
        *,
        version: str | None = None,
        image_aspect_ratio: str = "square",
        vision_feature_select_strategy: str | None = None,
        tower_name: str | None = None,
        image_start_end: bool = False,
    ) -> "LlavaProcessor":
        """
        A processor from its parts.

        Args:
            tokenizer: a fast tokenizer; `<image>` and a padding token are added where missing.
            vision_config: configuration of the vision tower.
            version (`str`, *optional*): name of a chat template; by default the one that suits the tokenizer.
            image_aspect_ratio (`"square"` or `"pad"`): see `build_image_processor`.
            vision_feature_select_strategy (`"default"` or `"full"`, *optional*): as in the model; default: what drops
                the class token where there is one.
            tower_name (`str`, *optional*): folder or Hub id of the tower, for its preprocessor_config.json.
            image_start_end (`bool`): put `<im_start>` and `<im_end>` around each image; the original's
                `mm_use_im_start_end`.
        """
        tokenizer = prepare_tokenizer(tokenizer, image_start_end)
        template = chat_template_for(tokenizer, version, image_start_end)
        has_class_token = vision_config.model_type == "clip_vision_model"
        return cls(
            image_processor=build_image_processor(vision_config, image_aspect_ratio, tower_name),
            tokenizer=tokenizer,
            patch_size=vision_config.patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy
            or ("default" if has_class_token else "full"),
            chat_template=template.source,
            image_token=IMAGE_TOKEN,
            num_additional_image_tokens=1 if has_class_token else 0,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers; a folder of the original LLaVA, without processor files, gets one from its
        config.json."""
        location = {key: kwargs[key] for key in ("revision", "token", "cache_dir") if key in kwargs}
        quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        names = ("processor_config.json", "preprocessor_config.json")
        if any(cached_file(pretrained_model_name_or_path, name, **quiet, **location) for name in names):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **location)
        return cls.build(
            load_tokenizer(pretrained_model_name_or_path, **location),
            config.vision_config,
            image_aspect_ratio=getattr(config, "image_aspect_ratio", None) or "square",
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            tower_name=getattr(config, "vision_tower_name", None),
            image_start_end=getattr(config, "uses_image_start_end", False),
        )

    def use_chat_template(self, version: str) -> None:
        """Replaces the chat template by the one called `version`; it is saved with the processor."""
        image_start_end = IMAGE_START_TOKEN in str(self.chat_template)
        self.chat_template = chat_template_for(self.tokenizer, version, image_start_end).source
        self.__dict__.pop("stop_token_id", None)

    # ------------------------------------------------------------------ training

    def encode_conversation(self, messages: list[dict[str, Any]], images: list[Image.Image] | None = None) -> dict:
        """
        A whole conversation as the model sees it in training.

        Args:
            messages: `{"role": ..., "content": ...}` in order; the content is a string, or a list of `{"type":
            "image"}`
                and `{"type": "text", "text": ...}`.
            images (`list[PIL.Image.Image]`, *optional*): in the order of their places in the messages.

        Returns:
            `input_ids` and `labels`, `int64[T]`, with -100 at every position that is not part of an answer or its stop
            token; `attention_mask` `int64[T]`; and with images `pixel_values` `float32[N, 3, H, W]`.

        Raises:
            ValueError: if image places and images differ in number, or the template marks no answer or no stop token.
        """
        images = images or []
        text, spans = self.render(messages)
        if self.stop_token_id is None:
            raise ValueError(
                "the processor's chat template does not mark the token that ends an answer, so the model would never "
                "learn to stop: choose one of ours, e.g. --version v1."
            )
        num_places = text.count(self.image_token)
        if num_places != len(images):
            raise ValueError(
                f"the conversation has {num_places} {self.image_token} and there are {len(images)} images: "
                f"the numbers must be equal."
            )
        encoded: dict[str, Any] = {}
        repeats = []
        if images:
            pixels = self.image_processor(images, return_tensors="pt")
            encoded["pixel_values"] = pixels["pixel_values"]
            repeats = [self._num_placeholders(pixels, index) for index in range(len(images))]
        ids, supervised = self._tokenize(text, spans)
        counts = np.ones(len(ids), dtype=np.int64)
        counts[ids == self.image_token_id] = repeats
        ids, supervised = np.repeat(ids, counts), np.repeat(supervised, counts)
        if not supervised.any():
            raise ValueError(
                "the chat template marks no answer in the conversation, so there would be nothing to learn."
            )
        encoded["input_ids"] = torch.from_numpy(ids)
        encoded["attention_mask"] = torch.ones_like(encoded["input_ids"])
        encoded["labels"] = torch.from_numpy(np.where(supervised, ids, IGNORE_INDEX))
        return encoded

    def num_tokens(self, messages: list[dict[str, Any]]) -> int:
        """Length of the conversation as `encode_conversation` gives it, from the text alone."""
        text, _ = self.render(messages)
        text_ids = self.tokenizer(text, add_special_tokens=not self.begins_with_bos(text)).input_ids
        return len(text_ids) + text.count(self.image_token) * (self.num_image_tokens - 1)

    @cached_property
    def num_image_tokens(self) -> int:
        """Placeholders per image: one number, because LLaVA makes every picture the same square."""
        return self._num_placeholders(self.image_processor([Image.new("RGB", (8, 8))], return_tensors="pt"), 0)

    @cached_property
    def stop_token_id(self) -> int | None:
        """
        The id that ends an answer under the chat template; generation has to stop on it. `None` where the template
        marks none, as those of the `llava-hf` checkpoints do: it serves for answering, not for training.
        """
        example: list[dict[str, Any]] = [
            {"role": "user", "content": [{"type": "image"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
        ]
        try:
            text, spans = self.render(example)
        except ValueError:
            return None
        ids, supervised = self._tokenize(text, spans)
        special = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        stops = [index for index in ids[supervised].tolist() if index in special]
        if stops:
            return stops[-1]
        # A line can end an answer too: that is how `plain` ends a caption.
        return int(ids[supervised][-1]) if spans and text[spans[-1][1] - 1] == "\n" else None

    def pad(self, features: list[dict], padding_side: str = "right", pad_to_multiple_of: int | None = None) -> dict:
        """
        A batch of `encode_conversation` results: text fields `int64[B, T]`, padded with the padding token, 0 and -100,
        and `pixel_values` `float32[N, 3, H, W]` of all rows one after the other, absent when no row has an image.
        """
        length = max(len(feature["input_ids"]) for feature in features)
        if pad_to_multiple_of:
            length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
        fill = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX}
        batch = {}
        for name, value in fill.items():
            rows = torch.full((len(features), length), value, dtype=torch.int64)
            for row, feature in zip(rows, features, strict=True):
                size = len(feature[name])
                (row[:size] if padding_side == "right" else row[length - size :]).copy_(feature[name])
            batch[name] = rows
        pixels = [feature["pixel_values"] for feature in features if "pixel_values" in feature]
        if pixels:
            batch["pixel_values"] = torch.cat(pixels)
        return batch

    # ------------------------------------------------------------------ text and spans

    def render(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, one placeholder per image, and the `(start, end)` characters of what is
        supervised."""
        if "endgeneration" not in cast(str, self.chat_template):
            return self._render_by_prefixes(messages)
        [text], [spans] = self._rendered(messages, return_assistant_tokens_mask=True)
        return text, [(start, end) for start, end in spans]

    def _render_by_prefixes(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """
        Spans of a tokenizer's own template, which has no generation marks: an answer is what the template adds to the
        prompt it would generate from, up to the stop token.

        Raises:
            ValueError: if the template rewrites earlier turns (as those do that drop a model's reasoning), so that no
                such prefix exists.
        """
        [text], _ = self._rendered(messages)
        stop = self.tokenizer.eos_token
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            [prompt], _ = self._rendered(messages[:index], add_generation_prompt=True)
            [answered], _ = self._rendered(messages[: index + 1])
            found = answered.rfind(stop, len(prompt))
            end = found + len(stop)
            if found < 0 or not text.startswith(prompt) or not text.startswith(answered[:end]):
                raise ValueError(
                    "the tokenizer's own chat template cannot be used for training: it does not render an answer as "
                    f"its prompt, the answer and {stop}. Choose one of ours, e.g. --version chatml."
                )
            spans.append((len(prompt), end))
        return text, spans

    def _rendered(self, messages: list[dict[str, Any]], **options) -> Any:
        """What `render_jinja_template` returns for one conversation; what the template refuses is a `ValueError`."""
        special_tokens = self.tokenizer.special_tokens_map
        try:
            return render_jinja_template(
                conversations=[messages], chat_template=cast(str, self.chat_template), **options, **special_tokens
            )
        except Exception as error:  # jinja2's TemplateError, and whatever a template may run into
            raise ValueError(f"the chat template does not take this conversation: {error}") from error

    def begins_with_bos(self, text: str) -> bool:
        """Whether the template has written the token already that the tokenizer would add."""
        bos = self.tokenizer.bos_token
        return bos is not None and text.startswith(bos)

    def _tokenize(self, text: str, spans: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Ids `int64[K]` of `text`, images not yet expanded, and `bool[K]`: whether a token overlaps one of
        `spans`."""
        encoding = self.tokenizer(
            text, add_special_tokens=not self.begins_with_bos(text), return_offsets_mapping=True, verbose=False
        )
        ids = np.array(encoding["input_ids"], dtype=np.int64)
        offsets = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        starts, ends = offsets[:, 0].copy(), offsets[:, 1].copy()
        # Where offsets are trimmed (GPT-NeoX), a token of spaces alone is the empty range at its end: it began where
        # the token before it ended.
        starts[1:] = np.where(starts[1:] == ends[1:], ends[:-1], starts[1:])
        # The space that the normaliser adds behind an image reports the image's characters; it belongs to what
        # follows.
        position = text.find(self.image_token)
        while position >= 0:
            image_end = position + len(self.image_token)
            added = (starts >= position) & (starts < image_end) & (ends > starts) & (ids != self.image_token_id)
            starts[added] = image_end
            ends[added] = np.maximum(ends[added], image_end + 1)
            position = text.find(self.image_token, image_end)
        supervised = np.zeros(len(ids), dtype=bool)
        for start, end in spans:
            supervised |= (ends > start) & (starts < end) & (ends > starts)
        return ids, supervised & (ids != self.image_token_id)

    def _num_placeholders(self, pixels, index: int) -> int:
        return len(self.replace_image_token(pixels, index)) // len(self.image_token)


__all__ = ["LlavaProcessor"]
