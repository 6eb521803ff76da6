"""Short answers: exact match, relaxed accuracy as in ChartQA, and ANLS as in DocVQA."""

from collections.abc import Sequence

from hf_llava_ft.evaluation.metrics.given import Given, mean_metric

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05


def is_exact(answer: str, reference: str) -> bool:
    """Equal but for capitals, blanks and a full stop at the end."""
    return _plain(answer) == _plain(reference)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def is_relaxed_match(answer: str, reference: str) -> bool:
    """
    ChartQA's rule: a number within 5 % of that of the reference; everything else, and a reference of 0, letter by
    letter but for capitals. `25%` is the number 0.25.
    """
    said, expected = _number(answer), _number(reference)
    if said is not None and expected:
        return abs(said - expected) / abs(expected) <= RELAXED_TOLERANCE
    return answer.strip().lower() == reference.strip().lower()


def _number(text: str) -> float | None:
    text = text.strip()
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def anls(answer: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one row: of the nearest reference, 0 below a half."""
    similarities = []
    for reference in references:
        said, expected = (" ".join(text.lower().split()) for text in (answer, reference))
        longest = max(len(said), len(expected))
        similarities.append(1 - edit_distance(said, expected) / longest if longest else 1.0)
    best = max(similarities)
    return best if best >= ANLS_THRESHOLD else 0.0


def edit_distance(first: Sequence[object], second: Sequence[object]) -> int:
    """Levenshtein's: how many elements are put in, left out or exchanged."""
    above = list(range(len(second) + 1))
    for row, left in enumerate(first, 1):
        current = [row]
        for column, right in enumerate(second, 1):
            current.append(min(above[column] + 1, current[-1] + 1, above[column - 1] + (left != right)))
        above = current
    return above[-1]


def _any(rule):
    def score(row: Given) -> float:
        return float(any(rule(row.answer, reference) for reference in row.references))

    return score


EXACT_MATCH = mean_metric("exact_match", "Exact match", _any(is_exact))
RELAXED_ACCURACY = mean_metric("relaxed_accuracy", "Relaxed accuracy", _any(is_relaxed_match))
ANLS = mean_metric("anls", "ANLS", lambda row: anls(row.answer, row.references))
