"""Questions with pictures and answers, before training and after it, out of a run's `--eval_prompts`."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from hf_llava_ft.checkpoints.run_files import ANSWERS_FILE, PICTURES_FOLDER
from hf_llava_ft.errors import UserError
from hf_llava_ft.hub.model_card_values import Sample
from hf_llava_ft.reports.page import thumbnail


def write_samples(run: Path, count: int, folder: Path, inside: str) -> list[Sample]:
    """
    The first `count` prompts of a run. Their pictures are written small and without metadata.

    Args:
        run (`Path`): the output folder of the run.
        folder (`Path`): where the pictures are written.
        inside (`str`): its path inside the repository.

    Raises:
        UserError: if the run has answered nothing, or what it wrote is not there or damaged.
    """
    by_prompt: dict[int, list[dict[str, Any]]] = {}
    for line in _answers(run / ANSWERS_FILE):
        by_prompt.setdefault(line["index"], []).append(line)
    samples = []
    for index, lines in sorted(by_prompt.items())[:count]:
        last = max(lines, key=lambda line: line["step"])
        first = [line["answer"] for line in lines if line["step"] == 0 < last["step"]]
        names = [f"sample-{index}-{number}.jpg" for number in range(len(last["images"]))]
        for number, name in enumerate(names):
            _write_clean(run / PICTURES_FOLDER / f"{index}-{number}.jpg", folder / name)
        pictures = [f"{inside}/{name}" for name in names]
        samples.append(Sample(pictures, last["prompt"], first[0] if first else None, last["answer"]))
    return samples


def _answers(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(
            f"there are no samples to show: {path} does not exist; train with --eval_prompts, or ask for none."
        )
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for line in lines:
            is_sound = isinstance(line["index"], int) and isinstance(line["step"], int)
            if not is_sound or not all(isinstance(each, str) for each in (line["prompt"], line["answer"])):
                raise ValueError("a line has other values than a run writes")
            line["images"] = list(line["images"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): ask for no samples.") from error
    return lines


def _write_clean(source: Path, path: Path) -> None:
    try:
        picture = thumbnail(source)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(
            f"the picture {source} of a sample cannot be read ({error}): ask for no samples, or train again."
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, format="JPEG", quality=90)
