"""From rows of the data set to a batch of tensors. Runs in the DataLoader's workers, where images are decoded."""

from dataclasses import dataclass
from typing import Any

from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.processing_llava import LlavaProcessor


@dataclass
class LlavaCollator:
    """
    Args:
        processor (`LlavaProcessor`): encodes and pads.
        padding_side (`"right"` or `"left"`): right for training.
    """

    processor: LlavaProcessor
    padding_side: str = "right"

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch as [`LlavaProcessor.pad`] gives it, from rows with `messages`, `images` and `id`."""
        return self.processor.pad([self._encode(row) for row in rows], padding_side=self.padding_side)

    def _encode(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return self.processor.encode_conversation(row["messages"], row["images"])
        except (ValueError, OSError) as error:
            raise UserError(f"row with id {row.get('id')!r}: {error}") from error
