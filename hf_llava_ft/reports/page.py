"""A self-contained HTML page, and the pieces that reports are put together from.

What goes in is escaped here: names of files, and everything that a model said.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

THUMBNAIL_PIXELS = 320
NO_TEXT = "(nothing)"


def write_page(path: Path, title: str, sections: list[str], style: str = "") -> None:
    """
    Write a self-contained page.

    Args:
        path (`Path`): The HTML file; replaced whole.
        title (`str`): Of the window.
        sections (`list[str]`): HTML, one below the other; empty ones are left out.
        style (`str`): CSS of this page alone.
    """
    page = PAGE.format(title=escape(title), style=STYLE + style, body="\n".join(filter(None, sections)))
    # A byte-level tokenizer can leave half of a character behind; that must not cost the user the report.
    content = page.encode("utf-8", errors="replace")
    write_atomically(Path(path), lambda temporary: temporary.write_bytes(content))


def data_address(image: Image.Image) -> str:
    """A picture as a JPEG inside the address, so that a page needs no other file."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def said(text: str) -> str:
    """What a model said, as HTML."""
    return escape(text.strip()) or f"<i>{NO_TEXT}</i>"


def trained_table(trained: list[tuple[str, int, int, str]]) -> str:
    """Part, trainable parameters, all parameters and learning rate, as HTML."""
    names = ("part", "trainable", "all parameters", "share", "learning rate")
    rows = ["".join(f"<th>{name}</th>" for name in names)]
    for part, num_trainable, num_all, learning_rate in trained:
        share = f"{100 * num_trainable / num_all if num_all else 0:.3g}%"
        cells = zip(names, (part, f"{num_trainable:,}", f"{num_all:,}", share, learning_rate), strict=True)
        # On a narrow screen the columns become lines, and each line shows its own name.
        rows.append("".join(f'<td data-name="{name}">{escape(cell)}</td>' for name, cell in cells))
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def facts_list(facts: list[tuple[str, str]]) -> str:
    """Names and values, as HTML."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f"<dl>{items}</dl>"


def thumbnail(photo: Path) -> Image.Image:
    """The photograph upright, opaque, at most `THUMBNAIL_PIXELS` wide and high, and without its metadata."""
    from PIL import Image, ImageOps

    with Image.open(photo) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGBA")
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    # Pasting into a new image leaves the metadata behind, and shows white where the photograph is transparent.
    clean = Image.new("RGB", image.size, "white")
    clean.paste(image, mask=image)
    return clean


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Nobody ever reads half a file: it is written beside its place and moved there whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# The policy forbids every request, so that even a mistake in escaping could not call out.
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>{style}</style></head>
<body><main>
{body}
</main></body></html>
"""

STYLE = """
:root{color-scheme:light dark;--ink:#1f2328;--muted:#5b6470;--paper:#f6f7f9;--card:#fff;--rule:#dfe3e8;
--good:#15803d;--good-card:#ecfdf3;--bad:#b91c1c;--bad-card:#fef2f2;--accent:#2563eb}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--muted:#9aa4b0;--paper:#111418;--card:#1a1f25;--rule:#313842;
--good:#4ade80;--good-card:#12291b;--bad:#fca5a5;--bad-card:#331a1c;--accent:#7aa7ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1060px;margin:0 auto;padding:24px 16px 48px}section{display:flow-root}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 12px}h2{font-size:1.2rem;margin:36px 0 12px}
h3{font-size:1.05rem;margin:0 0 12px}h4{font-size:.85rem;margin:0 0 2px;color:var(--muted);font-weight:600}
p{margin:0}header p:last-child{max-width:46em;color:var(--muted)}
.verdict{font-size:1.15rem;font-weight:600;margin:0 0 12px}
.verdict small{color:var(--muted);font-weight:400;font-size:.9rem;margin-left:12px;white-space:nowrap}
article,pre{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:16px}
article{display:flex;gap:24px;margin:0 0 16px}
article>img{width:240px;height:auto;align-self:flex-start;border-radius:8px;flex:none}article>div{flex:1;min-width:0}
.answers{display:grid;grid-template-columns:1fr 1fr;gap:12px;margin:0 0 12px}
.answers>div{border-radius:8px;padding:10px 12px;border:1px solid var(--rule);min-width:0}
.before p{color:var(--muted)}.good{color:var(--good)}.bad{color:var(--bad)}
.after.good{background:var(--good-card);border-color:var(--good);color:var(--ink)}
.after.bad{background:var(--bad-card);border-color:var(--bad);color:var(--ink)}.after span{float:right}
.after.good span{color:var(--good)}.after.bad span{color:var(--bad)}.expected{padding:0 13px}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;font:.9rem/1.5 ui-monospace,Menlo,Consolas,monospace}
article p{white-space:pre-wrap;overflow-wrap:anywhere}code{font:inherit;user-select:all}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:8px 14px 8px 0;border-bottom:1px solid var(--rule);text-align:right}
th{color:var(--muted);font-size:.85rem;font-weight:600}th:first-child,td:first-child{text-align:left}
th:last-child,td:last-child{padding-right:0}
dl{margin:0;display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:12px 24px}
dt{color:var(--muted);font-size:.85rem;font-weight:600}dd{margin:0;overflow-wrap:anywhere}
@media(max-width:720px){article{flex-direction:column;gap:12px}article>img{width:100%;max-width:320px}
.answers{grid-template-columns:1fr}tr:first-child{display:none}tr{display:block;padding:0 0 12px}
td{display:flex;justify-content:space-between;padding:4px 0}td:first-child{font-weight:600}
td:nth-child(n+2)::before{content:attr(data-name);color:var(--muted)}}
"""
