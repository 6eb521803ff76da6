"""The report is honest about what the model said, harmless whatever the model said, and needs nothing but itself."""

import base64
import io
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from hf_llava_ft.quickstart.report import AnsweredPhoto, answers_picture, write_report
from hf_llava_ft.reports.plots import curve_key, loss_figure, loss_plot_svg, save_loss_plot, smoothed

LOSSES = [4.0, 2.0, 1.0, 0.5]
COLORS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200)}


class Page(HTMLParser):
    """The tags, attributes and text of a page, as a browser would see them."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def answers(tmp_path):
    folder = tmp_path / "secret_folder"
    folder.mkdir()
    answered = []
    for name, color in COLORS.items():
        exif = Image.Exif()
        exif[0x010F] = "SecretCamera"
        Image.new("RGB", (640, 400), color).save(folder / f"{name}.jpg", exif=exif)
        sentence = f"The wall is {name}."
        answered.append(AnsweredPhoto(folder / f"{name}.jpg", "What is in the picture?", "um um", sentence, sentence))
    return answered


def report(tmp_path, answers, **changes) -> str:
    settings = {
        "title": "A run",
        "note": "A tiny model with an untrained tower.",
        "answers": answers,
        "losses": LOSSES,
        "facts": [("verified", "yes"), ("seconds of training", "41")],
        "trained": [("vision_tower", 0, 1000, "-"), ("language_model", 250, 10000, "1e-3")],
        "command": "llava-ft chat --model out/merged",
    }
    path = tmp_path / "out" / "report.html"
    write_report(path, **{**settings, **changes})
    assert os.listdir(path.parent) == ["report.html"]  # no temporary file is left
    return path.read_text(encoding="utf-8")


def with_after(answers, after):
    first, *others = answers
    return [AnsweredPhoto(first.photo, first.question, first.before, after, first.expected), *others]


def test_everything_asked_for_is_on_the_page(tmp_path, answers):
    text = Page(report(tmp_path, answers)).text
    for expected in (
        "A run",
        "A tiny model with an untrained tower.",
        "What is in the picture?",
        "um um",
        "The wall is blue.",
        "seconds of training",
        "41",
        "language_model",
        "10,000",
        "2.5%",
        "1e-3",
        "llava-ft chat --model out/merged",
    ):
        assert expected in text


def test_the_verdict_counts_the_answers_that_are_as_expected(tmp_path, answers):
    html = report(tmp_path, answers)
    assert "3 of 3 answers as expected" in html and "0 of 3 before" in html
    assert html.count("\u2713 as expected") == 3 and "not as expected" not in html

    html = report(tmp_path, with_after(answers, "The wall is pink."))
    assert "2 of 3 answers as expected" in html
    assert html.count("\u2713 as expected") == 2 and html.count("\u2717 not as expected") == 1


def test_blanks_do_not_make_an_answer_wrong_but_nothing_else_is_forgiven(tmp_path, answers):
    assert "3 of 3" in report(tmp_path, with_after(answers, " The wall\nis red. "))
    for wrong in ("", "the wall is red.", "The wall is red", "The wall is red. The wall is red."):
        assert "2 of 3" in report(tmp_path, with_after(answers, wrong))


def test_a_run_without_answers_does_not_claim_success(tmp_path):
    html = report(tmp_path, [], losses=[], facts=[], trained=[])
    assert "No answers were recorded" in html and "\u2713" not in html


ATTACK = (
    """<script>alert(1)</script><img src=x onerror=a()>"></p></div>&amp;{style}{{ 7*7 }}</style>\u202e\udcff\x00"""
)


@pytest.mark.parametrize("place", ["before", "after", "question", "expected", "title", "note", "command", "fact"])
def test_text_never_becomes_markup(tmp_path, answers, place):
    first = answers[0]
    values = {"before": first.before, "after": first.after, "question": first.question, "expected": first.expected}
    plain = Page(report(tmp_path, answers))
    if place in values:
        attacked = report(tmp_path, [AnsweredPhoto(first.photo, **{**values, place: ATTACK}), *answers[1:]])
    elif place == "fact":
        attacked = report(tmp_path, answers, facts=[(ATTACK, "yes"), ("verified", ATTACK)])
    else:
        attacked = report(tmp_path, answers, **{place: ATTACK})
    page = Page(attacked)
    assert "<script>alert(1)</script>" in page.text  # shown as text
    assert sorted(page.tags) == sorted(plain.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_the_page_needs_nothing_but_itself(tmp_path, answers):
    html = report(tmp_path, answers)
    assert "http://" not in html and "https://" not in html and "@import" not in html and "url(" not in html
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    references = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "xlink:href")]
    assert len(references) == len(answers)
    assert all(value.startswith("data:image/jpeg;base64,") for value in references)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_thumbnails_are_small_and_tell_nothing_of_where_they_come_from(tmp_path, answers):
    html = report(tmp_path, answers)
    assert "secret_folder" not in html and str(tmp_path) not in html and 'alt="red.jpg"' in html
    for encoded, color in zip(re.findall(r"base64,([^\"]+)", html), COLORS.values(), strict=True):
        content = base64.b64decode(encoded)
        thumbnail = Image.open(io.BytesIO(content))
        assert thumbnail.size == (320, 200) and not thumbnail.getexif()
        assert b"SecretCamera" not in content
        assert thumbnail.getpixel((160, 100)) == pytest.approx(color, abs=6)


def test_transparent_and_rotated_photographs_are_shown_as_a_viewer_would(tmp_path):
    clear, turned = tmp_path / "clear.png", tmp_path / "turned.jpg"
    Image.new("RGBA", (50, 40), (0, 0, 0, 0)).save(clear)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: show it turned by a quarter
    Image.new("RGB", (50, 40)).save(turned, exif=exif)
    html = report(tmp_path, [AnsweredPhoto(path, "?", "", "", ".") for path in (clear, turned)])
    thumbnails = [Image.open(io.BytesIO(base64.b64decode(text))) for text in re.findall(r"base64,([^\"]+)", html)]
    assert thumbnails[0].getpixel((25, 20)) == (255, 255, 255)
    assert thumbnails[1].size == (40, 50)


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, answers):
    before = report(tmp_path, answers)
    with pytest.raises(FileNotFoundError):
        report(tmp_path, [AnsweredPhoto(tmp_path / "missing.jpg", "?", "", "", "")])
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8") == before


def test_no_answer_is_drawn_beyond_its_column_or_row(tmp_path, answers):
    first = answers[0]
    long_texts = ["w" * 10_000, "i " * 10_000, "\n" * 20 + "w" * 100, "w\n" * 100, ATTACK * 20]
    path = tmp_path / "answers.png"
    answers_picture([AnsweredPhoto(first.photo, "?", text, text, text) for text in long_texts], [], path)
    with Image.open(path) as picture:
        for left, right in ((250, 279), (620, 649), (990, 1019), (1361, 1400)):  # between and beside the columns
            for top in range(128, 128 + 5 * 176, 176):
                assert picture.crop((left, top + 3, right, top + 173)).getextrema() == ((255, 255),) * 3
        for top in range(128, 128 + 5 * 176, 176):  # above and below the text of each row
            assert picture.crop((280, top + 3, 1360, top + 12)).getextrema() == ((255, 255),) * 3
            assert picture.crop((280, top + 166, 1360, top + 175)).getextrema() == ((255, 255),) * 3


def test_a_failed_write_leaves_nothing_behind(tmp_path, answers):
    (tmp_path / "taken").mkdir()  # a folder where the file should go
    with pytest.raises(OSError):
        answers_picture(answers, LOSSES, tmp_path / "taken")
    assert sorted(os.listdir(tmp_path)) == ["secret_folder", "taken"]


def test_the_answers_picture_opens_and_grows_with_the_answers(tmp_path, answers):
    path = tmp_path / "answers.png"
    heights = []
    for some in (answers[:1], with_after(answers, "w" * 10_000)):
        answers_picture(some, LOSSES, path)
        with Image.open(path) as picture:
            picture.load()
            assert picture.format == "PNG" and picture.width == 1400
            heights.append(picture.height)
            # The first photograph is in the first row, on the left.
            assert picture.getpixel((140, 216)) == pytest.approx(COLORS["red"], abs=6)
    assert heights[0] < heights[1]


@pytest.mark.parametrize(
    "losses", [[], [2.0], [0.0, 0.0], LOSSES, [3.0, float("nan"), 1.0], [3.0 / (i + 1) for i in range(400)]], ids=len
)
def test_loss_curves_of_any_length_can_be_drawn(tmp_path, losses):
    path = tmp_path / "loss.png"
    save_loss_plot(losses, path, learning_rates=[1e-3] * len(losses))
    with Image.open(path) as picture:
        picture.load()
        assert picture.size == (900, 450)
    svg = loss_plot_svg(losses)
    assert svg.count("<svg") == svg.count("</svg>") == 2
    assert "nan " not in svg and " nan" not in svg.split("<line", 1)[1] and "inf" not in svg
    assert " id=" not in svg and "href" not in svg


def test_the_curve_starts_at_step_one_on_the_left_and_ends_on_the_right():
    paths = re.findall(r'<path d="([^"]+)"', loss_plot_svg(LOSSES))
    assert len(paths) == 1  # few steps: no smoothed line
    points = [tuple(map(float, point.split())) for point in re.split("[ML]", paths[0])[1:]]
    assert [x for x, _ in points] == pytest.approx([0, 1000 / 3, 2000 / 3, 1000], abs=0.1)
    # Loss 4 is at the top (0), loss 0 would be at the bottom (220).
    assert [y for _, y in points] == pytest.approx([0, 110, 165, 192.5], abs=0.1)


def test_a_long_tail_is_not_a_line_at_the_bottom():
    losses = [11.0, 4.0, 2.0, 1.6, 1.5, 1.4, 1.3, 1.2, 1.1, 1.0]
    svg = loss_plot_svg(losses)
    (path,) = re.findall(r'<path d="([^"]+)"', svg)
    heights = [float(point.split()[1]) for point in re.split("[ML]", path)[1:]]
    assert heights[0] == 0 and heights[-1] - heights[4] > 30  # from 0 it would be 10 of 220
    assert "loss (logarithmic)" in svg and ">10</text>" in svg and ">2</text>" in svg
    assert loss_figure(losses).axes[0].get_yscale() == "log"
    for linear in ([11.0, 8.0, 5.0, 2.0, 1.0], [11.0, 2.0, 1.5, 0.0], [2.0, 0.1, 0.05, float("nan")][:1]):
        assert "logarithmic" not in loss_plot_svg(linear) and loss_figure(linear).axes[0].get_yscale() == "linear"


def test_the_key_names_the_lines_that_are_drawn():
    assert curve_key([1.0] * 50) == [("line", "loss")]
    assert [name for name, _ in curve_key([1.0] * 51, [(5, 1.0)])] == ["thin", "line", "evaluation"]


def test_a_small_fall_is_seen_to_fall():
    (path,) = re.findall(r'<path d="([^"]+)"', loss_plot_svg([2.4, 2.3, 2.2]))
    heights = [float(point.split()[1]) for point in re.split("[ML]", path)[1:]]
    assert heights == pytest.approx([0, 100, 200], abs=0.1)
    lower, upper = loss_figure([2.4, 2.3, 2.2]).axes[0].get_ylim()
    assert (lower, upper) == pytest.approx((2.18, 2.4088))
    for level in ([2.4, 2.4], [2.4, 2.399], [2.4, 1.2]):  # noise, and a fall that is seen from 0
        assert loss_figure(level).axes[0].get_ylim()[0] == 0


@pytest.mark.parametrize("losses", [[3.0] * 100, [3.0 / (1 + i) for i in range(100)], [0.1 * i for i in range(100)]])
def test_the_legend_covers_no_curve(losses):
    figure = loss_figure(losses, title="Training loss", learning_rates=losses, evaluated=[(50, 3.0), (100, 3.0)])
    figure.canvas.draw()
    (legend,) = figure.legends
    frame = legend.get_window_extent()
    assert [text.get_text() for text in legend.get_texts()] == ["each step", "smoothed", "evaluation", "learning rate"]
    for axes in figure.axes:
        assert not frame.overlaps(axes.get_window_extent()) and frame.x1 <= 900 and frame.y1 <= 450
        assert not frame.overlaps(axes.get_tightbbox())  # with the title, and the power of ten on the right
    inside = figure.axes[0].legend(loc="upper right")  # where it was
    figure.canvas.draw()
    assert inside.get_window_extent().overlaps(figure.axes[0].get_window_extent())


def test_a_loss_that_is_not_finite_leaves_a_gap_in_the_curve():
    (path,) = re.findall(r'<path d="([^"]+)"', loss_plot_svg([2.0, 1.0, float("nan"), 1.0, 2.0]))
    assert re.sub(r"[\d. ]+", "", path) == "MLML"


def test_long_runs_get_a_smoothed_line_and_keep_their_spikes_without_growing():
    assert loss_plot_svg([1.0] * 50).count("<path") == 1
    assert loss_plot_svg([1.0] * 51).count("<path") == 2
    losses = [1.0 + i % 2 / 10 for i in range(100_000)]
    losses[54_321] = 9.0
    svg = loss_plot_svg(losses)
    assert len(svg) < 60_000
    assert re.search(r"L543\.2 0\.0", svg)


def test_smoothing_neither_lags_nor_lets_one_bad_step_spread():
    rising = [float(i) for i in range(100)]
    assert smoothed(rising)[50] == pytest.approx(50)
    assert smoothed([1.0] * 30 + [float("nan")] + [1.0] * 30) == pytest.approx([1.0] * 61)


def test_one_learning_rate_per_step_is_required(tmp_path):
    with pytest.raises(ValueError, match="4 losses but 1 learning rates"):
        save_loss_plot(LOSSES, Path(tmp_path / "loss.png"), learning_rates=[1e-3])
