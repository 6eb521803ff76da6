"""The documentation speaks of what is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def modules() -> list[Path]:
    found = [path for folder in ("modeling", "processing", "hf_llava_ft") for path in (ROOT / folder).rglob("*.py")]
    return [path for path in found if not path.name.startswith("__")]


def test_every_module_stands_in_the_architecture_and_every_module_there_exists():
    named = set(re.findall(r"\w+\.py\b", ARCHITECTURE.read_text(encoding="utf-8").replace("__init__.py", "")))
    known = {path.name for path in modules()}
    elsewhere = {
        path.name for folder in ("hub_scripts", "tests", "benchmarks") for path in (ROOT / folder).glob("*.py")
    }
    assert known - named == set()
    assert named - known - elsewhere == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    missing = []
    for target in targets:
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (heading and heading not in headings(file)):
            missing.append(target)
    assert missing == []


def headings(page: Path) -> set[str]:
    """The anchors that GitHub makes of the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_a_missing_file_and_a_missing_heading_are_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One, two\n\n[a](#one-two) [b](page.md#one-two)\n")
    test_links_lead_to_files(page)
    for wrong in ("[a](nowhere.md)", "[a](#three)"):
        page.write_text(f"# One, two\n\n{wrong}\n")
        with pytest.raises(AssertionError):
            test_links_lead_to_files(page)


def test_the_files_that_the_readme_names_are_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"`((?:docs|examples|benchmarks|modeling|processing|hf_llava_ft|tests)/[\w./-]+)`", text)
    assert len(names) > 5 and [name for name in names if not (ROOT / name).exists()] == []
