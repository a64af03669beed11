"""HTML pages from assets/: whole in one file, and what people wrote is escaped everywhere in it."""

import base64
import io
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from inpo.inspection import plots

ASSETS = Path(__file__).parent / "assets"
_SMALL = 64
"""Pictures up to this side are stored without loss, unless told otherwise."""


def render(template: str, **values: Any) -> str:
    """A template of assets/ as a page that can be written as UTF-8."""
    page = _environment().get_template(template).render(**values)
    return page.encode("utf-8", "replace").decode()  # JSON may name half a surrogate pair, and UTF-8 has none


def data_uri(image: Image.Image, *, lossless: bool | None = None) -> str:
    """An image as a data: URI of a WebP file."""
    data = io.BytesIO()
    image.save(data, "WEBP", lossless=max(image.size) <= _SMALL if lossless is None else lossless, quality=80, method=4)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    made.globals |= {
        "width": plots.WIDTH,
        "height": plots.HEIGHT,
        "left": plots.LEFT,
        "right": plots.RIGHT,
        "top": plots.TOP,
        "bottom": plots.BOTTOM,
    }
    return made
