"""The page of a check: what the model sees, harmless whatever the data says, and nothing but itself."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from hf_llava_ft.checking.check import check_data
from hf_llava_ft.checking.report import histogram_svg, pictures_of, write_check_report
from hf_llava_ft.data.formats import open_source
from hf_llava_ft.processing.uint8_pixels_llava import uint8_images

ATTACK = "<script>alert(1)</script><img src=x onerror='a()'>\"></p></mark>&amp;{style}{{ 7*7 }}</style>\u202e"


class Page(HTMLParser):
    """The tags, attributes and text of a page, as a browser would see them; `marked` is what stands in <mark>."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text, self.marked = [], [], "", ""
        self._depth = 0
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._depth += tag == "mark"

    def handle_endtag(self, tag):
        self._depth -= tag == "mark"

    def handle_data(self, data):
        self.text += data
        self.marked += data if self._depth else ""


def picture(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def report(tmp_path, processor):
    """A function: rows to the page about them."""
    (tmp_path / "images").mkdir()
    for index in range(3):
        exif = Image.Exif()
        exif[0x010F] = "SecretCamera"
        picture(90 + 30 * index, 60).save(tmp_path / f"images/{index}.jpg", exif=exif)

    def make(rows, longest=500) -> str:
        (tmp_path / "data.json").write_text(json.dumps(rows))
        result = check_data(open_source(str(tmp_path / "data.json"), tmp_path / "images"), processor, longest=longest)
        write_check_report(tmp_path / "report.html", result, processor)
        assert not [path.name for path in tmp_path.iterdir() if "tmp" in path.name or "incomplete" in path.name]
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return make


def rows(answer="It is a cat.", question="What is it?", row_id="row1", bad_id="bad"):
    def row(row_id, question, answer, images=None):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"id": row_id, "conversations": turns} | ({"image": images} if images else {})

    return [
        row(row_id, f"<image>\n{question}", answer, ["0.jpg"]),
        row("pair", "<image><image>\nCompare.", "They differ.", ["1.jpg", "2.jpg"]),
        row("text", "Hello", "Hi."),
        row(bad_id, "q", " "),
        row("stop", "q", "ends </s> here"),
    ]


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (56, 56), (300, 20)])
def test_the_pictures_are_the_pixel_values_to_the_level(processor, size):
    seen = pictures_of(processor, picture(*size))
    options = {"do_pad": False} if processor.depends_on_image_size else {"return_tensors": "pt"}
    levels = uint8_images(processor.image_processor, [picture(*size)], **options)["pixel_values"]
    expected = (
        np.stack([np.asarray(crop) for image in levels for crop in image])
        if processor.depends_on_image_size
        else levels.numpy()
    )
    assert np.array_equal(np.stack([np.asarray(one).transpose(2, 0, 1) for one in seen]), expected)
    assert len(seen) == (3 if processor.depends_on_image_size else 1)
    # And not the picture as it is in the file, nor another one.
    assert seen[0].size == (56, 56)
    other = pictures_of(processor, picture(size[0] + 1, size[1]))
    assert not np.array_equal(np.asarray(other[0]), np.asarray(seen[0]))


def test_samples_show_what_goes_in_and_what_is_learned(report, processor):
    html = report(rows())
    page = Page(html)
    assert "1 of 5 rows can't be trained on" in page.text and "Row 1, with an image" in page.text
    assert "Row 2, with several images" in page.text and "Row 3, of text alone" in page.text
    assert " It is a cat.</s>" in page.marked and "What is it?" not in page.marked and "USER" not in page.marked
    counts = [int(number) for number in re.findall(r"<image> x (\d+)", page.text)]
    sizes = [(60, 90), (60, 120), (60, 150)]
    expected = [processor.num_image_tokens_at(*size) for size in sizes]
    assert set(counts) == set(expected)
    crops = 3 if processor.depends_on_image_size else 1
    pictures = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert len(pictures) >= 3 * crops and all(source.startswith("data:image/jpeg;base64,") for source in pictures)
    content = base64.b64decode(pictures[0].partition(",")[2])
    shown = np.asarray(Image.open(io.BytesIO(content))).astype(int)
    seen = np.asarray(pictures_of(processor, Image.open(io.BytesIO(content)).convert("RGB"))[0])
    assert shown.shape == seen.shape == (56, 56, 3)
    assert b"SecretCamera" not in content and "SecretCamera" not in html


def test_problems_and_warnings_are_listed(report):
    text = Page(report(rows())).text
    assert "1 problem" in text and "turn 2 is an empty answer" in text and "write the answer" in text
    assert "1 warning" in text and "'</s>'" in text
    assert (
        "Warning" not in Page(report(rows()[:3])).text
        and "All 3 rows can be trained on" in Page(report(rows()[:3])).text
    )


def test_many_problems_are_folded_and_counted(report):
    bad = [{"id": f"bad{index}", "conversations": []} for index in range(400)]
    html = report(rows() + bad)
    page = Page(html)
    assert (
        "401 problems" in page.text and "285 more" in page.text and "101 more are in the file of --json" in page.text
    )
    assert page.tags.count("details") == 1 and len(html) < 1_000_000


@pytest.mark.parametrize("place", ["answer", "question", "row_id", "bad_id"])
def test_text_never_becomes_markup(report, place):
    harmless = re.sub(r"[^\w ]", "-", ATTACK)  # as long, so that the same rows are shown
    plain, attacked = Page(report(rows(**{place: harmless}))), Page(report(rows(**{place: ATTACK})))
    assert "<script>alert(1)</script>" in attacked.text or place == "bad_id" and "<script>" in attacked.text
    bars = {"rect", "title"}  # lengths differ a little
    assert sorted(tag for tag in attacked.tags if tag not in bars) == sorted(t for t in plain.tags if t not in bars)
    assert not [name for _, name, _ in attacked.attributes if name.startswith("on")]


def test_the_page_needs_nothing_but_itself(report, tmp_path):
    html = report(rows())
    assert "http://" not in html and "https://" not in html and "@import" not in html and "url(" not in html
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert "default-src 'none'" in html and "\x00" not in html
    references = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "xlink:href")]
    assert all(value.startswith("data:image/jpeg;base64,") for value in references)
    assert str(tmp_path) not in html and "data.json: LLaVA JSON, 5 rows" in page.text


def test_the_histogram_has_the_counts_and_marks_what_is_too_long():
    svg = histogram_svg({"edges": [10, 20, 30, 40], "counts": [4, 0, 2]}, limit=25)
    titles = re.findall(r"<title>(.*?)</title>", svg)
    assert titles == ["10 to 19 tokens: 4 rows", "20 to 29 tokens: 0 rows", "30 to 39 tokens: 2 rows"]
    heights = [float(height) for height in re.findall(r'<rect [^>]*height="([\d.]+)"', svg)]
    assert heights == [180, 0, 90]
    assert svg.count("--bad") == 1 and histogram_svg({"edges": [1, 2], "counts": [1]}).count("--bad") == 0


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
@pytest.mark.parametrize("width", [390, 1400])
def test_a_browser_finds_it_as_wide_as_its_window(report, tmp_path, width):
    attacked = rows(answer=ATTACK + "x" * 300, row_id="i" * 150, bad_id="j" * 300)
    html = report(attacked)
    # Measured by a script of our own, on a copy that allows it.
    probe = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script>"
    policy = re.search(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", html).group()
    framed = html.replace(policy, "").replace("</body>", f"{probe}</body>")
    (tmp_path / "probe.html").write_text(framed, encoding="utf-8")
    # A window of a browser without a screen may have a least width; a frame has none.
    frame = (
        f"<iframe id=f src=probe.html style='border:0;width:{width}px;height:4000px'></iframe><script>onload = () => "
        "document.title = document.getElementById('f').contentDocument.title</script>"
    )
    (tmp_path / "frame.html").write_text(frame)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path / 'frame.html'}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    title = re.search(r"<title>(\d+) of (\d+)</title>", dom)
    assert title, dom
    assert int(title[1]) <= int(title[2]) == width
