"""`skipped_rows.jsonl`: the rows that are not trained on as they stand, one line of JSON each."""

import json
from pathlib import Path

from hf_llava_ft.data.problems import Problem
from hf_llava_ft.whole_files import write_atomically

SKIPPED_FILE = "skipped_rows.jsonl"


def skipped_line(problem: Problem, done: str) -> str:
    """One line of `SKIPPED_FILE`."""
    named = {**problem._asdict(), "done": done}
    del named["place"]
    return json.dumps(named, ensure_ascii=False) + "\n"


def write_whole(path: Path, lines: list[str]) -> None:
    """Puts `lines` into the file at once; a reader sees all of them, or the file that was there."""
    write_atomically(path, lambda temporary: temporary.write_text("".join(lines), encoding="utf-8", errors="replace"))


def add_left_out(path: Path, problem: Problem) -> None:
    """Adds a line for a row that is left out while the rows are read, be it by several processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # One write for a line, so that those of several workers do not mix.
    with path.open("ab") as file:
        file.write(skipped_line(problem, "left out").encode("utf-8", "replace"))


def told_of_rows_left_out(path: Path) -> str | None:
    """Names each row once in the list of a stream that is done; returns a sentence with their number, or None if there
    are none."""
    if not path.exists():
        return None
    lines = list(dict.fromkeys(path.read_text(encoding="utf-8").splitlines(keepends=True)))
    write_whole(path, lines)
    return f"--on_bad_row skip: rows left out: {len(lines):,}; {path} lists them."
