"""What a metric is given of a row, and what it is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Given:
    """
    Args:
        answer (`str`): of the model; empty where it gave none.
        references (`tuple[str, ...]`): the answers of the data, at least one.
        choices (`tuple[str, ...]`): of a multiple choice, those after A, B, ...
        loss (`tuple[float, int]`, *optional*): of the data's answers, the sum over their tokens, and how many.
        choice_losses (`tuple[float, ...]`): the mean loss a token of each choice.
    """

    answer: str
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()
    loss: tuple[float, int] | None = None
    choice_losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class Metric:
    """
    A metric as sums over rows, so that any rows of them can be taken together again.

    Args:
        name (`str`): what `--metric` calls it.
        title (`str`): in words.
        statistics: of rows `float64[N, K]`, what is added up.
        figures: by name what follows from the sums `float64[K]`; the first is the metric itself.
        of_row: a row's own score from its statistics `float64[K]`.
        higher_is_better (`bool`): of all figures and of a row's score.
        asks (`bool`): whether it is of answers, not of losses alone.
        needs_choices (`bool`): whether it is of the losses of choices.
        is_share (`bool`): whether the figures are shares, shown in percent.
    """

    name: str
    title: str
    statistics: Callable[[Sequence[Given]], np.ndarray]
    figures: Mapping[str, Callable[[np.ndarray], float]]
    of_row: Callable[[np.ndarray], float]
    higher_is_better: bool = True
    asks: bool = True
    needs_choices: bool = False
    is_share: bool = True
    needs: tuple[str, ...] = field(default=())


def mean_metric(name: str, title: str, score: Callable[[Given], float], **more: bool) -> Metric:
    """One whose value is the mean of the rows' scores."""

    def statistics(rows: Sequence[Given]) -> np.ndarray:
        return np.array([[score(row), 1.0] for row in rows]).reshape(-1, 2)

    return Metric(name, title, statistics, {name: ratio}, ratio, **more)  # type: ignore[arg-type]


def ratio(sums: np.ndarray) -> float:
    """The first by the second; 0 of nothing."""
    return float(sums[0] / sums[1]) if sums[1] else 0.0
