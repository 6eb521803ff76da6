"""What `make test-travelling` counts as a failure; it takes minutes and environments of its own, this does not."""

import sys
from pathlib import Path

import pytest

from tests.travelling import across_releases
from tests.travelling.across_releases import EARLIER, cell, failures_under, table
from tests.travelling.loading import CHECKS


def test_an_environment_that_has_this_package_proves_nothing():
    failures = failures_under(Path(sys.executable), [EARLIER / "mlp3x"])
    assert "this environment is no stranger's" in failures["mlp3x"]["loading"]


def test_the_table_says_what_fails():
    assert cell({}) == "ok"
    assert cell({"loading": "OSError: no"}) == "does not load"
    assert cell({"saving": "OSError: no"}) == "not saving"
    assert cell({name: "no" for name in CHECKS if name != "loading"}) == "only loading"
    lines = table({"5.17.0": {"a": {}, "b": {"saving": "no"}}})
    assert lines == ["| transformers | a | b |", "| --- | --- | --- |", "| 5.17.0 | ok | not saving |"]


@pytest.mark.parametrize(
    "now, told, code",
    [
        ({}, "| 5.24.0 | not loss |", 0),
        ({"logits": "AssertionError: logits differ by 0.1"}, "| 5.24.0 | not loss |", 1),
        ({}, "| 5.24.0 | ok |", 1),  # the documentation says something else of earlier folders
    ],
)
def test_a_folder_of_this_version_that_fails_and_a_table_that_is_not_true_are_failures(
    now, told, code, tmp_path, monkeypatch, capsys
):
    def failures(python, folders):
        return {"mlp3x": now if folders == ["ours"] else {"loss": "TypeError: no"}}

    page = tmp_path / "page.md"
    page.write_text(f"| transformers | mlp3x |\n| --- | --- |\n{told}\n")
    monkeypatch.setattr(across_releases, "DOCUMENTATION", page)
    monkeypatch.setattr(across_releases, "exported_now", lambda output_dir: ["ours"])
    monkeypatch.setattr(across_releases, "python_with", lambda release: Path("python"))
    monkeypatch.setattr(across_releases, "failures_under", failures)
    assert across_releases.main(["5.24.0"]) == code
    assert all(error in capsys.readouterr().out for error in now.values())
