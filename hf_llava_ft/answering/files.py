"""`llava-ft generate --data_path`: the answers to a dataset as a file, a line each, written as they come.

A run that was killed goes on where it was: the same command again answers what is not in the file. When all rows are
answered, the lines are put in the order of the rows.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hf_llava_ft.answering.answer_lines import AnswerLines
from hf_llava_ft.answering.batches import Answer, answer_all
from hf_llava_ft.answering.loading import answering_device, load_for_answering
from hf_llava_ft.answering.prompts import sampling_options
from hf_llava_ft.answering.rows import AskedRow, asked_rows, open_questions
from hf_llava_ft.checkpoints.artifact import check_writable_file, told_of_a_full_disk
from hf_llava_ft.checkpoints.folder_lock import locked_folder
from hf_llava_ft.checkpoints.opening import load_processor
from hf_llava_ft.checkpoints.run_files import EVALUATION_FILE
from hf_llava_ft.data.formats import Source
from hf_llava_ft.data.formats.column_choice import SaidOfColumns

# Sorted by length among each other; so many are held at once.
_BATCHES_SORTED = 32


@dataclass(frozen=True)
class Answered:
    """
    Args:
        num_answered (`int`): rows with an answer in the file, those of an earlier command included.
        num_failed (`int`): rows whose line says why there is none.
    """

    num_answered: int
    num_failed: int


def answer_file(
    model: str,
    data_path: str,
    output: str | Path,
    image_folder: str | None = None,
    *,
    system: str | None = None,
    batch_size: int = 16,
    loading: dict[str, Any] | None = None,
    columns: SaidOfColumns = None,
    access: dict[str, bool] | None = None,
    console: Console | None = None,
    **generation: Any,
) -> Answered:
    """
    Asks `model` the first question of every row, and writes JSON Lines: `row`, `id`, `prompt`, `images`, `expected`
    where the row has it, `answer`, `finish_reason`; `error` in place of an answer; `file` where there are several.

    Args:
        model, loading: for [`load_for_answering`].
        data_path, image_folder, columns, access: for [`open_questions`].
        output (`str` or `Path`): the file; one that the same command has begun is finished.
        generation: `max_new_tokens`, `temperature`, `top_p`.

    Raises:
        UserError: if a row is wrong, before anything is asked; or if the file holds anything else.
    """
    console, output, loading = console or Console(stderr=True), Path(output), loading or {}
    sampling_options(generation.get("temperature", 0.0), generation.get("top_p"))
    answering_device(loading.get("device"))
    processor = load_processor(model, loading.get("revision"), base=loading.get("base"))
    sources = open_questions(data_path, image_folder, columns=columns, **access or {})
    total = sum(1 for _ in asked_rows(sources, system))
    check_writable_file(output)
    settings: dict[str, Any] = {"model": state_of_model(model), "data": state_of_data(sources)}
    settings |= {"image_folder": image_folder, "columns": columns, "system": system, **loading, **generation}
    with locked_folder(output), told_of_a_full_disk(output, "free some space, and give the same command again."):
        lines = AnswerLines(output, settings, [source.where for source in sources])
        num_failed = answer_missing(
            lines,
            lambda: asked_rows(sources, system),
            total,
            lambda: load_for_answering(model, processor=processor, **loading),
            console=console,
            batch_size=batch_size,
            **generation,
        )
    failed = f"; {num_failed:,} without an answer, with the reason in its line" if num_failed else ""
    console.print(f"{total:,} rows are in {output}{failed}.", highlight=False, soft_wrap=True)
    return Answered(total - num_failed, num_failed)


def answer_missing(
    lines: AnswerLines,
    rows: Callable[[], Iterable[AskedRow]],
    total: int,
    load: Callable[[], tuple[Any, Any]],
    *,
    console: Console,
    batch_size: int = 16,
    what: str = "answers",
    **generation: Any,
) -> int:
    """
    Adds the answers that are not in a file yet.

    Args:
        lines (`AnswerLines`): the file.
        rows: gives all rows; asked only if some are missing, and so is `load`.
        total (`int`): how many they are.
        load: gives model and processor.
        what (`str`): in front of the progress bar.
        generation: `max_new_tokens`, `temperature`, `top_p`.

    Returns:
        How many rows have no answer.
    """
    tell_of_going_on(lines, total, console)
    if len(lines.done) < total:
        parts = load()
        with progress_bar(console, what, len(lines.done), lines.num_mine(total)) as advance:
            _answer(parts, lines.missing(rows()), lines, advance, batch_size, generation)
    return lines.finish()


def tell_of_going_on(lines: AnswerLines, total: int, console: Console) -> None:
    """Says how much of a file is there already, if anything is."""
    if lines.done:
        found = f"{lines.path} goes on: {len(lines.done):,} of {total:,} rows are there."
        console.print(found, highlight=False, soft_wrap=True)


def _answer(
    parts: tuple[Any, Any],
    rows: Iterator[AskedRow],
    lines: AnswerLines,
    advance: Callable[[], None],
    batch_size: int,
    generation: dict[str, Any],
) -> None:
    with lines.writing() as write, torch.inference_mode():
        while window := list(islice(rows, batch_size * _BATCHES_SORTED)):
            questions = [row.question for row in window]
            for place, answer in answer_all(*parts, questions, batch_size=batch_size, **generation):
                write({"file": window[place].file, **window[place].line, **_said(answer)})
                advance()


def _said(answer: Answer) -> dict[str, Any]:
    if answer.error:
        return {"answer": None, "finish_reason": answer.finish_reason, "error": answer.error}
    return {"answer": answer.text, "finish_reason": answer.finish_reason}


def state_of_model(path: str) -> list[Any]:
    """What a folder holds, by size and time, but for what an evaluation writes there; a Hub id is itself."""
    files = sorted(Path(path).iterdir()) if Path(path).is_dir() else []
    files = [file for file in files if file.name not in ("README.md", EVALUATION_FILE)]
    return [path, *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file())]


def state_of_data(sources: list[Source]) -> list[Any]:
    """Files of data, by size and time."""
    states = []
    for source in sources:
        files = [[path, os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in source.container.files]
        states.append([source.where, source.container.fingerprint, files])
    return states


@contextmanager
def progress_bar(console: Console, what: str, done: int, total: int) -> Iterator[Callable[[], None]]:
    """Yields a function that is told of each answer."""
    columns = (TextColumn(f"[bold]{what}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(
        *columns, TextColumn("left"), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )
    task = progress.add_task("", total=total, completed=done)
    with progress:
        yield lambda: progress.advance(task)
