"""The page of a check: one HTML file that needs nothing but itself.

It shows rows as the model sees them: the pictures made from `pixel_values` again, padded, cropped or cut into crops as
they go in, and the text with what is learned marked. All text of the data is untrusted and is escaped.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from hf_llava_ft.checking.images import stored_sizes
from hf_llava_ft.checking.preview import MAX_CHARS, Piece, marked_pieces, visible
from hf_llava_ft.checking.result import CheckResult
from hf_llava_ft.checking.rows import Sample
from hf_llava_ft.checking.summary import chosen_problems, summary_lines
from hf_llava_ft.data.pictures import open_picture
from hf_llava_ft.data.problems import Problem
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.reports.page import Picture, write_page

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
    tokens = result.tokens or {}
    histogram = (tokens.get("token_lengths") or {}).get("histogram")
    shown = result.samples if samples is None else samples
    write_page(
        path,
        "check.html",
        num_rows=result.rows,
        num_bad_rows=len({(problem.file, problem.row) for problem in result.problems}),
        sources=list(map(_source, result.sources)),
        facts=[
            (visible(name.strip()), visible(value))
            for name, value in summary_lines(result, samples_per_second)
            if name
        ],
        histogram=histogram_svg(histogram, tokens.get("model_max_length")) if histogram else None,
        problems=_listed(result.problems),
        warnings=_listed(result.warnings),
        samples=[_shown_sample(name, sample, processor) for name, sample in shown.items()] if processor else [],
    )


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


def histogram_svg(histogram: dict, limit: int | None = None) -> Markup:
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
    return Markup(  # of numbers alone
        f'<svg role="img" aria-label="{label}" width="100%" height="{height}" font-size="13" fill="currentColor" '
        f'style="overflow:visible;display:block;margin:36px 0 36px">{"".join(parts)}</svg>'
    )


def _shown_sample(name: str, sample: Sample, processor: LlavaProcessor) -> dict[str, Any]:
    messages = list(map(dict, sample.row["messages"]))
    pieces, is_cut = _cut(marked_pieces(processor, messages, stored_sizes(processor, sample.images)))
    images = [
        pictures_of(processor, open_picture(image, processor.picture_opening))
        for image in sample.images[:_MAX_PICTURES]
    ]
    return {
        "number": sample.number,
        "what": visible(_NAMES.get(name, name)),
        "id": visible(sample.row["id"][:200]),
        "pictures": [[Picture.of(picture, quality=90) for picture in pictures] for pictures in images],
        "num_more_pictures": max(0, len(sample.images) - _MAX_PICTURES),
        "pieces": pieces,
        "is_cut": is_cut,
    }


def _cut(pieces: list[Piece]) -> tuple[list[Piece], bool]:
    """The first `MAX_CHARS` characters, and whether there are more."""
    shown: list[Piece] = []
    length = 0
    for piece in pieces:
        if length >= MAX_CHARS:
            return shown, True
        text = piece.text
        if not piece.image_tokens:
            text = text[: MAX_CHARS - length]
            length += len(piece.text)
        shown.append(piece._replace(text=visible(text)))
    return shown, False


def _listed(problems: list[Problem]) -> dict[str, Any]:
    """`num` of them; those shown `first`; the `rest`, which take a click; and `num_unlisted`."""
    has_files = len({problem.file for problem in problems}) > 1
    listed = chosen_problems(problems, _MAX_LISTED)
    first = chosen_problems(listed, _MAX_OPEN)
    return {
        "num": len(problems),
        "first": [_cells(problem, has_files) for problem in first],
        "rest": [_cells(problem, has_files) for problem in listed if problem not in first],
        "num_unlisted": len(problems) - len(listed),
    }


def _cells(problem: Problem, has_files: bool) -> dict[str, str]:
    row = "" if problem.row is None else f"{problem.row:,}"
    row_id = problem.id or ""
    if len(row_id) > _MAX_ID_CHARS:
        row_id = f"{row_id[:_MAX_ID_CHARS]}..."
    return {
        "row": visible(f"{_file_name(problem.file)}: {row}" if has_files else row),
        "id": visible(row_id),
        "what": visible(problem.what),
        "what_to_do": visible(problem.what_to_do),
    }


def _source(described: str) -> str:
    name, _, rest = described.rpartition(": detected ")
    return visible(f"{_file_name(name)}: {rest}")


def _file_name(where: str) -> str:
    """Without the folders of this computer, which are nothing for a page that is passed on."""
    return os.path.basename(os.path.normpath(where)) if os.path.exists(where) else where
