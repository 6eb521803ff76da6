"""How likely a model finds the answers of the data: mean loss a token, and the perplexity that is its exponential."""

import math
from collections.abc import Sequence

import numpy as np

from hf_llava_ft.evaluation.metrics.given import Given, Metric, ratio


def _sums(rows: Sequence[Given]) -> np.ndarray:
    return np.array([row.loss or (0.0, 0) for row in rows], dtype=np.float64).reshape(-1, 2)


def _perplexity(sums: np.ndarray) -> float:
    return math.exp(min(ratio(sums), 700.0))


LOSS = Metric(
    "loss",
    "Mean loss a token",
    _sums,
    {"loss": ratio, "perplexity": _perplexity},
    ratio,
    higher_is_better=False,
    asks=False,
    is_share=False,
)
