"""What a run shows when it ends: the answers before and after on the user's own pictures, the loss, what trained.

`write_report` makes one HTML file that opens from disk and makes no network requests; `answers_picture` one PNG.
Everything a model said is untrusted: it is escaped on its way into the page. Photographs go in as re-encoded
thumbnails, so that neither their EXIF data (places, cameras) nor the folders they lie in travel with the page.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_llava_ft.reports.page import NO_TEXT, Picture, thumbnail, write_page
from hf_llava_ft.reports.plots import loss_figure, loss_plot_svg
from hf_llava_ft.whole_files import write_atomically

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class AnsweredPhoto:
    """One question about one photograph: what the model said before training, what it says now, what it was taught."""

    photo: Path
    question: str
    before: str
    after: str
    expected: str

    def is_expected(self, answer: str) -> bool:
        """Whether `answer` is the expected one, word for word; blanks do not count."""
        return answer.split() == self.expected.split()


def write_report(
    path: Path,
    *,
    title: str,
    note: str,
    answers: list[AnsweredPhoto],
    losses: list[float],
    facts: list[tuple[str, str]],
    trained: list[tuple[str, int, int, str]],
    command: str,
) -> None:
    """Write the page of a finished run.

    Args:
        path (`Path`): The HTML file; its folder is made if missing, and a file already there is replaced whole.
        title (`str`): The heading.
        note (`str`): A paragraph that says what this run does and does not show.
        answers (`list[AnsweredPhoto]`): One card each, in this order.
        losses (`list[float]`): One value per step.
        facts (`list[tuple[str, str]]`): Names and values, such as `("verified", "yes")`.
        trained (`list[tuple[str, int, int, str]]`): Part, trainable parameters, all parameters, learning rate.
        command (`str`): The shell command that chats with the result.
    """
    write_page(
        path,
        "quickstart.html",
        title=title,
        note=note,
        cards=[(answer, Picture.of(thumbnail(answer.photo))) for answer in answers],
        num_right_before=sum(answer.is_expected(answer.before) for answer in answers),
        num_right_after=sum(answer.is_expected(answer.after) for answer in answers),
        losses=losses,
        curve=loss_plot_svg(losses),
        facts=facts,
        trained=trained,
        command=command,
    )


def answers_picture(answers: list[AnsweredPhoto], losses: list[float], path: Path) -> None:
    """Write one PNG, 1400 pixels wide: per photograph a row with before, after and expected; below, the loss curve."""
    from PIL import Image, ImageDraw

    fonts = {"text": _font(21), "head": _font(21, bold=True), "title": _font(30, bold=True)}
    width, margin, row_height, head_height, plot_height = 1400, 40, 176, 128, 340
    photo_width, gap = 210, 30
    column_width = (width - 2 * margin - photo_width - 3 * gap) // 3
    columns = [margin + photo_width + gap + i * (column_width + gap) for i in range(3)]
    height = head_height + row_height * len(answers) + (plot_height if losses else 0) + margin // 2

    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    has_one_question = len({answer.question for answer in answers}) == 1
    heading = answers[0].question if has_one_question else "Before and after fine-tuning"
    draw.text((margin, 28), heading, font=fonts["title"], fill=INK)
    for x, name in zip(columns, ("Before", "After", "Expected"), strict=True):
        draw.text((x, head_height - 40), name, font=fonts["head"], fill=MUTED)

    num_right = sum(answer.is_expected(answer.after) for answer in answers)
    verdict = f"{num_right} of {len(answers)} as expected"
    draw.text((width - margin, 34), verdict, font=fonts["text"], fill=MUTED, anchor="ra")

    for i, answer in enumerate(answers):
        y = head_height + i * row_height
        draw.line((margin, y, width - margin, y), fill=RULE, width=2)
        _paste_cover(picture, answer.photo, (margin, y + 14, photo_width, row_height - 28))
        color, mark = (GOOD, "\u2713") if answer.is_expected(answer.after) else (BAD, "\u2717")
        before = answer.before.strip() or NO_TEXT
        cells = [
            (before if has_one_question else f"{answer.question}\n{before}", MUTED),
            (f"{mark} {answer.after.strip() or NO_TEXT}", color),
            (answer.expected, INK),
        ]
        for x, (text, fill) in zip(columns, cells, strict=True):
            lines = _wrapped(text, fonts["text"], column_width, max_lines=5)
            draw.multiline_text((x, y + 14), "\n".join(lines), font=fonts["text"], fill=fill, spacing=7)
    if losses:
        y = head_height + row_height * len(answers)
        draw.line((margin, y, width - margin, y), fill=RULE, width=2)
        plot = io.BytesIO()
        figure = loss_figure(
            losses, title="Training loss", width=width - 2 * margin, height=plot_height - 20, font_size=15
        )
        figure.savefig(plot, format="png")
        picture.paste(Image.open(plot), (margin, y + 20))
    write_atomically(Path(path), lambda temporary: picture.save(temporary, format="PNG", optimize=True))


def _paste_cover(picture: Image.Image, photo: Path, box: tuple[int, int, int, int]) -> None:
    from PIL import ImageOps

    x, y, width, height = box
    # Cropped from below rather than from above, where heads are.
    picture.paste(ImageOps.fit(thumbnail(photo), (width, height), centering=(0.5, 0.1)), (x, y))


def _font(size: int, *, bold: bool = False):
    """DejaVu Sans, which matplotlib brings along: the check marks are in it, and so are most alphabets."""
    from matplotlib.font_manager import FontProperties, findfont
    from PIL import ImageFont

    return ImageFont.truetype(
        findfont(FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")), size
    )


def _wrapped(text: str, font, width: int, max_lines: int) -> list[str]:
    """`text` in lines no wider than `width`; a longer word is broken, and what does not fit ends in an ellipsis."""
    lines = []
    for paragraph in filter(str.strip, text.splitlines()):
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") <= width:
                line += f" {word}"
                continue
            lines += [line] if line else []
            line = word
            # Only as far as it can be seen: an untrained model may well answer with one word of 10,000 letters.
            while len(lines) <= max_lines and font.getlength(line) > width:
                num_fitting = next(n for n in range(1, len(line)) if font.getlength(line[: n + 1]) > width)
                lines.append(line[:num_fitting])
                line = line[num_fitting:]
        lines.append(line)
    if len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    while last and font.getlength(last + "\u2026") > width:
        last = last[:-1]
    return [*lines[: max_lines - 1], last.rstrip() + "\u2026"]


INK, MUTED, RULE, GOOD, BAD = "#1f2328", "#6b7280", "#e5e7eb", "#15803d", "#b91c1c"
