"""A self-contained HTML page: a template of `templates/` and its values.

`base.html` and `style.css` are of every page, `_macros.html` holds what several show. A new page is a template that
extends `base.html`, and a call of [`write_page`]. What goes in is escaped by jinja2: names of files, and everything
that a model said.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from hf_llava_ft.whole_files import write_atomically

if TYPE_CHECKING:
    from PIL import Image

THUMBNAIL_PIXELS = 320
NO_TEXT = "(nothing)"

ENVIRONMENT = Environment(
    loader=PackageLoader("hf_llava_ft.reports"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.globals["NO_TEXT"] = NO_TEXT
ENVIRONMENT.filters["thousands"] = lambda number: f"{number:,}"
ENVIRONMENT.filters["figures"] = lambda number: f"{number:.3g}"


@dataclass(frozen=True)
class Picture:
    """A picture as a JPEG inside its `address`, so that a page needs no other file."""

    address: str
    width: int
    height: int

    @classmethod
    def of(cls, image: Image.Image, quality: int = 85) -> Picture:
        """Its metadata stays behind only if `image` has none, as a [`thumbnail`] has."""
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=quality)
        return cls(f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", *image.size)


def write_page(path: Path, template: str, **values: Any) -> None:
    """
    Write a self-contained page.

    Args:
        path (`Path`): The HTML file; replaced whole.
        template (`str`): Its name in `templates/`.
        values: What the template names; text is escaped, but for `markupsafe.Markup`.

    Raises:
        jinja2.UndefinedError: if the template names what is not among the values.
    """
    page = ENVIRONMENT.get_template(template).render(values)
    # A byte-level tokenizer can leave half of a character behind; that must not cost the user the report.
    content = page.encode("utf-8", errors="replace")
    write_atomically(Path(path), lambda temporary: temporary.write_bytes(content))


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
