"""Whole conversations as a model sees them in training: ids, labels and pixels in one call."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .conversation_pictures_llava import ConversationPictures
from .conversation_text_llava import ConversationText
from .truncation_llava import num_kept

IGNORE_INDEX = -100


class ConversationEncoding(ConversationPictures, ConversationText):
    """What [`LlavaProcessor`] adds to transformers' own processor; see there."""

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
            messages (`list[dict]`): `{"role": ..., "content": ...}` in order; the content is a string, or a list of
                `{"type": "image"}` and `{"type": "text", "text": ...}`.
            images (`list[PIL.Image.Image]`, *optional*): in the order of their places in the messages.
            uint8_pixels (`bool`): see `encode_images`.
            max_length (`int`, *optional*): cut behind so many tokens, images whose places are cut off included.

        Returns:
            `input_ids` and `labels`, `int64[T]`, with -100 at every position that is not part of an answer or its stop
            token; `attention_mask` `int64[T]`; and with images what `encode_images` returns.

        Raises:
            ValueError: if image places and images differ in number, or the template marks no answer, no stop token or
                something else.
            CannotTruncate: if a cut would go through an image, or leave nothing to learn.
        """
        images = images or []
        pixels: dict[str, Any] = {}

        def placeholders(kept: int) -> list[int]:
            if kept:
                pixels.update(self.encode_images(images[:kept], uint8_pixels))
            return self.num_placeholders(pixels) if kept else []

        sizes = [(image.height, image.width) for image in images]
        return pixels | self._encode_text(messages, sizes, max_length, placeholders)[0]

    def encode_around_images(
        self,
        messages: list[dict[str, Any]],
        image_sizes: Sequence[tuple[int, int]],
        max_length: int | None = None,
    ) -> tuple[dict[str, Any], int]:
        """
        As `encode_conversation`, without the pixels.

        Args:
            image_sizes: `(height, width)` of each picture.

        Returns:
            The same without `pixel_values`; and how many of the images are kept, from the first on.
        """

        def placeholders(kept: int) -> list[int]:
            return [self.num_image_tokens_at(height, width) for height, width in image_sizes[:kept]]

        return self._encode_text(messages, image_sizes, max_length, placeholders)

    def _encode_text(
        self,
        messages: list[dict[str, Any]],
        image_sizes: Sequence[tuple[int, int]],
        max_length: int | None,
        placeholders: Callable[[int], list[int]],
    ) -> tuple[dict[str, Any], int]:
        """`placeholders` gives those of each of so many images."""
        text, spans = self.render(messages)
        if self.stop_token_id is None and self.stop_string is None:
            raise ValueError(
                "the processor's chat template does not mark what ends an answer, so the model would never "
                "learn to stop: choose one of ours, e.g. --version v1."
            )
        if self.misplaced_mark is not None:
            raise ValueError(
                f"the processor's chat template marks {self.misplaced_mark!r} as an answer, which is none: choose one "
                "of ours, e.g. --version v1, or move its {% generation %} out of the macro or block it stands in."
            )
        num_places, kept_images = text.count(self.image_token), len(image_sizes)
        if num_places != kept_images:
            raise ValueError(
                f"the conversation has {num_places} {self.image_token} and there are {kept_images} images: "
                f"the numbers must be equal."
            )
        ids, supervised = self._tokenize(text, spans)
        if max_length is not None:
            repeats = [self.num_image_tokens_at(height, width) for height, width in image_sizes]
            kept = num_kept(ids, supervised, self.image_token_id, repeats, max_length)
            ids, supervised = ids[:kept], supervised[:kept]
            kept_images = int(np.count_nonzero(ids == self.image_token_id))
        counts = np.ones(len(ids), dtype=np.int64)
        counts[ids == self.image_token_id] = placeholders(kept_images)
        ids, supervised = np.repeat(ids, counts), np.repeat(supervised, counts)
        if not supervised.any():
            raise ValueError(
                "the chat template marks no answer in the conversation, so there would be nothing to learn."
            )
        input_ids = torch.from_numpy(ids)
        labels = torch.from_numpy(np.where(supervised, ids, IGNORE_INDEX))
        encoded = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
        return encoded, kept_images

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
