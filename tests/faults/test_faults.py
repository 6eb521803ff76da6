"""A few of the faults of `make test-faults`, and that the suite sees what it looks for."""

from collections import Counter

import pytest

from tests.faults.__main__ import SOFT, table
from tests.faults.commands import digests, run
from tests.faults.kills import OPERATIONS, outcome_of, prepared, signal_often
from tests.faults.suites import PROPERTIES, SUITES, _pytest, held_examples


@pytest.mark.slow
def test_twenty_kills_and_as_many_signals(tiny_checkpoint, tmp_path):
    for name, numbers in (("kills", (9,)), ("signals", SOFT)):
        (tmp_path / name).mkdir()
        found = signal_often(tmp_path / name, tiny_checkpoint, 20, 0, numbers=numbers)
        assert sum(map(Counter.total, found.values())) == 20
        assert not [row for row, counts in found.items() if counts["failed"]]


@pytest.mark.slow
def test_a_file_that_differs_is_seen(tiny_checkpoint, tmp_path):
    [check] = [operation for operation in OPERATIONS if operation.name == "check"]
    start = prepared(tmp_path / "start", tiny_checkpoint)
    run(check.words, start)
    expected = digests(start)
    (start / "out.json").unlink()
    assert outcome_of(check, start, expected, tmp_path / "once", 0.2, 9) in ("stopped, then the same", "ended before")
    with pytest.raises(AssertionError, match="other files"):
        outcome_of(check, start, {**expected, "out.json": "other"}, tmp_path / "again", 0.2, 9)


def test_what_is_driven_is_there(checkout):
    named = [file for rows in SUITES.values() for files, _ in rows.values() for file in files]
    for file in [*named, *(file for files in PROPERTIES.values() for file in files)]:
        assert (checkout / file).is_file(), file
    tests = (checkout / "tests").rglob("test_*.py")
    drawing = {path.relative_to(checkout).as_posix() for path in tests if "\n@given(" in path.read_text()}
    assert drawing == {file for files in PROPERTIES.values() for file in files}


def test_rows_of_other_runs_stay_in_the_table():
    before = table({"a": Counter(held=2), "b": Counter(held=1)}, 0)
    lines = table({"b": Counter(held=1000, failed=1)}, 7, before).splitlines()
    assert lines[2:] == ["| a | 0 | 2 | held: 2 |", "| b | 7 | 1,001 | failed: 1, held: 1,000 |"]


def test_examples_are_counted_as_the_installed_hypothesis_says_them(tmp_path):
    drawn = tmp_path / "test_drawn.py"
    drawn.write_text(
        "from hypothesis import given, settings, strategies as st\n"
        "@settings(max_examples=30, database=None)\n@given(st.integers())\n"
        "def test_drawn(number): assert number == number\n"
    )
    counts, printed = _pytest([str(drawn), "--hypothesis-show-statistics"], {}, print)
    assert counts["as it should be"] == 1 and held_examples(printed) == 30
    assert held_examples("  - 7 passing examples, 0 failing examples, 2 invalid examples\n" * 2) == 14
    with pytest.raises(RuntimeError, match="other words"):
        held_examples("1 passed")
