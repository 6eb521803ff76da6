"""`skipped_rows.jsonl`: the rows that are not trained on as they stand, one line of JSON each."""

import json
from pathlib import Path

from hf_llava_ft.data.problems import Problem

SKIPPED_FILE = "skipped_rows.jsonl"


def skipped_line(problem: Problem, done: str) -> str:
    """One line of `SKIPPED_FILE`."""
    named = {**problem._asdict(), "done": done}
    del named["place"]
    return json.dumps(named, ensure_ascii=False) + "\n"


def write_whole(path: Path, lines: list[str]) -> None:
    """Puts `lines` into the file at once; a reader sees all of them, or the file that was there."""
    unfinished = path.with_name(f".{path.name}.incomplete")
    unfinished.write_text("".join(lines), encoding="utf-8", errors="replace")
    unfinished.replace(path)
