"""A row's tokens, looked at as it passes: for streams, whose rows nobody has counted before."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_llava_ft.data.problems import CHANGE, NOTHING_TO_LEARN, over_length
from hf_llava_ft.processing.processing_llava import LlavaProcessor


@dataclass
class TokenLimit:
    """
    Args:
        processor (`LlavaProcessor`): encodes the rows.
        longest (`int`): tokens that a row may have, images included.
        takes_longer (`bool`): a longer row passes where it can be cut at the limit, as the collator does.
    """

    processor: LlavaProcessor
    longest: int
    takes_longer: bool = False

    def __call__(self, row: dict[str, Any]) -> None:
        """
        Args:
            row (`dict`): with `messages`, and `images` as pictures.

        Raises:
            ValueError: if the row is too long, or teaches nothing.
        """
        processor = self.processor
        [(ids, supervised)] = processor.tokenize_rendered([processor.render(row["messages"])])
        repeats = [processor.num_image_tokens_at(image.height, image.width) for image in row["images"]]
        length = np.count_nonzero(ids != processor.image_token_id) + sum(repeats)
        if not supervised.any():
            raise ValueError(f"{NOTHING_TO_LEARN}; {CHANGE}")
        if length > self.longest:
            what, todo, can_be_cut = over_length(ids, supervised, processor, repeats, self.longest)
            if not (can_be_cut and self.takes_longer):
                raise ValueError(f"{what}; {todo}")
