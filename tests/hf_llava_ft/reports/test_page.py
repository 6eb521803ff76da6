"""Pages are templates of which no part can come from the values, and no value can be missing."""

import os
import re
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
from jinja2 import ChoiceLoader, DictLoader, UndefinedError
from markupsafe import Markup
from PIL import Image

from hf_llava_ft.quickstart.report import AnsweredPhoto, write_report
from hf_llava_ft.reports import page as page_module
from hf_llava_ft.reports.page import ENVIRONMENT, Picture, write_page
from hf_llava_ft.reports.plots import loss_plot_svg
from hf_llava_ft.reports.run_report import MAX_BETWEEN, write_run_report

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=a()>",
    "\"onmouseover='a()' x=\"",
    "</p></td></style></title></main>",
    "{{ 7*7 }}{% raw %}{# x",
    "&lt;b&gt;&amp;",
    "\u202edrawkcab\u2066",
    "half \udcff of a character",
    "\x00\x1b[31m",
]
ALL = "".join(HOSTILE)


class Page(HTMLParser):
    """Tags with the names of their attributes, in order; and all text and values of attributes."""

    def __init__(self, html):
        super().__init__()
        self.markup, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.markup.append((tag, tuple(name for name, _ in attrs)))
        self.text += "".join(value or "" for _, value in attrs)

    def handle_endtag(self, tag):
        self.markup.append(f"/{tag}")

    def handle_data(self, data):
        self.text += data


def only_text(write, path, places: int) -> None:
    """Asserts that hostile text, which `write(path, text)` puts into `places` places, adds no markup and is shown."""
    write(path, "plain")
    plain = Page(path.read_text("utf-8"))
    num_plain = plain.text.count("plain")
    for text in [*HOSTILE, ALL]:
        write(path, text)
        attacked = Page(path.read_text("utf-8"))
        assert attacked.markup == plain.markup, text
        # A half of a character cannot be written, and a browser reads a NUL as the sign for what is none.
        shown = text.replace("\udcff", "?")
        assert attacked.text.count(shown) == num_plain >= places, text


SUMMARY_OF_RATES = {f"{name}_per_second": 1.0 for name in ("samples", "tokens", "supervised_tokens")}


def run_report(path, text="a", steps=(0, 5), **changes):
    source = {"name": text, "format": text, "bytes": 1, "weight": 1.0}
    summary = {
        "settings": {"model_name_or_path": f"x{text}", "train_type": text, text: text, "list": [text]},
        "data": {"rows": 1, "images": None, "fingerprint": text, "sources": [source]},
        "versions": {text: text},
        "steps": 5,
        "epochs": 1.0,
        "loss": {"first": 2.0, "last": 1.0},
        "eval_loss": {"best": {"loss": 1.0, "step": 5}},
        "device": text,
        "num_processes": 1,
        "seconds": 2.0,
        "seconds_without_evaluation": 1.0,
        "peak_memory": {"bytes": 1, "of": text},
        **dict.fromkeys(("samples", "tokens", "supervised_tokens"), 1),
        **SUMMARY_OF_RATES,
        "supervised_share": 0.5,
        **changes,
    }
    log = [{"step": step, "loss": 2.0, "learning_rate": 0.1} for step in range(1, 6)] + [{"step": 5, "eval_loss": 1.0}]
    answers = [{"step": step, "index": 0, "prompt": text, "answer": text, "expected": text} for step in steps]
    picture = Image.new("RGB", (4, 3))
    write_run_report(path.parent, summary, log, [(text, 1, 2, text)], answers, [[picture]])
    (path.parent / "report.html").replace(path)


def quickstart_report(path, text):
    photo = path.with_name("photo.png" if text == "plain" else "x\" onerror='a()'<b>{{ 7*7 }}.png")
    Image.new("RGB", (4, 3)).save(photo)
    answer = AnsweredPhoto(photo, text, text, text, text)
    values = {"title": text, "note": text, "facts": [(text, text)], "trained": [(text, 1, 2, text)], "command": text}
    write_report(path, answers=[answer], losses=[2.0, 1.0], **values)


def test_no_value_of_a_run_becomes_markup(tmp_path):
    only_text(run_report, tmp_path / "page.html", places=20)


def test_no_value_of_the_quickstart_becomes_markup(tmp_path):
    only_text(quickstart_report, tmp_path / "page.html", places=12)


@pytest.fixture
def page_of(monkeypatch):
    """A function: the body of a new page to a function that writes it with hostile text as `a`."""

    def page_of(body):
        template = '{% extends "base.html" %}{% from "_macros.html" import img, facts_list %}'
        template += "{% block title %}x{% endblock %}{% block body %}" + body + "{% endblock %}"
        loader = ChoiceLoader([DictLoader({"new.html": template}), ENVIRONMENT.loader])
        monkeypatch.setattr(ENVIRONMENT, "loader", loader)
        picture = Picture.of(Image.new("RGB", (4, 3)))
        return lambda path, text: write_page(path, "new.html", a=text, picture=picture)

    return page_of


def test_macros_escape_text_and_attributes(tmp_path, page_of):
    write = page_of("{{ img(picture, a, class=a) }}{{ facts_list([(a, a)], class=a) }}")
    only_text(write, tmp_path / "new.html", places=5)


@pytest.mark.parametrize(
    "hole", ["{{ a | safe }}", "{% autoescape false %}{{ a }}{% endautoescape %}", "<p class={{ a }}>", "{{ a[:3] }}"]
)
def test_a_page_that_lets_text_through_or_loses_it_is_found_out(tmp_path, page_of, hole):
    with pytest.raises(AssertionError):
        only_text(page_of(hole), tmp_path / "new.html", places=1)


def test_no_template_of_ours_switches_escaping_off():
    sources = {name: ENVIRONMENT.loader.get_source(ENVIRONMENT, name)[0] for name in ENVIRONMENT.list_templates()}
    assert {"base.html", "_macros.html", "run.html", "check.html", "quickstart.html", "style.css"} <= set(sources)
    for name, source in sources.items():
        assert not re.search(r"\|\s*safe\b|autoescape|Markup|xmlattr|=\{\{", source), name


@pytest.mark.parametrize("template", ["run.html", "check.html", "quickstart.html"])
def test_a_page_with_a_value_missing_is_not_written(tmp_path, template):
    with pytest.raises(UndefinedError):
        write_page(tmp_path / "page.html", template)
    assert list(tmp_path.iterdir()) == []


def test_every_page_forbids_requests_before_anything_else(tmp_path):
    run_report(tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text("utf-8")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in html.partition("<title>")[0]
    assert html.startswith("<!doctype html>\n") and "<style>\n/* Of every page. */" in html


def test_a_page_shows_first_and_last_answers_and_folds_those_between(tmp_path):
    run_report(tmp_path / "page.html", steps=range(0, 1001, 10))
    html = (tmp_path / "page.html").read_text("utf-8")
    shown, folded = html.split("<h2>Answers</h2>")[1].split("<details>")
    assert re.findall(r"<h4>(.*?)</h4>", shown) == ["before training", "step 1000", "expected"]
    folded = folded.split("</details>")[0]
    steps = [int(step) for step in re.findall(r"<h4>step (\d+)</h4>", folded)]
    assert "<summary>99 evaluations between</summary>" in folded and f"{MAX_BETWEEN} of them" in folded
    assert len(steps) == MAX_BETWEEN and steps == sorted(set(steps)) and (steps[0], steps[-1]) == (10, 990)
    run_report(tmp_path / "page.html", steps=(0, 5, 9))
    html = (tmp_path / "page.html").read_text("utf-8")
    assert re.findall(r"<h4>step (\d+)</h4>", html) == ["9", "5"]
    assert "<summary>1 evaluation between</summary>" in html and "of them" not in html
    run_report(tmp_path / "page.html", steps=(7,))
    assert re.findall(r"<h4>(.*?)</h4>", (tmp_path / "page.html").read_text("utf-8")) == ["step 7", "expected"]


def test_names_do_not_turn_the_sentence_around(tmp_path):
    run_report(tmp_path / "page.html", text="\u202eabc")
    html = (tmp_path / "page.html").read_text("utf-8")
    assert "<p><bdi>x\u202eabc</bdi> on <bdi>\u202eabc</bdi>, " in html


def test_a_model_that_said_nothing_is_told_so(tmp_path):
    run_report(tmp_path / "page.html", text=" \n")
    html = (tmp_path / "page.html").read_text("utf-8")
    assert html.count('<p dir="auto"><i>(nothing)</i></p>') == 3  # before, after, and what was expected


def test_a_curve_names_what_it_draws_as_text():
    svg = loss_plot_svg([2.0, 1.0], label='"><script>')
    assert isinstance(svg, Markup) and "<script>" not in svg and 'aria-label="&#34;&gt;' in svg


FROM_A_WHEEL = """
from hf_llava_ft.hub import card_template
from hf_llava_ft.reports import page
print(page.__file__, card_template.__file__)
print(page.ENVIRONMENT.get_template("run.html"), len(card_template._read("model_card.md")))
"""


def test_the_templates_are_found_in_a_wheel_that_was_not_unpacked(tmp_path):
    package = Path(page_module.__file__).parent.parent
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as wheel:
        wheel.writestr("hf_llava_ft/__init__.py", "")
        for wing in ("reports", "hub"):
            for file in (package / wing).rglob("*.*"):
                wheel.write(file, f"hf_llava_ft/{file.relative_to(package).as_posix()}")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "package.whl")}
    command = [sys.executable, "-c", FROM_A_WHEEL]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.count("package.whl") == 2 and "run.html" in done.stdout, done.stderr
