"""The parts that are tests already: run by pytest, and counted."""

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

CHECKOUT = Path(__file__).parents[2]
_OURS = "tests/hf_llava_ft"
# By part and row of the table: files, and which of their tests. Slow ones only in the long form.
SUITES: dict[str, dict[str, tuple[list[str], str]]] = {
    "two-at-once": {
        "two commands, one folder": ([f"{_OURS}/checkpoints/test_folder_lock.py"], ""),
        "two runs, one folder; what others put there": ([f"{_OURS}/training/test_run_folder.py"], "not clock"),
    },
    "clock": {
        "the clock set back": ([f"{_OURS}/training/test_run_folder.py", f"{_OURS}/data/test_unchanged.py"], "clock"),
    },
    "changed": {
        "data and pictures changed in a run": ([f"{_OURS}/data/test_unchanged.py"], ""),
        "data and settings changed before resuming": ([f"{_OURS}/training/test_fingerprint.py"], ""),
    },
    "broken": {
        "broken folders": ([f"{_OURS}/checkpoints/test_broken_folders.py"], ""),
        "broken states of a run": ([f"{_OURS}/checkpoints/test_resume_state.py"], ""),
    },
    "phases": {"a signal in each phase of a run": ([f"{_OURS}/training/test_interruption.py"], "")},
    "pushes": {"faults of the Hub": ([f"{_OURS}/hub/test_push.py"], "")},
    "engines": {
        "kill -9 under each engine": ([f"{_OURS}/training/test_killed.py"], ""),
        "a disk that fills up under each engine": ([f"{_OURS}/training/test_full_disk.py"], ""),
    },
}
# What is drawn, and the property tests of it.
PROPERTIES: dict[str, list[str]] = {
    "conversations x templates x tokenizers": [
        "tests/processing/test_processing_llava.py",
        "tests/processing/test_original_templates_llava.py",
        "tests/processing/test_tokenizer_llava.py",
    ],
    "shapes and modes of pictures": ["tests/processing/test_uint8_pixels_llava.py"],
    "orders of rows x worlds": [f"{_OURS}/data/test_sampler.py", f"{_OURS}/data/test_packing.py"],
    "pairs of settings": [f"{_OURS}/settings/test_argument_pairs.py"],
    "rows and files of any content": [
        f"{_OURS}/data/test_counting.py",
        f"{_OURS}/data/test_json_columns.py",
        f"{_OURS}/data/test_llava_json.py",
        f"{_OURS}/data/test_formats_hostile.py",
        f"{_OURS}/data/test_schema.py",
        f"{_OURS}/data/test_usual_rows.py",
    ],
    "requests to the endpoint, texts of a page": [
        f"{_OURS}/serving/test_endpoint_handler.py",
        f"{_OURS}/reports/test_markdown.py",
    ],
}
# "100 passing, 0 failing, and 16 invalid test cases"; older releases of Hypothesis say "100 passing examples, ...".
_PASSING = re.compile(r"- (\d+) passing(?: examples)?, \d+ failing")


def run_suites(part: str, is_long: bool, tell: Callable[[str], None] = print) -> dict[str, Counter]:
    """The tests of a part, counted by how they ended."""
    rows = {}
    for name, (files, chosen) in SUITES[part].items():
        words = [*files, *(["-k", chosen] if chosen else []), "-m", "" if is_long else "not slow"]
        counts, _ = _pytest(words, {}, tell)
        if counts:
            rows[name] = counts
    return rows


def draw_often(times: int, seed: int, tell: Callable[[str], None] = print) -> dict[str, Counter]:
    """The property tests with `times` as many examples as `make test` draws, counted by example."""
    rows = {}
    for name, files in PROPERTIES.items():
        words = [*files, "-m", "hypothesis", "--hypothesis-show-statistics", f"--hypothesis-seed={seed}"]
        counts, printed = _pytest(words, {"EXAMPLES_TIMES": str(times)}, tell)
        examples = Counter(held=held_examples(printed))
        if counts["failed"]:
            examples["failed"] = counts["failed"]
        rows[name] = examples
    return rows


def held_examples(printed: str) -> int:
    """The sum of what Hypothesis says of each test."""
    found = _PASSING.findall(printed)
    if not found:
        raise RuntimeError(f"Hypothesis counts its examples in other words now: {printed[-1000:]}")
    return sum(map(int, found))


def _pytest(words: list[str], environment: dict[str, str], tell: Callable[[str], None]) -> tuple[Counter, str]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *words]
        done = subprocess.run(
            command, cwd=CHECKOUT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
        if not report.is_file():
            raise RuntimeError(f"pytest did not run: {done.stdout[-1000:]}{done.stderr[-1000:]}")
        suite = ElementTree.parse(report).getroot().find("testsuite")
        assert suite is not None
        number = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = number["failures"] + number["errors"]
    counts = Counter({"as it should be": number["tests"] - failed - number["skipped"]})
    counts += Counter({"failed": failed, "not possible here": number["skipped"]})
    if failed:
        tell("\n".join(line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))))
    return counts, done.stdout
