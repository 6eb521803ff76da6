"""The page of a check: one HTML file that needs nothing but itself.

It shows rows as the model sees them: the pictures made from `pixel_values` again, padded, cropped or cut into crops as
they go in, and the text with what is learned marked. All text of the data is untrusted and is escaped.
"""

import base64
import io
import os
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from hf_llava_ft.checking.images import stored_sizes
from hf_llava_ft.checking.preview import MAX_CHARS, Piece, marked_pieces, visible
from hf_llava_ft.checking.result import CheckResult
from hf_llava_ft.checking.rows import Sample
from hf_llava_ft.checking.summary import chosen_problems, summary_lines
from hf_llava_ft.data.collator import open_picture
from hf_llava_ft.data.problems import Problem
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.reports.page import PAGE, STYLE, write_atomically

_MAX_LISTED = 300  # problems, and warnings
_MAX_OPEN = 15  # of these, the ones that need no click
_MAX_ID_CHARS = 60
_MAX_PICTURES = 8  # of a sample
_NAMES = {
    "image": "with an image",
    "multi_image": "with several images",
    "text": "of text alone",
    "longest": "the longest",
}


def write_check_report(
    path: Path,
    result: CheckResult,
    processor: LlavaProcessor | None = None,
    samples: dict[str, Sample] | None = None,
    samples_per_second: float | None = None,
) -> None:
    """
    Args:
        path (`Path`): the HTML file; replaced whole if it is there.
        processor (`LlavaProcessor`, *optional*): makes pictures and text of the samples; without it there are none.
        samples (`dict[str, Sample]`, *optional*): rows to show, by what they are; by default those of the result.
        samples_per_second (`float`, *optional*): for the time of an epoch.
    """
    rows = len({(problem.file, problem.row) for problem in result.problems})
    verdict = (
        f'<p class="verdict good">✓ All {result.rows:,} rows can be trained on</p>'
        if result.trainable
        else f'<p class="verdict bad">✗ {rows:,} of {result.rows:,} rows can\'t be trained on</p>'
    )
    histogram = ((result.tokens or {}).get("token_lengths") or {}).get("histogram")
    limit = (result.tokens or {}).get("model_max_length")
    cards = []
    if processor is not None:
        samples = result.samples if samples is None else samples
        cards = [_card(name, sample, processor) for name, sample in samples.items()]
    sections = [
        f"<header><h1>Data check</h1>{verdict}<p>{'<br>'.join(map(_source, result.sources))}</p></header>",
        f"<section><h2>What is there</h2>{_facts(summary_lines(result, samples_per_second))}</section>",
        f"<section><h2>Tokens in a row</h2>{histogram_svg(histogram, limit)}</section>" if histogram else "",
        _problem_section("problem", result.problems),
        _problem_section("warning", result.warnings),
        f"<section><h2>Rows as the model sees them</h2>{_LEGEND}{''.join(cards)}</section>" if cards else "",
    ]
    page = PAGE.format(title="Data check", style=STYLE + _MORE_STYLE, body="\n".join(filter(None, sections)))
    content = page.encode("utf-8", errors="replace")
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def pictures_of(processor: LlavaProcessor, picture: Image.Image) -> list[Image.Image]:
    """What the model sees of a picture, made from its `pixel_values`: one square, or under LLaVA-1.6 the whole and
    then its crops."""
    settings = processor.image_processor
    pixels = processor.encode_images([picture])["pixel_values"].numpy().astype(np.float64)  # (crops, 3, H, W)
    if settings.do_normalize:
        mean, std = (np.array(values).reshape(3, 1, 1) for values in (settings.image_mean, settings.image_std))
        pixels = pixels * std + mean
    if settings.do_rescale:
        pixels = pixels / settings.rescale_factor
    levels = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return [Image.fromarray(crop) for crop in levels.transpose(0, 2, 3, 1)]


def histogram_svg(histogram: dict, limit: int | None = None) -> str:
    """
    Bars as an `<svg>` element that fills the width it is given; its lettering stays the same size.

    Args:
        histogram (`dict`): `edges` and `counts` of `length_statistics`.
        limit (`int`, *optional*): tokens that a row may have; bars behind it are of another colour.
    """
    edges, counts = histogram["edges"], histogram["counts"]
    height, top, low, high = 180, max(counts), edges[0], edges[-1]

    def percent(value: float) -> float:
        return 100 * (value - low) / (high - low)

    parts = []
    for start, stop, count in zip(edges[:-1], edges[1:], counts, strict=True):
        size = max(2.0, height * count / top) if count else 0
        colour = "var(--bad,#b91c1c)" if limit is not None and start > limit else "var(--accent,#2563eb)"
        width = 92 / len(counts)
        parts.append(
            f'<rect x="{percent(start):.2f}%" y="{height - size:.1f}" width="{width:.2f}%" height="{size:.1f}" '
            f'style="fill:{colour}"><title>{start:,} to {stop - 1:,} tokens: {count:,} rows</title></rect>'
        )
    parts.append(f'<line x1="0" x2="100%" y1="{height}" y2="{height}" stroke="currentColor" stroke-opacity=".3"/>')
    parts.append(f'<text x="0" y="-10">{top:,} rows in the highest bar</text>')
    for share, anchor in ((0, "start"), (0.5, "middle"), (1, "end")):
        value = round(low + share * (high - 1 - low))
        parts.append(f'<text x="{100 * share:g}%" y="{height + 20}" text-anchor="{anchor}">{value:,}</text>')
    label = f"{sum(counts):,} rows of {low:,} to {high - 1:,} tokens"
    return (
        f'<svg role="img" aria-label="{label}" width="100%" height="{height}" font-size="13" fill="currentColor" '
        f'style="overflow:visible;display:block;margin:36px 0 36px">{"".join(parts)}</svg>'
    )


def _card(name: str, sample: Sample, processor: LlavaProcessor) -> str:
    title = f"Row {sample.number}, {_NAMES.get(name, name)}"
    pictures = "".join(_figure(image, processor) for image in sample.images[:_MAX_PICTURES])
    if len(sample.images) > _MAX_PICTURES:
        pictures += f"<p>and {len(sample.images) - _MAX_PICTURES} more pictures</p>"
    messages = list(map(dict, sample.row["messages"]))
    text = _marked(marked_pieces(processor, messages, stored_sizes(processor, sample.images)))
    return (
        f'<article class="sample"><h3>{_text(title)} <small>{_text(sample.row["id"][:200])}</small></h3>'
        f"{f'<div class=pictures>{pictures}</div>' if pictures else ''}"
        f'<p dir="auto" class="row">{text}</p></article>'
    )


def _figure(image, processor: LlavaProcessor) -> str:
    whole, *crops = pictures_of(processor, open_picture(image, processor.picture_opening))
    small = "".join(_img(crop, "crop") for crop in crops)
    return f"<figure>{_img(whole, 'whole')}{f'<div class=crops>{small}</div>' if small else ''}</figure>"


def _img(picture: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=90)
    source = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<img class="{kind}" src="{source}" alt="{kind}" width="{picture.width}" height="{picture.height}">'


def _marked(pieces: list[Piece]) -> str:
    shown, length = [], 0
    for piece in pieces:
        if length >= MAX_CHARS:
            shown.append(" <i>... the rest is not shown</i>")
            break
        if piece.image_tokens:
            shown.append(f'<span class="image">{_text(piece.text)} x {piece.image_tokens}</span>')
            continue
        text = _text(piece.text[: MAX_CHARS - length])
        length += len(piece.text)
        shown.append(f"<mark>{text}</mark>" if piece.learned else text)
    return "".join(shown)


def _problem_section(name: str, problems: list[Problem]) -> str:
    if not problems:
        return ""
    has_files = len({problem.file for problem in problems}) > 1
    listed = chosen_problems(problems, _MAX_LISTED)
    first = chosen_problems(listed, _MAX_OPEN)
    rest = [problem for problem in listed if problem not in first]
    more = ""
    if rest:
        unlisted = len(problems) - len(listed)
        note = f"<p>{unlisted:,} more are in the file of --json.</p>" if unlisted else ""
        more = f"<details><summary>{len(rest):,} more</summary>{_problem_table(rest, has_files)}{note}</details>"
    title = f"{len(problems):,} {name}{'' if len(problems) == 1 else 's'}"
    return f"<section><h2>{title}</h2>{_problem_table(first, has_files)}{more}</section>"


def _problem_table(problems: list[Problem], has_files: bool) -> str:
    columns = ("row", "id", "what", "what to do")
    rows = ["".join(f"<th>{column}</th>" for column in columns)]
    for problem in problems:
        row = "" if problem.row is None else f"{problem.row:,}"
        row_id = problem.id or ""
        if len(row_id) > _MAX_ID_CHARS:
            row_id = f"{row_id[:_MAX_ID_CHARS]}..."
        cells = (f"{_file_name(problem.file)}: {row}" if has_files else row, row_id, problem.what, problem.what_to_do)
        pairs = zip(columns, cells, strict=True)
        rows.append("".join(f'<td data-name="{column}">{_text(cell)}</td>' for column, cell in pairs))
    return f'<table class="problems">{"".join(f"<tr>{row}</tr>" for row in rows)}</table>'


def _facts(lines: list[tuple[str, str]]) -> str:
    items = "".join(
        f"<div><dt>{_text(name.strip())}</dt><dd>{_text(value)}</dd></div>" for name, value in lines if name
    )
    return f'<dl class="wide">{items}</dl>'


def _source(described: str) -> str:
    name, _, rest = described.rpartition(": detected ")
    return _text(f"{_file_name(name)}: {rest}")


def _file_name(where: str) -> str:
    """Without the folders of this computer, which are nothing for a page that is passed on."""
    return os.path.basename(os.path.normpath(where)) if os.path.exists(where) else where


def _text(text: str) -> str:
    return escape(visible(text))


_LEGEND = "<p>What is <mark>marked</mark> is learned; the rest is read and not learned.</p>"

_MORE_STYLE = """
mark{background:var(--good-card);color:var(--good);border-bottom:2px solid var(--good);padding:1px 0}
.sample{display:block}.sample h3 small{color:var(--muted);font-weight:400;margin-left:8px;overflow-wrap:anywhere}
.sample .row{margin:0}.row .image{background:var(--paper);border:1px solid var(--rule);border-radius:6px;padding:0 6px}
.pictures{display:flex;flex-wrap:wrap;gap:12px;margin:0 0 12px}figure{margin:0;display:flex;gap:8px;flex-wrap:wrap}
figure img{height:auto;border-radius:6px;border:1px solid var(--rule)}.whole{width:220px}
.crops{display:flex;flex-wrap:wrap;gap:4px;max-width:228px;align-content:flex-start}.crop{width:108px}
.wide{grid-template-columns:1fr}header p{overflow-wrap:anywhere}section>p{margin:0 0 12px;color:var(--muted)}
.problems td,.problems th{text-align:left;vertical-align:top;overflow-wrap:anywhere}
.problems td:first-child,.problems th:first-child{white-space:nowrap}
.problems td:nth-child(2){min-width:7em;max-width:14em}.problems td:nth-child(n+3){min-width:14em}
@media(max-width:720px){.problems td{display:block;text-align:left;min-width:0!important;max-width:none!important}
.problems td:nth-child(n+2)::before{display:block;font-size:.85rem}.problems td:empty{display:none}
.problems td:first-child::before{content:"row ";font-weight:600}
.problems td{border:0}.problems tr{border-bottom:1px solid var(--rule);padding:8px 0}}
summary{cursor:pointer;color:var(--accent);margin:12px 0}
"""
