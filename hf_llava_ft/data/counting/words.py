"""How many tokens a text has, from those of its words.

Between most words no token can lie across the border, and what stands on one side of it changes nothing on the other.
Where a tokenizer is of a kind for which that follows from its own file (`cuts_between_words`), a text has as many
tokens as its words together; a word is tokenised once, however often it is said.

A border is a space; `borders.py` says where, and of which tokenizers.

What may surprise: a word may hold anything but a border, so `cat.</s>USER:` is one. Words at the ends of a span are
tokenised with it, by `tokenize_rendered`, which is the one that says what is learned. In doubt nothing is said
(`None`), and the text is tokenised whole.
"""

from collections.abc import Sequence
from itertools import chain, filterfalse, islice
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_llava_ft.data.counting.borders import BEFORE, SPACE
from hf_llava_ft.data.counting.rendering import Rendered
from hf_llava_ft.processing.processing_llava import LlavaProcessor

# A number of tokens that no text has: a sum so large is of a word that cannot be counted alone.
_NOT_TO_BE_SAID = 2**35
_WORDS_AT_ONCE = 100
_MAX_KEPT = 200_000  # words


class _Plan(NamedTuple):
    """
    How a text is counted.

    Args:
        outside, inside (`list[str]`): texts of which nothing is learned, and all, of words with a space between them.
        exact (`list[_Piece]`): the first word, the last, and those with the border of a span inside.
    """

    outside: list[str]
    inside: list[str]
    exact: list["_Piece"]


class _Piece(NamedTuple):
    """
    A word that is tokenised as it stands there.

    Args:
        text (`str`): with its space.
        spans (`tuple`): of what is learned, within it.
        is_first, is_last (`bool`): nothing stands in front of it, or behind it.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    is_first: bool
    is_last: bool


class WordCounts:
    """
    Args:
        processor (`LlavaProcessor`): one for which [`cuts_between_words`] holds.
    """

    def __init__(self, processor: LlavaProcessor):
        self._processor = processor
        self._added = tuple(token.content for token in processor.tokenizer.added_tokens_decoder.values())
        self._last_of_added = {token[-1] for token in self._added}
        self._words: dict[str, int] = {}
        self._pieces: dict[_Piece, tuple[int, int]] = {}
        self._num_before = len(processor.tokenize_rendered([(BEFORE, [])])[0][0])

    def counts(self, rendered: Sequence[Rendered]) -> list[tuple[int, int] | None]:
        """
        Args:
            rendered: text and spans, as `LlavaProcessor.render` gives them.

        Returns:
            For each its tokens and how many of them are learned, as `tokenize_rendered` has them; None where words do
            not tell.
        """
        if len(self._words) > _MAX_KEPT or len(self._pieces) > _MAX_KEPT:
            self._words.clear()
            self._pieces.clear()
        plans = [self._plan(text, spans) for text, spans in rendered]
        known = [plan for plan in plans if plan is not None]
        sums = iter(self._sums(known))
        found = [None if plan is None else next(sums) for plan in plans]
        for place, counted in enumerate(found):
            if counted is not None and counted[0] >= _NOT_TO_BE_SAID:
                plan = plans[place]
                assert plan is not None
                found[place] = self._sum_of_joined(plan)
        return found

    def _sums(self, plans: list["_Plan"]) -> list[tuple[int, int]]:
        """Tokens and learned ones of each plan."""
        texts = [text for plan in plans for text in (*plan.outside, *plan.inside)]
        words, codes, ends = _words_of(texts)
        self._learn(words, plans)
        tokens = np.fromiter(map(self._words.__getitem__, words), dtype=np.int64, count=len(words))
        before = np.concatenate([[0], np.cumsum(tokens[codes])])[np.concatenate([[0], ends])]
        sums = iter(np.diff(before).tolist())
        found = []
        for plan in plans:
            outside = sum(islice(sums, len(plan.outside)))
            learned = sum(islice(sums, len(plan.inside)))
            total = outside + learned
            for num_tokens, num_learned in map(self._pieces.__getitem__, plan.exact):
                total += num_tokens
                learned += num_learned
            found.append((total, learned))
        return found

    def _sum_of_joined(self, plan: "_Plan") -> tuple[int, int] | None:
        """With those words joined that no border is between; None if that does not tell either."""
        outside, inside = (self._joined(" ".join(texts).split(" ")) if texts else [] for texts in plan[:2])
        self._learn([*outside, *inside], [])
        learned = sum(map(self._words.__getitem__, inside))
        total = learned + sum(map(self._words.__getitem__, outside))
        for num_tokens, num_learned in map(self._pieces.__getitem__, plan.exact):
            total += num_tokens
            learned += num_learned
        return (total, learned) if total < _NOT_TO_BE_SAID else None

    def _plan(self, text: str, spans: list[tuple[int, int]]) -> "_Plan | None":
        """None where words can't tell: an image inside of a span would not be learned."""
        length, image = len(text), self._processor.image_token
        if image in text and any(text.find(image, *span) >= 0 for span in spans):
            return None
        # The pieces that are taken as they stand: first, last, and around each border of a span.
        begin, end = 0, self._end_of_word(text, 1)
        pieces = [(begin, end)]
        for place in [*chain.from_iterable(spans), length]:
            if place <= end:
                continue
            if place < length and text[place] == " " and self._ends_before_border(text, place):
                begin = end = place
            else:
                begin, end = self._begin_of_word(text, end, place), self._end_of_word(text, place)
            pieces.append((begin, end))
        return _filled(text, spans, pieces)

    def _end_of_word(self, text: str, start: int) -> int:
        """The first border at or behind `start`, or the end."""
        while (found := text.find(" ", start)) >= 0:
            if self._ends_before_border(text, found):
                return found
            start = found + 1
        return len(text)

    def _begin_of_word(self, text: str, start: int, stop: int) -> int:
        """The last border in front of `stop`, at the earliest `start`, which is one."""
        while (found := text.rfind(" ", start, stop)) > start:
            if self._ends_before_border(text, found):
                return found
            stop = found
        return start

    def _joined(self, words: list[str]) -> list[str]:
        """Words that were cut at every space, with those joined that no border is between."""
        joined: list[str] = []
        held = None
        for word in words:
            if held is not None:
                word = f"{held} {word}"
                held = None
            elif self._words[word] < _NOT_TO_BE_SAID:
                joined.append(word)
                continue
            if word and self._ends_before_border(word, len(word)):
                joined.append(word)
            else:
                held = word
        assert held is None  # there is a border behind the last of each text
        return joined

    def _learn(self, words: list[str], plans: list["_Plan"]) -> None:
        """Tokenises the words, and the pieces of plans, that are not known."""
        new = list(dict.fromkeys(filterfalse(self._words.__contains__, words)))
        self._words.update(dict.fromkeys(new, _NOT_TO_BE_SAID))
        new = [word for word in new if word and self._ends_before_border(word, len(word)) and SPACE not in word]
        for start in range(0, len(new), _WORDS_AT_ONCE):
            self._learn_words(new[start : start + _WORDS_AT_ONCE])
        pieces = chain.from_iterable(plan.exact for plan in plans)
        self._learn_pieces(list(dict.fromkeys(filterfalse(self._pieces.__contains__, pieces))))

    def _learn_words(self, words: list[str]) -> None:
        """As one text, in which each has its tokens."""
        encoded = self._processor.tokenizer(
            " ".join([BEFORE, *words]), add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        flat = np.fromiter(chain.from_iterable(encoded["offset_mapping"]), dtype=np.int64)
        starts, ends = flat[::2], flat[1::2]
        borders = len(BEFORE) + np.cumsum([0] + [1 + len(word) for word in words])
        counts = np.diff(np.searchsorted(ends, borders, side="right"))
        # A token without characters would not be learned.
        is_empty = np.searchsorted(borders, ends[starts >= ends], side="left") - 1
        counts[is_empty[is_empty >= 0]] = _NOT_TO_BE_SAID
        self._words.update(zip(words, counts.tolist(), strict=True))

    def _learn_pieces(self, pieces: list["_Piece"]) -> None:
        rendered: list[Rendered] = []
        for piece in pieces:
            before = "" if piece.is_first else BEFORE
            spans = [(start + len(before), end + len(before)) for start, end in piece.spans]
            rendered.append((before + piece.text, spans))
        for piece, (ids, supervised) in zip(pieces, self._processor.tokenize_rendered(rendered), strict=True):
            num_tokens = len(ids) - (0 if piece.is_first else self._num_before)
            self._pieces[piece] = _NOT_TO_BE_SAID if SPACE in piece.text else num_tokens, int(supervised.sum())

    def _ends_before_border(self, text: str, end: int) -> bool:
        """Whether a space behind `text[:end]` would be a border."""
        last = text[end - 1]
        if last.isspace() or not last.isprintable():
            return False
        return last not in self._last_of_added or not text.endswith(self._added, 0, end)


def _filled(text: str, spans: list[tuple[int, int]], pieces: list[tuple[int, int]]) -> "_Plan":
    """A plan of a text of which `pieces` are taken as they stand."""
    plan = _Plan([], [], [])
    length, before, first = len(text), 0, 0
    for begin, end in pieces:
        while first < len(spans) and spans[first][1] <= before:
            first += 1
        if begin > before:
            is_inside = first < len(spans) and spans[first][0] <= before
            (plan.inside if is_inside else plan.outside).append(text[before + 1 : begin])
        if end > begin:
            within = []
            for start, stop in spans[first:]:
                if start >= end:
                    break
                if stop > begin:
                    within.append((max(start, begin) - begin, min(stop, end) - begin))
            plan.exact.append(_Piece(text[begin:end], tuple(within), begin == 0, end == length))
        before = end
    return plan


def _words_of(texts: list[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """
    The words between spaces of T texts, as `str.split` has them.

    Returns:
        Each word once; for all words of the texts one after another, which of them it is, `int[W]`; and how many words
        there are up to the end of each text, `int64[T]`.
    """
    split = pc.split_pattern(pa.array(texts, pa.string()), " ")
    encoded = split.flatten().dictionary_encode()
    ends = np.cumsum(pc.list_value_length(split).to_numpy(zero_copy_only=False), dtype=np.int64)
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy(), ends
