"""Whole conversations as a model sees them in training: ids, labels and pixels in one call.

What is supervised comes from the chat template's own generation spans, laid over the offsets of the tokens of the
whole text: nothing is tokenised in pieces and nothing is found again by searching.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from transformers.processing_utils import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from .truncation_llava import num_kept
from .uint8_pixels_llava import can_hand_over_uint8, uint8_images

IGNORE_INDEX = -100
_SHORT_ANSWER = "a"


class ConversationEncoding(ProcessorMixin):
    """What [`LlavaProcessor`] adds to transformers' own processor; see there."""

    tokenizer: Any
    image_processor: Any
    image_token: str
    image_token_id: int

    def encode_conversation(
        self,
        messages: list[dict[str, Any]],
        images: list[Image.Image] | None = None,
        uint8_pixels: bool = False,
        max_length: int | None = None,
    ) -> dict:
        """
        A whole conversation as the model sees it in training.

        Args:
            messages: `{"role": ..., "content": ...}` in order; the content is a string, or a list of `{"type":
            "image"}`
                and `{"type": "text", "text": ...}`.
            images (`list[PIL.Image.Image]`, *optional*): in the order of their places in the messages.
            uint8_pixels (`bool`): see `encode_images`.
            max_length (`int`, *optional*): cut behind so many tokens, images whose places are cut off included.

        Returns:
            `input_ids` and `labels`, `int64[T]`, with -100 at every position that is not part of an answer or its stop
            token; `attention_mask` `int64[T]`; and with images what `encode_images` returns.

        Raises:
            ValueError: if image places and images differ in number, or the template marks no answer or no stop token.
            CannotTruncate: if a cut would go through an image, or leave nothing to learn.
        """
        images = images or []
        text, spans = self.render(messages)
        if self.stop_token_id is None and self.stop_string is None:
            raise ValueError(
                "the processor's chat template does not mark what ends an answer, so the model would never "
                "learn to stop: choose one of ours, e.g. --version v1."
            )
        num_places = text.count(self.image_token)
        if num_places != len(images):
            raise ValueError(
                f"the conversation has {num_places} {self.image_token} and there are {len(images)} images: "
                f"the numbers must be equal."
            )
        encoded: dict[str, Any] = {}
        ids, supervised = self._tokenize(text, spans)
        if max_length is not None:
            repeats = [self.num_image_tokens_at(image.height, image.width) for image in images]
            kept = num_kept(ids, supervised, self.image_token_id, repeats, max_length)
            ids, supervised = ids[:kept], supervised[:kept]
            images = images[: np.count_nonzero(ids == self.image_token_id)]
        repeats = []
        if images:
            encoded |= self.encode_images(images, uint8_pixels)
            repeats = self.num_placeholders(encoded)
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

    def encode_images(self, images: list[Image.Image], uint8_pixels: bool = False) -> dict[str, torch.Tensor]:
        """
        `pixel_values` `float32[N, 3, H, W]` of N pictures.

        Args:
            uint8_pixels (`bool`): give them as uint8, for `normalize_pixels`, if the image processor is of a kind that
                allows it.
        """
        return {"pixel_values": self._processed_pictures(images, uint8_pixels, return_tensors="pt")["pixel_values"]}

    def _processed_pictures(self, images: list[Image.Image], uint8_pixels: bool, **options) -> Mapping[str, Any]:
        if uint8_pixels and can_hand_over_uint8(self.image_processor):
            return uint8_images(self.image_processor, images, **options)
        return self.image_processor(images, **options)

    def num_placeholders(self, encoded_images: dict[str, torch.Tensor]) -> list[int]:
        """How many placeholders each picture of an `encode_images` result takes."""
        return [self._num_placeholders(encoded_images, index) for index in range(len(encoded_images["pixel_values"]))]

    def num_tokens(self, messages: list[dict[str, Any]], image_sizes: Sequence[tuple[int, int]] | None = None) -> int:
        """
        Length of the conversation as `encode_conversation` gives it, from the text alone.

        Args:
            image_sizes: `(height, width)` of each picture; needed only where the number of placeholders depends on it.
        """
        text, _ = self.render(messages)
        text_ids = self.tokenizer(text, add_special_tokens=not self.begins_with_bos(text)).input_ids
        sizes = image_sizes or [(1, 1)] * text.count(self.image_token)
        return len(text_ids) + sum(self.num_image_tokens_at(height, width) - 1 for height, width in sizes)

    @property
    def depends_on_image_size(self) -> bool:
        """Whether pictures of different sizes take different numbers of placeholders."""
        return False

    def num_image_tokens_at(self, height: int, width: int) -> int:
        """Placeholders of a picture of `height` x `width` pixels."""
        return self.num_image_tokens

    @cached_property
    def num_image_tokens(self) -> int:
        """Placeholders per image: one number, because LLaVA-1.5 makes every picture the same square."""
        return self.num_placeholders(self.encode_images([Image.new("RGB", (8, 8))]))[0]

    @cached_property
    def stop_token_id(self) -> int | None:
        """
        The id that ends an answer under the chat template; generation has to stop on it. `None` where no token does,
        see `stop_string`.
        """
        text, spans = self._short_answer
        ids, supervised = self._tokenize(text, spans)
        special = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        stops = [index for index in ids[supervised].tolist() if index in special]
        if stops:
            return stops[-1]
        # A line can end an answer too: that is how `plain` ends a caption.
        return int(ids[supervised][-1]) if spans and text[spans[-1][1] - 1] == "\n" else None

    @cached_property
    def stop_string(self) -> str | None:
        """
        The text that ends an answer under a chat template which ends it in no token, as `###` of the oldest prompts:
        generation has to be given it, `generate(..., stop_strings=[...], tokenizer=...)`, and a chat cuts it off.
        `None` where a token ends it, and where `stop_token_id` is `None` too, as with the templates of the `llava-hf`
        checkpoints: those serve for answering, not for training.
        """
        text, spans = self._short_answer
        if self.stop_token_id is not None or not spans:
            return None
        start, end = spans[-1]
        return text[start:end].partition(_SHORT_ANSWER)[2].strip() or None

    @cached_property
    def _short_answer(self) -> tuple[str, list[tuple[int, int]]]:
        """A rendered conversation about one image, and the characters of its answer; none where the template refuses
        it."""
        example: list[dict[str, Any]] = [
            {"role": "user", "content": [{"type": "image"}]},
            {"role": "assistant", "content": [{"type": "text", "text": _SHORT_ANSWER}]},
        ]
        try:
            return self.render(example)
        except ValueError:
            return "", []

    def pad(self, features: list[dict], padding_side: str = "right", pad_to_multiple_of: int | None = None) -> dict:
        """
        A batch of `encode_conversation` results: text fields `int64[B, T]`, padded with the padding token, 0 and -100,
        and `pixel_values` of all rows one after the other, absent when no row has an image.
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
        for name in self.image_processor.model_input_names:  # pixel_values; image_sizes
            parts = [feature[name] for feature in features if name in feature]
            if parts:
                batch[name] = torch.cat(parts)
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
        return self.tokenize_rendered([(text, spans)])[0]

    def tokenize_rendered(
        self, rendered: Sequence[tuple[str, list[tuple[int, int]]]]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """
        Ids and supervised positions of several conversations in one call, which is faster than one after the other.

        Args:
            rendered: what `render` gave for each.

        Returns:
            For each, ids `int64[K]`, images not yet expanded, and `bool[K]`: whether a token is learned, because it
            overlaps one of the spans.
        """
        tokenized: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for add_special_tokens in (True, False):
            places = [
                place for place, (text, _) in enumerate(rendered) if self.begins_with_bos(text) != add_special_tokens
            ]
            if not places:
                continue
            encoding = self.tokenizer(
                [rendered[place][0] for place in places],
                add_special_tokens=add_special_tokens,
                return_offsets_mapping=True,
                verbose=False,
            )
            for place, ids, offsets in zip(places, encoding["input_ids"], encoding["offset_mapping"], strict=True):
                flat = np.fromiter(chain.from_iterable(offsets), dtype=np.int64, count=2 * len(offsets))
                ids = np.array(ids, dtype=np.int64)
                tokenized[place] = ids, self._supervised(*rendered[place], ids, flat.reshape(-1, 2))
        return [tokenized[place] for place in range(len(rendered))]

    def _supervised(self, text: str, spans: list[tuple[int, int]], ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """`bool[K]`: whether a token overlaps one of `spans`, from ids `int64[K]` and offsets `int64[K, 2]`."""
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
        return supervised & (ids != self.image_token_id)

    def _num_placeholders(self, pixels, index: int) -> int:
        return len(self.replace_image_token(pixels, index)) // len(self.image_token)
