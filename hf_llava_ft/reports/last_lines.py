"""The last lines that a run prints: where its result and report are, answers before and after, and what to do next."""

import os
from pathlib import Path
from shlex import quote
from typing import Any

from hf_llava_ft.reports.page import NO_TEXT
from hf_llava_ft.reports.run_report import REPORT_FILE

NUM_PROMPTS = 3
_MAX_CHARACTERS = 240  # of an answer; the report has it whole


def last_lines(
    output_dir: Path,
    answers: list[dict[str, Any]],
    *,
    is_adapter: bool,
    are_held_out: bool,
    picture: str | None = None,
) -> list[str]:
    """
    Args:
        output_dir (`Path`): the folder of the run.
        answers (`list[dict]`): lines of `eval_answers.jsonl`.
        is_adapter (`bool`): whether the result is an adapter, not a whole model.
        are_held_out (`bool`): whether what was asked are rows that were not trained on, not `--eval_prompts`.
        picture (`str`, *optional*): path of one to chat about.
    """
    folder = str(output_dir)
    lines = []
    by_prompt: dict[int, list[dict[str, Any]]] = {}
    for answer in answers:
        by_prompt.setdefault(answer["index"], []).append(answer)
    if by_prompt:
        lines.append("Asked, of rows that were not trained on:" if are_held_out else "Asked, of --eval_prompts:")
    for _, said in sorted(by_prompt.items())[:NUM_PROMPTS]:
        lines += _before_and_after(sorted(said, key=lambda line: line["step"]))
    lines.append(f"The result is at {folder}, its report is {output_dir / REPORT_FILE}.")
    if not by_prompt:
        lines.append("To see answers before and after, hold out rows: --eval_split 0.05 asks three of them.")
    about = "" if picture is None else f" --image {quote(_near(picture))}"
    rows = f"--eval_split {quote(folder)}" if are_held_out and by_prompt else "--retention"
    commands = [f"chat --model {quote(folder)}{about}", f"evaluate --model {quote(folder)} {rows}"]
    if is_adapter:
        commands.append(f"merge --adapter {quote(folder)} --output_dir {quote(f'{folder}-merged')}")
    else:
        commands.append(f"push {quote(folder)} --repo_id USER/NAME")
    return [*lines, "Next:", *(f"  llava-ft {command}" for command in commands)]


def _before_and_after(said: list[dict[str, Any]]) -> list[str]:
    first, last = said[0], said[-1]
    pictures = f" ({', '.join(last['images'])})" if last["images"] else ""
    lines = [f"  {_short(last['prompt'])}{pictures}"]
    if last.get("expected") is not None:
        lines.append(f"    expected: {_short(last['expected'])}")
    if first is not last:
        lines.append(f"    before:   {_short(first['answer'])}")
    return [*lines, f"    after:    {_short(last['answer'])}"]


def _short(text: str) -> str:
    """On one line."""
    words = " ".join(text.split())
    return f"{words[:_MAX_CHARACTERS]}..." if len(words) > _MAX_CHARACTERS else words or NO_TEXT


def _near(path: str) -> str:
    """As it is named from the current folder, if it lies in it."""
    near = os.path.relpath(path) if os.path.splitdrive(path)[0] == os.path.splitdrive(os.getcwd())[0] else path
    return path if near.startswith(os.pardir) else near
