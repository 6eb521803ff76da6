"""Answers and pictures of `EvalAnswers` where the Trainer reports to: TensorBoard, Weights & Biases, trackio.

TensorBoard has a line of time for each text. The other two show the last table of a name, so theirs holds all answers
so far.
"""

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

NAME = "eval_prompts"
_COLUMNS = ("step", "prompt", "picture", "expected", "answer")
Pictures = list[list[Image.Image]]


class AnswerLogs:
    """
    Attributes:
        tensorboard (`TensorBoardCallback`, *optional*): the Trainer's.
        tables (`list[str]`): `wandb` and `trackio`, where the Trainer has a callback of it.
    """

    def __init__(self) -> None:
        self.tensorboard: TensorBoardCallback | None = None
        self.tables: list[str] = []
        self._shown_pictures = False

    def find(self, callbacks: Iterable[TrainerCallback]) -> None:
        """Takes those that the Trainer has."""
        kinds = {"wandb": WandbCallback, "trackio": TrackioCallback}
        for callback in callbacks:
            if isinstance(callback, TensorBoardCallback):
                self.tensorboard = callback
            self.tables += [name for name, kind in kinds.items() if isinstance(callback, kind)]

    def show(self, answers: list[dict[str, Any]], step: int, pictures: Callable[[], Pictures]) -> None:
        """
        Args:
            answers (`list[dict]`): all lines of `eval_answers.jsonl`.
            step (`int`): of the newest.
            pictures: gives those of each prompt, small.
        """
        writer = getattr(self.tensorboard, "tb_writer", None)
        if writer is None and not self.tables:
            return
        small = pictures()
        if writer is not None:
            self._show_in_tensorboard(writer, [each for each in answers if each["step"] == step], step, small)
        for name in self.tables:
            module: Any = import_module(name)
            # What the Trainer began, and has not ended: trackio's run ends with the training, before the last answers
            # of a run without evaluations, and its callback begins another when something is logged.
            is_open = module.run is not None if name == "wandb" else module.context_vars.current_run.get() is not None
            if is_open:
                module.log({NAME: _table(module, answers, small), "train/global_step": step})

    def _show_in_tensorboard(self, writer: Any, answers: list[dict[str, Any]], step: int, pictures: Pictures) -> None:
        for line in answers:
            index, expected = line["index"], line.get("expected")
            told = "" if expected is None else f"\n\nexpected: {expected}"
            writer.add_text(f"{NAME}/{index}", f"{line['prompt']}\n\n{line['answer']}{told}", step)
            for number, picture in enumerate([] if self._shown_pictures else pictures[index]):
                writer.add_image(f"{NAME}/{index}/{number}", np.asarray(picture), step, dataformats="HWC")
        self._shown_pictures = True


def _table(module: Any, answers: list[dict[str, Any]], pictures: Pictures) -> Any:
    """`wandb.Table` or `trackio.Table`, which take the same."""
    rows = []
    for line in answers:
        first = pictures[line["index"]][:1] if line["index"] < len(pictures) else []
        picture = module.Image(first[0]) if first else None
        rows.append([line["step"], line["prompt"], picture, line.get("expected"), line["answer"]])
    return module.Table(columns=list(_COLUMNS), data=rows)
