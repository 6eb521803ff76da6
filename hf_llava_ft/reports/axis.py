"""Where the axes of a curve begin and end, and their marks."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

# A loss that spends most of the run in so small a part of the height is drawn on a logarithmic axis.
_LOW = 0.15


@dataclass(frozen=True)
class Axis:
    """
    The axis of the values.

    Args:
        bottom, top (`float`): the least and the largest value that it shows.
        is_logarithmic (`bool`): equal steps are equal factors.
    """

    bottom: float
    top: float
    is_logarithmic: bool = False

    @classmethod
    def of(cls, values: list[float]) -> Axis:
        """
        The one on which a fall is seen.

        It begins at 0, unless the values would then be a line along its upper half, as of a loss that falls from 2.4
        to 2.1. It is logarithmic where the first steps would press the rest into a line at the bottom. What changes by
        less than a hundredth is shown as level.
        """
        finite = [value for value in values if math.isfinite(value)]
        from_zero = cls.from_zero(values)
        lowest, top = min(finite, default=0.0), from_zero.top
        if 0 < lowest <= top / 10 and statistics.median(finite) < _LOW * top:
            return cls(lowest / 1.1, top, is_logarithmic=True)
        if lowest <= top / 2 or top - lowest < top / 100:
            return from_zero
        return cls(lowest - (top - lowest) / 10, top)

    @classmethod
    def from_zero(cls, values: list[float]) -> Axis:
        return cls(0.0, max((value for value in values if math.isfinite(value)), default=0.0) or 1.0)

    @property
    def note(self) -> str:
        """What stands behind the name of the values."""
        return " (logarithmic)" if self.is_logarithmic else ""

    @property
    def with_room_above(self) -> float:
        """The upper end, a little above the largest value."""
        if self.is_logarithmic:
            return self.top * (self.top / self.bottom) ** 0.04
        return self.top + 0.04 * (self.top - self.bottom)

    def height_of(self, value: float) -> float:
        """0 at the bottom, 1 at the top."""
        if self.is_logarithmic:
            return math.log(value / self.bottom) / math.log(self.top / self.bottom)
        return (value - self.bottom) / (self.top - self.bottom)

    def ticks(self, number: int) -> list[float]:
        """About so many round values, from the bottom up to the top: multiples of 1, 2 or 5 times a power of ten."""
        if not self.is_logarithmic:
            return _multiples(self.bottom, self.top, number)
        powers = range(math.floor(math.log10(self.bottom)), math.ceil(math.log10(self.top)) + 1)
        for factors in ((1, 2, 5), (1, 3), (1,)):
            marks = [factor * 10.0**power for power in powers for factor in factors]
            marks = [mark for mark in marks if self.bottom <= mark <= self.top]
            if len(marks) <= 2 * number:
                break
        return marks[:: math.ceil(len(marks) / (2 * number))] if marks else marks


def step_ticks(num_steps: int) -> list[int]:
    """Round step numbers, with step 1 first, since a curve that begins at step 1 should say so."""
    if num_steps < 3:
        return list(range(1, num_steps + 1))
    ticks = [int(tick) for tick in _multiples(0.0, num_steps, min(6, num_steps))]
    return [1] + [tick for tick in ticks if tick > 1 and tick - 1 >= (ticks[1] - ticks[0]) / 2]


def _multiples(bottom: float, top: float, number: int) -> list[float]:
    span = (top - bottom) / number
    power = 10.0 ** math.floor(math.log10(span))
    stride = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span)
    return [i * stride for i in range(math.ceil(bottom / stride - 1e-9), int(top / stride + 1e-9) + 1)]
