"""How many tokens conversations have, and how many of them are learned, by words where these tell."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hf_llava_ft.data.counting.borders import cuts_between_words
from hf_llava_ft.data.counting.rendering import ConversationTexts, Rendered
from hf_llava_ft.data.counting.words import WordCounts
from hf_llava_ft.processing.processing_llava import LlavaProcessor


class Counted(NamedTuple):
    """
    Args:
        num_ids (`int`): with one placeholder for each image.
        num_places (`int`): these placeholders.
        num_supervised (`int`): of the ids, those that are learned.
    """

    num_ids: int
    num_places: int
    num_supervised: int


class TokenCounter(ConversationTexts):
    """
    Args:
        processor (`LlavaProcessor`): encodes the rows; the numbers are those of its `tokenize_rendered`.
    """

    def __init__(self, processor: LlavaProcessor):
        super().__init__(processor)
        self._words = WordCounts(processor) if cuts_between_words(processor) else None

    def count(self, rendered: Sequence[Rendered]) -> list[Counted]:
        """Of each text and its spans, as `render` gave them; many in one call are faster than one after the other."""
        image_token, image_token_id = self._processor.image_token, self._processor.image_token_id
        of_words = self._words.counts(rendered) if self._words is not None else [None] * len(rendered)
        whole = [each for each, counted in zip(rendered, of_words, strict=True) if counted is None]
        tokenized = iter(self._processor.tokenize_rendered(whole))
        found = []
        for (text, _), counted in zip(rendered, of_words, strict=True):
            if counted is not None:
                num_ids, num_supervised = counted
                found.append(Counted(num_ids, text.count(image_token), num_supervised))
            else:
                ids, supervised = next(tokenized)
                num_places = int(np.count_nonzero(ids == image_token_id))
                found.append(Counted(len(ids), num_places, int(np.count_nonzero(supervised))))
        return found
