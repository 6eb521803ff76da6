"""python -m benchmarks.bench on a small model: that sides agree on what they train on, and differences are told."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow  # three processes that import torch
def test_sides_train_the_same_rows_and_are_compared(checkout, tmp_path):
    output = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.bench", "--tiny", "--rows", "5", "--batch_size", "2", "--rounds", "2"]
    command += ["--sides", "ours", "plain grouped", "--folder", str(tmp_path / "made"), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=checkout)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(output.read_text())
    assert list(report["summary"]) == ["ours", "plain grouped"]
    assert report["summary"]["ours"]["times_as_long"]["median"] == 1
    epochs = [epoch for each in report["rounds"] for epoch in each.values()]
    assert {epoch["tokens"] for epoch in epochs} == {epochs[0]["tokens"]} and len(epochs) == 4
    assert "equal ids and labels" in done.stdout and "| plain grouped |" in done.stdout
    assert str(tmp_path) not in output.read_text()


@pytest.mark.parametrize(
    ("other", "told"), [(["b", [0.5]], "other ids"), (["a", [0.6]], "other pixels"), (["a", []], "has a picture")]
)
def test_sides_that_train_on_other_rows_are_refused(checkout, monkeypatch, other, told):
    monkeypatch.syspath_prepend(str(checkout))
    from benchmarks.bench.__main__ import check_equal

    same = {"ours": {"0": ["a", [0.5]]}, "plain": {"0": ["a", [0.500001]]}}
    assert check_equal(same) == pytest.approx(1e-6)
    with pytest.raises(SystemExit, match=told):
        check_equal(same | {"plain": {"0": other}})


def test_ratios_are_those_within_a_round(checkout, monkeypatch):
    monkeypatch.syspath_prepend(str(checkout))
    from benchmarks.bench.__main__ import summary_of, table_of

    epoch = {"tokens": 100, "padding": 0.25, "above_model": 10**9, "loss": 1.0}
    seconds = [(1.0, 3.0), (2.0, 4.0), (1.0, 2.5)]
    rounds = [{"ours": epoch | {"seconds": mine}, "plain": epoch | {"seconds": theirs}} for mine, theirs in seconds]
    found = summary_of(rounds)
    assert found["plain"]["times_as_long"] == {"median": 2.5, "min": 2.0, "max": 3.0}
    assert "| plain | 3.00 (2.50 to 4.00) | 2.50 (2.00 to 3.00) | 33 | 1.00 | 25.0 % |" in table_of(found)
