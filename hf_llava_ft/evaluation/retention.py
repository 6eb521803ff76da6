"""Did it forget? Forty questions of our own, half of them about photographs, that a base should know and a tuned model
not unlearn: by the likeliest of a few answers, and by what it says.

Forty are few: a drop of two or three of them is noise, and the intervals say so. What they show is a model that lost
what it could do, not which benchmark it lost a point in.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_llava_ft.answering.batches import answer_all
from hf_llava_ft.answering.rows import open_questions
from hf_llava_ft.data.formats import Source
from hf_llava_ft.evaluation.judged import given_of, loss_lines
from hf_llava_ft.evaluation.metrics.choices import CHOICE_LIKELIHOOD
from hf_llava_ft.evaluation.metrics.given import Given
from hf_llava_ft.evaluation.metrics.short_answers import EXACT_MATCH
from hf_llava_ft.evaluation.rows import facts_of_row, rows_of
from hf_llava_ft.evaluation.scores import Figure, Scores, scored
from hf_llava_ft.evaluation.table import shown

QUESTIONS = Path(__file__).with_name("retention.json")
PHOTOGRAPHS = Path(__file__).resolve().parent.parent / "quickstart" / "photographs"
NAME = "Retention probe"
METRICS = (CHOICE_LIKELIHOOD, EXACT_MATCH)
MAX_NEW_TOKENS = 16
_WHAT_HELPS = (
    "What helps: rows of other data mixed in, best of what the base was trained on (--data_path "
    "mine.json,other.json:0.1); fewer epochs (--num_train_epochs); a lower rank (--lora_r) or learning rate "
    "(--learning_rate)."
)


def retention_questions() -> list[Source]:
    """The questions, opened."""
    return open_questions(str(QUESTIONS), str(PHOTOGRAPHS))


def ask_retention(model: Any, processor: Any, *, batch_size: int = 8) -> list[Given]:
    """What a model in memory answers, and how likely it finds each choice."""
    rows = list(rows_of(retention_questions(), None))
    is_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            questions = [row.question for row in rows]
            said = dict(answer_all(model, processor, questions, batch_size=batch_size, max_new_tokens=MAX_NEW_TOKENS))
            lines = list(loss_lines(model, processor, rows, True, batch_size))
    finally:
        model.train(is_training)
    facts = [facts_of_row(row) for row in rows]
    answers = {each.key: {"answer": said[place].text} for place, each in enumerate(facts)}
    return given_of(facts, answers, {each.key: line for each, line in zip(facts, lines, strict=True)})


def retention_scores(tuned: Sequence[Given], base: Sequence[Given]) -> Scores:
    """The figures of both, side by side."""
    return scored(METRICS, tuned, base)


def told_of_retention(scores: Scores) -> str:
    """Whether it forgot, in words; and if so, what helps."""
    worse = [figure for figure in scores.figures if figure.is_worse]
    if worse:
        return f"It forgot: {_and(worse)}, a drop beyond noise. {_WHAT_HELPS}"
    return f"Nothing forgotten beyond noise: {_and(scores.figures)}."


def _and(figures: Sequence[Figure]) -> str:
    return " and ".join(_said(figure) for figure in figures)


def _said(figure: Figure) -> str:
    of_what = "likeliest choices" if figure.metric is CHOICE_LIKELIHOOD else "answers"
    before = "" if figure.base is None else f", {shown(figure, figure.base.value)} before"
    return f"{shown(figure, figure.tuned.value)} of the {of_what} are right{before}"
