"""HTML pages from templates: whole in one file, asking no network for anything, and what people wrote is escaped.

A folder's templates may extend assets/page.html, which has head, style and frame.
"""

import base64
import io
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

_FRAME = Path(__file__).parent / "assets"
_SMALL = 64
"""Pictures up to this side are stored without loss, unless told otherwise."""


@cache
def environment(assets: Path) -> Environment:
    """Of a folder's templates, and of the frame."""
    made = Environment(
        loader=FileSystemLoader([assets, _FRAME]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    return made


def render(assets: Path, template: str, **values: Any) -> str:
    """A template of a folder as a page that can be written as UTF-8."""
    page = environment(assets).get_template(template).render(**values)
    return page.encode("utf-8", "replace").decode()  # JSON may name half a surrogate pair, and UTF-8 has none


def data_uri(image: Image.Image, *, lossless: bool | None = None) -> str:
    """An image as a data: URI of a WebP file."""
    data = io.BytesIO()
    image.save(data, "WEBP", lossless=max(image.size) <= _SMALL if lossless is None else lossless, quality=80, method=4)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()
