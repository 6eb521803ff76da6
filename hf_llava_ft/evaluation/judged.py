"""What a model is asked in an evaluation, as files that a killed command leaves to the next: answers, and losses."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hf_llava_ft.answering.answer_lines import AnswerLines, Key
from hf_llava_ft.answering.batches import Question
from hf_llava_ft.answering.files import answer_missing, progress_bar, tell_of_going_on
from hf_llava_ft.answering.ranks import ALONE, Ranks
from hf_llava_ft.answering.rows import AskedRow
from hf_llava_ft.checkpoints.artifact import told_of_a_full_disk
from hf_llava_ft.checkpoints.folder_lock import locked_folder
from hf_llava_ft.evaluation.likelihood import losses_of, with_answer
from hf_llava_ft.evaluation.metrics.given import Given
from hf_llava_ft.evaluation.rows import RowFacts, candidates, facts_of_row

_BATCHES_AT_ONCE = 8
_FULL = "free some space, and give the same command again."

Load = Callable[[], tuple[Any, Any]]


def answers_in(
    path: Path,
    settings: dict[str, Any],
    files: list[str],
    rows: Callable[[], Iterable[AskedRow]],
    total: int,
    load: Load,
    *,
    console: Console,
    what: str,
    ranks: Ranks = ALONE,
    **asking: Any,
) -> dict[Key, dict[str, Any]]:
    """
    The lines of answers by row; those that are not in the file are asked. Of several processes the first gets them.

    Args:
        path, settings, files, ranks: see `AnswerLines`.
        rows, total, load, what, asking: see `answer_missing`.
    """
    with _lines_of(path, settings, files, ranks) as lines:
        answer_missing(lines, rows, total, load, console=console, what=what, **asking)
    return _by_row(path, files) if ranks.is_first else {}


def losses_in(
    path: Path,
    settings: dict[str, Any],
    files: list[str],
    rows: Callable[[], Iterable[AskedRow]],
    total: int,
    load: Load,
    *,
    of_choices: bool,
    batch_size: int,
    console: Console,
    what: str,
    ranks: Ranks = ALONE,
) -> dict[Key, dict[str, Any]]:
    """The same of losses: `loss` and `num_tokens` of the data's answers, and `choice_losses` where they are asked."""
    with _lines_of(path, settings | {"of_choices": of_choices}, files, ranks) as lines:
        tell_of_going_on(lines, total, console)
        if len(lines.done) < total:
            model, processor = load()
            missing = lines.missing(rows())
            bar = progress_bar(console, what, len(lines.done), lines.num_mine(total))
            with bar as advance, lines.writing() as write, torch.inference_mode():
                while window := list(islice(missing, batch_size * _BATCHES_AT_ONCE)):
                    for line in loss_lines(model, processor, window, of_choices, batch_size):
                        write(line)
                        advance()
        lines.finish()
    return _by_row(path, files) if ranks.is_first else {}


@contextmanager
def _lines_of(path: Path, settings: dict[str, Any], files: list[str], ranks: Ranks) -> Iterator[AnswerLines]:
    with ExitStack() as held, told_of_a_full_disk(path, _FULL):
        ranks.from_first(lambda: held.enter_context(locked_folder(path)))
        yield AnswerLines(path, settings, files, flag="--output_dir", stays=True, ranks=ranks)


def loss_lines(
    model: Any, processor: Any, rows: list[AskedRow], of_choices: bool, batch_size: int
) -> Iterable[dict[str, Any]]:
    """The lines of [`losses_in`] for these rows, in their order."""
    conversations = [_with_its_answer(row) for row in rows]
    starts = []
    for row in rows if of_choices else ():
        starts.append(len(conversations))
        conversations += [with_answer(row.question, each) for each in candidates(facts_of_row(row))]
    found = dict(losses_of(model, processor, conversations, batch_size=batch_size))
    ends = [*starts[1:], len(conversations)]
    for index, row in enumerate(rows):
        total, number = found[index]
        line = {"file": row.file, "row": row.number, "loss": total, "num_tokens": number}
        if of_choices:
            each = [found[place] for place in range(starts[index], ends[index])]
            line["choice_losses"] = [total / number if number else None for total, number in each]
        yield line


def _with_its_answer(row: AskedRow) -> Question:
    """The whole row; of one that leaves its answer open, the first to compare with stands there."""
    is_open = "expected" not in row.line
    return with_answer(row.question, facts_of_row(row).references[0]) if is_open else row.conversation


def _by_row(path: Path, files: list[str]) -> dict[Key, dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return {(line.get("file", files[0]), line["row"]): line for line in lines}


def given_of(
    facts: list[RowFacts], answers: dict[Key, dict[str, Any]], losses: dict[Key, dict[str, Any]]
) -> list[Given]:
    """What the metrics are given, row by row; a row that could not be answered is an empty answer."""
    found = []
    for each in facts:
        answer, loss = answers.get(each.key, {}), losses.get(each.key, {})
        sums = (loss["loss"], loss["num_tokens"]) if loss else None
        of_choices = tuple(float("inf") if one is None else one for one in loss.get("choice_losses", ()))
        found.append(Given(answer.get("answer") or "", each.references, each.choices, sums, of_choices))
    return found
