"""The templates of assets/, with the sizes of plots."""

from pathlib import Path
from typing import Any

from inpo.common import pages
from inpo.inspection import plots

ASSETS = Path(__file__).parent / "assets"


def render(template: str, **values: Any) -> str:
    """A template of assets/ as a page that can be written as UTF-8."""
    pages.environment(ASSETS).globals |= {
        "width": plots.WIDTH,
        "height": plots.HEIGHT,
        "left": plots.LEFT,
        "right": plots.RIGHT,
        "top": plots.TOP,
        "bottom": plots.BOTTOM,
    }
    return pages.render(ASSETS, template, **values)
