"""CIDEr-D (arXiv 1411.5726): captions by their words, two to four in a row too, those that are rare counting most.

The scorer that everybody compares with, `pycocoevalcap`, comes in one wheel of 104 MB with Java programs of other
metrics; this is its arithmetic, with the same values on the same words. Its tokenizer, Stanford's, needs Java too:
here a word is a row of letters, digits, apostrophes and hyphens, in lower case, which differs in few captions.

How rare a word is follows from the references of all rows, so a row's score changes with the rows beside it, and of a
single row it is 0.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from hf_llava_ft.evaluation.metrics.given import Given, Metric, ratio

_LONGEST, _SIGMA = 4, 6.0
_WORD = re.compile(r"[\w'-]*\w[\w'-]*")

_Grams = Counter[tuple[str, ...]]


def words_of(caption: str) -> list[str]:
    return _WORD.findall(caption.lower())


def cider_scores(answers: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> np.ndarray:
    """`float64[N]` of captions in words, up to 10 each.

    Args:
        answers: of each row the words of the caption that is judged.
        references: of each row the captions to compare with.
    """
    num_rows_with: Counter[tuple[str, ...]] = Counter()
    grams = [[_grams(each) for each in of_row] for of_row in references]
    for of_row in grams:
        num_rows_with.update({gram for each in of_row for gram in each})
    log_rows = np.log(max(1, len(answers)))

    def weighted(counts: _Grams) -> dict[tuple[str, ...], float]:
        return {gram: count * (log_rows - np.log(max(1, num_rows_with[gram]))) for gram, count in counts.items()}

    scores = []
    for words, of_row in zip(answers, grams, strict=True):
        said = _grams(words)
        similar = [_similarity(weighted(said), weighted(each)) * _of_one_length(said, each) for each in of_row]
        scores.append(10 * np.mean(similar))
    return np.array(scores)


def _grams(words: Sequence[str]) -> _Grams:
    sizes = range(1, _LONGEST + 1)
    return Counter(tuple(words[at : at + size]) for size in sizes for at in range(len(words) - size + 1))


def _similarity(said: dict[tuple[str, ...], float], expected: dict[tuple[str, ...], float]) -> float:
    values = np.zeros(_LONGEST)
    squares = np.zeros((2, _LONGEST))
    for index, weights in enumerate((said, expected)):
        for gram, weight in weights.items():
            squares[index, len(gram) - 1] += weight**2
    for gram, weight in said.items():
        other = expected.get(gram, 0.0)
        values[len(gram) - 1] += min(weight, other) * other
    norms = np.sqrt(squares).prod(0)
    values = np.divide(values, norms, out=values, where=norms != 0)
    return float(np.mean(values))


def _of_one_length(said: _Grams, expected: _Grams) -> float:
    """1 for captions of one length, less for others; the length is the number of pairs of words, as there."""
    lengths = [sum(count for gram, count in each.items() if len(gram) == 2) for each in (said, expected)]
    return float(np.exp(-((lengths[0] - lengths[1]) ** 2) / (2 * _SIGMA**2)))


def _statistics(rows: Sequence[Given]) -> np.ndarray:
    answers = [words_of(row.answer) for row in rows]
    references = [[words_of(reference) for reference in row.references] for row in rows]
    scores = cider_scores(answers, references)
    return np.stack((scores, np.ones(len(rows))), axis=1)


CIDER = Metric("cider", "CIDEr", _statistics, {"cider": ratio}, ratio, is_share=False)
