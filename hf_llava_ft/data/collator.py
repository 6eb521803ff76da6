"""From rows of the dataset to a batch of tensors. Runs in the DataLoader's workers, where images are decoded."""

import io
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from hf_llava_ft.data.unchanged import RowsAsTheyWere
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.conversation_llava import IGNORE_INDEX
from hf_llava_ft.processing.picture_opening_llava import PictureOpening, rgb_picture
from hf_llava_ft.processing.processing_llava import LlavaProcessor


@dataclass
class LlavaCollator:
    """
    Args:
        processor (`LlavaProcessor`): encodes and pads.
        padding_side (`"right"` or `"left"`): right for training.
        uint8_pixels (`bool`): hand pictures over as uint8 where the image processor allows it, a quarter of the bytes.
            `LlavaTrainer` asks for it and normalises them on its device; whoever feeds a model with the batch itself
            leaves it off.
        max_length (`int`, *optional*): cut rows behind so many tokens; see `encode_conversation`.
        as_they_were (`RowsAsTheyWere`, *optional*): asked of every row whether its files still are.
    """

    processor: LlavaProcessor
    padding_side: str = "right"
    uint8_pixels: bool = False
    max_length: int | None = None
    as_they_were: RowsAsTheyWere | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch as [`LlavaProcessor.pad`] gives it, from rows with `messages`, `images` and `id`."""
        return self.processor.pad([self.encoded(row) for row in rows], padding_side=self.padding_side)

    def encoded(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row as `encode_conversation` gives it, with its pictures read."""
        if self.as_they_were is not None:
            self.as_they_were.check(row)
        try:
            pictures = [open_picture(image, self.processor.picture_opening) for image in row["images"]]
            return self.processor.encode_conversation(
                row["messages"], pictures, uint8_pixels=self.uint8_pixels, max_length=self.max_length
            )
        except (ValueError, OSError) as error:
            raise UserError(f"row with id {row.get('id')!r}: {error}") from error


@dataclass
class FlatCollator:
    """
    Rows without padding: as one row of the batch, one document behind the other.

    Args:
        collator (`LlavaCollator`): encodes the rows.
        fill_to (`int`, *optional*): fill up to so many tokens with a document of padding, of which nothing is learned,
            so that all batches have one shape.
    """

    collator: LlavaCollator
    fill_to: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """
        Returns:
            `input_ids`, `labels`, `attention_mask` and `position_ids` `int64[1, T]`, of which the positions begin anew
            with each document, and its first label is -100, since nothing of the document before predicts it;
            `document_lengths` (`list[int]`), whose sum is T; `borders` `int32[documents + 1]`, the same added up;
            `num_rows` (`int`), without padding; and the pictures of all documents, in order.
        """
        documents = [self.collator.encoded(row) for row in rows]
        left = 0 if self.fill_to is None else self.fill_to - sum(len(document["input_ids"]) for document in documents)
        if left:
            documents.append(_padding(left, self.collator.processor.tokenizer.pad_token_id))
        lengths = [len(document["input_ids"]) for document in documents]
        labels = [document["labels"].clone() for document in documents]
        for each in labels:
            each[0] = IGNORE_INDEX
        batch: dict[str, Any] = {
            "input_ids": torch.cat([document["input_ids"] for document in documents])[None],
            "labels": torch.cat(labels)[None],
            "attention_mask": torch.cat([document["attention_mask"] for document in documents])[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "document_lengths": lengths,
            "num_rows": len(rows),
            "borders": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        }
        for name in self.collator.processor.image_processor.model_input_names:  # pixel_values; image_sizes
            parts = [document[name] for document in documents if name in document]
            if parts:
                batch[name] = torch.cat(parts)
        return batch


class PackCollator(FlatCollator):
    """The same of a batch that is one pack, as `PackedRows` gives it."""

    def __call__(self, packs: list[list[dict[str, Any]]]) -> dict[str, Any]:  # type: ignore[override]
        [rows] = packs
        return super().__call__(rows)


def _padding(length: int, token_id: int) -> dict[str, Any]:
    ids = torch.full((length,), token_id)
    labels = torch.full_like(ids, IGNORE_INDEX)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.zeros_like(ids)}


def open_picture(image: Image.Image | dict[str, Any], opening: PictureOpening = "upright") -> Image.Image:
    """
    A decoded RGB picture, from one or from `{"path": ..., "bytes": ...}` as an undecoded `datasets.Image` column has
    it, opened in the way `opening`; the processor of a model says which is its own.
    """
    if isinstance(image, dict):
        with Image.open(io.BytesIO(image["bytes"]) if image.get("bytes") else image["path"]) as opened:
            return rgb_picture(opened, opening)
    return rgb_picture(image, opening)
