"""The progress bars while a dataset is checked."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hf_llava_ft.data.formats import Source
from hf_llava_ft.errors import UserError

_ROWS_MEASURED = 64


def estimated_rows(sources: list[Source]) -> int | None:
    """How many there are, for a bar: known, or a text file's size over the size of its first rows."""
    total = 0
    for source in sources:
        if source.num_rows is not None:
            total += source.num_rows
            continue
        try:
            sizes = [len(json.dumps(raw, default=str)) for _, raw in islice(source.iter_raw(), _ROWS_MEASURED)]
            total += int(sum(map(os.path.getsize, source.container.files)) * len(sizes) / (sum(sizes) or 1))
        except (UserError, OSError, ValueError, RecursionError):
            return None
    return total


@contextmanager
def checking_bar(console: Console, name: str, total: int | None) -> Iterator[Any]:
    """Yields a function that is told how many more are done."""
    # No thread that draws: processes are forked meanwhile, and a thread's locks would be forked with it.
    progress = Progress(
        TextColumn(f"[bold]{name}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        auto_refresh=False,
        disable=not console.is_terminal or total == 0,
    )
    task = progress.add_task("", total=total, speed="")

    def advance(number: int) -> None:
        speed = progress.tasks[0].speed
        progress.update(task, advance=number, speed=f"{speed:,.0f}/s" if speed else "", refresh=True)

    with progress:
        yield advance
        done = progress.tasks[0].completed
        progress.update(task, total=done, completed=done, refresh=True)
