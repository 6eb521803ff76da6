"""What is said in turns, as columns: their words, the places of images in them, and the parts that they consist of.

All that looks at every character looks at the bytes of the column, in numpy.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_llava_ft.data.schema import IMAGE_PLACEHOLDER, user_content

_PLACEHOLDER = np.frombuffer(IMAGE_PLACEHOLDER.encode(), dtype=np.uint8)
_ONES = np.uint64(0x0101010101010101)  # times eight bytes: their sum, in the highest
# The first 0 to 7 of eight bytes.
_FIRST = (np.arange(8)[None, :] < np.arange(8)[:, None]).astype(np.uint8) * np.uint8(255)
_FIRST_BYTES = np.ascontiguousarray(_FIRST).view(np.uint64).ravel()


class Places(NamedTuple):
    """
    Where `<image>` stands, P times.

    Args:
        turns (`int64[P]`): in which turn, in order.
        at_edge (`bool[P]`): nothing of the turn is before it, or nothing behind it.
    """

    turns: np.ndarray
    at_edge: np.ndarray

    def counts(self, num_turns: int) -> np.ndarray:
        """`int64[T]`: how many are in each turn."""
        return np.bincount(self.turns, minlength=num_turns)


class Bytes:
    """
    The bytes of T texts, one behind another.

    Args:
        texts (`pa.StringArray[T]`): without null.
    """

    def __init__(self, texts: pa.Array):
        self._texts = texts
        _, offsets, data = texts.buffers()
        of_texts = np.frombuffer(offsets, dtype=np.int32)[texts.offset : texts.offset + len(texts) + 1]
        first, last = int(of_texts[0]), int(of_texts[-1])
        self._content = np.frombuffer(data, dtype=np.uint8)[first:last] if data else np.zeros(0, dtype=np.uint8)
        self._borders = of_texts.astype(np.int64) - first

    @property
    def have_nul(self) -> bool:
        return not self._content.min(initial=1)

    def num_words(self) -> np.ndarray:
        """`int64[T]`: how many pieces `str.split` makes of each."""
        content, borders = self._content, self._borders
        if not len(content):
            return np.zeros(len(self._texts), dtype=np.int64)
        # Eight bytes at a time, and eight more that a border at the very end may look at.
        begins = np.zeros(len(content) // 8 * 8 + 16, dtype=bool)
        is_word = content > 32
        begins[0] = is_word[0]
        np.greater(is_word[1:], is_word[:-1], out=begins[1 : len(content)])
        inner = borders[borders < len(content)]
        begins[inner] = is_word[inner]
        eights = begins.view(np.uint64)
        before = np.concatenate([[0], np.cumsum(eights * _ONES >> np.uint64(56), dtype=np.int64)])
        whole, rest = borders >> 3, borders & 7
        parts = ((eights[whole] & _FIRST_BYTES[rest]) * _ONES >> np.uint64(56)).astype(np.int64)
        counts = np.diff(before[whole] + parts)
        # Blank are 9 to 13, 28 to 32, and some of other alphabets.
        others = np.flatnonzero(content - np.uint8(28) > 99)
        others = others[(content[others] < 9) | (content[others] > 13)]
        if len(others):
            turns = self._turns_of(others)
            turns = turns[np.diff(turns, prepend=-1) > 0]
            counts[turns] = [len(text.split()) for text in self._texts.take(pa.array(turns)).to_pylist()]
        return counts

    def places_of_images(self) -> Places:
        content, borders = self._content, self._borders
        found = np.flatnonzero(content == _PLACEHOLDER[0])
        found = found[found <= len(content) - len(_PLACEHOLDER)]
        for place, byte in enumerate(_PLACEHOLDER[1:], start=1):
            found = found[content[found + place] == byte]
        turns = self._turns_of(found)
        starts, stops = found, found + len(_PLACEHOLDER)
        is_inside = stops <= borders[turns + 1]
        at_edge = (starts == borders[turns]) | (stops == borders[turns + 1])
        return Places(turns[is_inside], at_edge[is_inside])

    def _turns_of(self, places: np.ndarray) -> np.ndarray:
        """`int64[N]`: in which text each byte is."""
        return np.searchsorted(self._borders, places, side="right") - 1


def content_of(values: pa.Array, places: Places) -> pa.ListArray:
    """
    The content of each of T turns, as `user_content` has it.

    Args:
        values (`pa.StringArray[T]`): their texts.
        places (`Places`): of images in them.
    """
    num_places = places.counts(len(values))
    num_parts = (pc.binary_length(values).to_numpy(zero_copy_only=False) > 0).astype(np.int64)
    # Nearly all: one image, first or last in its turn. It goes to the front.
    usual = places.turns[places.at_edge & (num_places[places.turns] == 1)]
    unusual = np.setdiff1d(places.turns, usual)
    texts = values.take(pa.array(usual))
    texts = pc.utf8_trim_whitespace(pc.replace_substring(texts, IMAGE_PLACEHOLDER, "", max_replacements=1))
    has_text = pc.binary_length(texts).to_numpy(zero_copy_only=False) > 0
    texts = pc.binary_join_element_wise("\n", texts, "")
    contents = [user_content(text) for text in values.take(pa.array(unusual)).to_pylist()]
    num_parts[usual] = 1 + has_text
    num_parts[unusual] = [len(content) for content in contents]
    # Where each part's text is: among the values, behind them, or nowhere.
    ends = np.cumsum(num_parts)
    firsts = ends - num_parts
    sources = np.full(int(num_parts.sum()), -1, dtype=np.int64)
    whole = np.flatnonzero((num_parts > 0) & (num_places == 0))
    sources[firsts[whole]] = whole
    sources[firsts[usual[has_text]] + 1] = len(values) + np.flatnonzero(has_text)
    others: list[str] = []
    for first, content in zip(firsts[unusual].tolist(), contents, strict=True):
        for place, part in enumerate(content, start=first):
            if part["text"] is not None:
                sources[place] = len(values) + len(texts) + len(others)
                others.append(part["text"])
    is_image = sources < 0
    said = pa.concat_arrays([values, texts, pa.array(others, pa.string())])
    kinds = pa.DictionaryArray.from_arrays(pa.array(is_image.astype(np.int8)), ["text", "image"]).cast(pa.string())
    parts = pa.StructArray.from_arrays([kinds, said.take(pa.array(sources, mask=is_image))], ["type", "text"])
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], ends]).astype(np.int32)), parts)
