"""`evaluation.json` in the folder of a model: what its card will tell of all evaluations."""

import json
from collections.abc import Callable
from pathlib import Path

from hf_llava_ft.checkpoints.evaluation_results import EvaluationResult, read_results
from hf_llava_ft.checkpoints.run_files import EVALUATION_FILE
from hf_llava_ft.evaluation.scores import Scores
from hf_llava_ft.whole_files import write_atomically


def results_of(data: str, num_rows: int, scores: Scores) -> list[EvaluationResult]:
    """The figures of the model that is evaluated."""
    return [
        EvaluationResult(
            data=data,
            rows=num_rows,
            metric=figure.metric.name,
            figure=figure.name,
            value=figure.tuned.value,
            low=figure.tuned.low,
            high=figure.tuned.high,
        )
        for figure in scores.figures
    ]


def keep_results(model: str, new: list[EvaluationResult], tell: Callable[[str], None]) -> None:
    """Adds figures to those that the folder has, in place of those of the same data; of a Hub id none are kept."""
    folder = Path(model)
    if not folder.is_dir():
        return
    names = {(each.data, each.metric) for each in new}
    kept = [each for each in read_results(folder) if (each.data, each.metric) not in names]
    content = json.dumps({"results": [vars(each) for each in [*kept, *new]]}, indent=2) + "\n"
    try:
        write_atomically(folder / EVALUATION_FILE, lambda path: path.write_text(content, encoding="utf-8"))
    except OSError as error:
        tell(f"Note: {folder} can't be written to ({error.strerror}), so its card will not tell of this.")
