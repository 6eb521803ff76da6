"""The figures of one model or of two side by side, and the rows that got better and worse."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_llava_ft.evaluation.bootstrap import Interval, difference, interval
from hf_llava_ft.evaluation.metrics.given import Given, Metric

_EQUAL = 1e-9


@dataclass(frozen=True)
class Figure:
    """
    Args:
        metric (`Metric`): what it is of.
        name (`str`): its own, `f1` of `yes_no` say.
        tuned (`Interval`): of the model that is evaluated.
        base (`Interval`, *optional*): of the one that it is compared with.
        change (`Interval`, *optional*): of the same rows, drawn as pairs.
    """

    metric: Metric
    name: str
    tuned: Interval
    base: Interval | None = None
    change: Interval | None = None

    @property
    def is_beyond_noise(self) -> bool:
        """Whether the bounds of the change leave out zero."""
        return self.change is not None and (self.change.low > 0 or self.change.high < 0)

    @property
    def is_worse(self) -> bool:
        """Whether the change is for the worse, beyond noise."""
        if self.change is None or not self.is_beyond_noise:
            return False
        return (self.change.value > 0) != self.metric.higher_is_better

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"metric": self.metric.name, "figure": self.name, "tuned": vars(self.tuned)}
        if self.base is not None and self.change is not None:
            found |= {"base": vars(self.base), "change": vars(self.change), "beyond_noise": self.is_beyond_noise}
        return found


@dataclass(frozen=True)
class Scores:
    """
    Args:
        figures (`list[Figure]`): of each metric all, its main one first.
        tuned, base (`ndarray`): `float64[N]`, each row's score under the first metric; base may be None.
        higher_is_better (`bool`): of these scores.
    """

    figures: list[Figure]
    tuned: np.ndarray
    base: np.ndarray | None
    higher_is_better: bool

    @property
    def gains(self) -> np.ndarray | None:
        """`float64[N]`, positive where a row got better."""
        if self.base is None:
            return None
        return (self.tuned - self.base) * (1 if self.higher_is_better else -1)

    @property
    def better(self) -> list[int]:
        """Places of the rows that got better, most first."""
        return [] if self.gains is None else _beyond(-self.gains)

    @property
    def worse(self) -> list[int]:
        """Places of the rows that got worse, most first."""
        return [] if self.gains is None else _beyond(self.gains)


def _beyond(losses: np.ndarray) -> list[int]:
    order = np.argsort(losses, kind="stable")
    return [int(place) for place in order if losses[place] < -_EQUAL]


def scored(
    metrics: Sequence[Metric],
    tuned: Sequence[Given],
    base: Sequence[Given] | None = None,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Scores:
    """
    Args:
        metrics (`list[Metric]`): the first is that of the rows' scores.
        tuned, base (`list[Given]`): the same rows.
        draws, seed (`int`): of the bootstrap.
    """
    figures, of_rows = [], None
    for metric in metrics:
        after = metric.statistics(tuned)
        before = None if base is None else metric.statistics(base)
        for name, figure in metric.figures.items():
            found = Figure(metric, name, interval(after, figure, draws=draws, seed=seed))
            if before is not None:
                of_base = interval(before, figure, draws=draws, seed=seed)
                change = difference(before, after, figure, draws=draws, seed=seed)
                found = Figure(metric, name, found.tuned, of_base, change)
            figures.append(found)
        if of_rows is None:
            of_rows = _of_rows(metric, after), None if before is None else _of_rows(metric, before)
    assert of_rows is not None  # there is a metric at least
    return Scores(figures, *of_rows, metrics[0].higher_is_better)


def _of_rows(metric: Metric, statistics: np.ndarray) -> np.ndarray:
    return np.array([metric.of_row(each) for each in statistics])
