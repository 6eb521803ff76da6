"""What `evaluation.json` in a model's folder holds, read with care: it may be somebody else's."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hf_llava_ft.checkpoints.files import read_json
from hf_llava_ft.checkpoints.run_files import EVALUATION_FILE

MAX_RESULTS = 200
_MAX_TEXT = 200


@dataclass(frozen=True)
class EvaluationResult:
    """
    Args:
        data (`str`): name of the data, without folders, or Hub id.
        rows (`int`): how many there were.
        metric, figure (`str`): by name, such as `yes_no` and `f1`.
        value, low, high (`float`): with the bounds of 95 of 100 bootstrap draws.
    """

    data: str
    rows: int
    metric: str
    figure: str
    value: float
    low: float
    high: float


def read_results(folder: str | Path) -> list[EvaluationResult]:
    """Those in a folder here, without what has not the right names and types."""
    if not Path(folder, EVALUATION_FILE).is_file():
        return []
    content: Any = (read_json(str(folder), EVALUATION_FILE) or {}).get("results")
    found = []
    for each in content[:MAX_RESULTS] if isinstance(content, list) else ():
        values = {field.name: each.get(field.name) for field in fields(EvaluationResult)} if _is_dict(each) else {}
        texts = [values.get(name) for name in ("data", "metric", "figure")]
        numbers = [values.get(name) for name in ("rows", "value", "low", "high")]
        if all(isinstance(text, str) and len(text) <= _MAX_TEXT for text in texts) and all(map(_is_number, numbers)):
            found.append(EvaluationResult(**values))  # type: ignore[arg-type]
    return found


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
