"""Questions for yes or no, as POPE (arXiv 2305.10355) asks whether an object is in the picture."""

from collections.abc import Sequence

import numpy as np

from hf_llava_ft.errors import UserError
from hf_llava_ft.evaluation.metrics.given import Given, Metric

_TP, _FP, _TN, _FN = range(4)


def says_yes(answer: str) -> bool:
    """LLaVA's reading of POPE's answers: of the first sentence, and no unless it holds neither `no` nor `not`."""
    words = answer.partition(".")[0].replace(",", "").split()
    return not {"No", "not", "no"} & set(words)


def yes_or_no(reference: str) -> bool | None:
    """What the data says by its first word; None if that is neither."""
    first = reference.replace(",", " ").replace(".", " ").lower().split()[:1]
    return {"yes": True, "no": False}.get(first[0]) if first else None


def is_yes_of(references: Sequence[str]) -> bool:
    """
    Raises:
        UserError: if the data says neither.
    """
    is_yes = yes_or_no(references[0])
    if is_yes is None:
        raise UserError(
            f"--metric yes_no: an answer of the data is {references[0][:40]!r}, neither yes nor no: use "
            "another metric."
        )
    return is_yes


def _counts(rows: Sequence[Given]) -> np.ndarray:
    counts = np.zeros((len(rows), 4))
    for index, row in enumerate(rows):
        is_yes = is_yes_of(row.references)
        said_yes = says_yes(row.answer) if row.answer.strip() else not is_yes  # no answer is a wrong one
        counts[index, (_TP if is_yes else _FP) if said_yes else (_FN if is_yes else _TN)] = 1
    return counts


def _share(part: float, of: float) -> float:
    return float(part / of) if of else 0.0


def _accuracy(sums: np.ndarray) -> float:
    return _share(sums[_TP] + sums[_TN], sums.sum())


def _precision(sums: np.ndarray) -> float:
    return _share(sums[_TP], sums[_TP] + sums[_FP])


def _recall(sums: np.ndarray) -> float:
    return _share(sums[_TP], sums[_TP] + sums[_FN])


def _f1(sums: np.ndarray) -> float:
    return _share(2 * sums[_TP], 2 * sums[_TP] + sums[_FP] + sums[_FN])


def _yes_share(sums: np.ndarray) -> float:
    return _share(sums[_TP] + sums[_FP], sums.sum())


YES_NO = Metric(
    "yes_no",
    "Yes or no, accuracy",
    _counts,
    {"accuracy": _accuracy, "precision": _precision, "recall": _recall, "f1": _f1, "yes_share": _yes_share},
    _accuracy,
)
