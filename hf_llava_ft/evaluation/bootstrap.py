"""How far a figure could be off: rows are drawn again with replacement, many times, and it is computed anew."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

_CELLS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A figure with the bounds between which it lies in 95 of 100 draws."""

    value: float
    low: float
    high: float


def interval(
    statistics: np.ndarray, figure: Callable[[np.ndarray], float], *, draws: int = 1000, seed: int = 0
) -> Interval:
    """
    Args:
        statistics (`float64[N, K]`): see `Metric`.
        figure: of the sums.
    """
    drawn = np.array([figure(sums) for sums in _drawn_sums(statistics, draws, seed)])
    return Interval(figure(statistics.sum(0)), *_bounds(drawn))


def difference(
    before: np.ndarray,
    after: np.ndarray,
    figure: Callable[[np.ndarray], float],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """Of `after` against `before`, drawn as pairs: the same rows of both each time."""
    num_columns = before.shape[1]
    pairs = np.concatenate((before, after), axis=1)

    def gain(sums: np.ndarray) -> float:
        return figure(sums[num_columns:]) - figure(sums[:num_columns])

    return interval(pairs, gain, draws=draws, seed=seed)


def _drawn_sums(statistics: np.ndarray, draws: int, seed: int) -> Iterator[np.ndarray]:
    rng, num_rows = np.random.default_rng(seed), len(statistics)
    at_once = max(1, _CELLS_AT_ONCE // max(1, num_rows))
    for start in range(0, draws, at_once):
        number = min(at_once, draws - start)
        times = rng.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=number)  # (draws, N)
        yield from times @ statistics


def _bounds(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(low), float(high)
