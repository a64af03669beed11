"""Fonts for prompts in any script."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from matplotlib import font_manager
from matplotlib.font_manager import FontEntry
from matplotlib.ft2font import FT2Font

OWN_FONT = "DejaVu Sans"
"""What matplotlib ships: the same on every machine."""


def font_names(text: str) -> list[str]:
    """DejaVu Sans, and behind it the installed font that has most of what it lacks."""
    lacking = _signs_lacking(text)
    other = _font_with(lacking) if lacking else None
    return [OWN_FONT, other.name] if other else [OWN_FONT]


@contextmanager
def unknown_signs_are_boxes() -> Iterator[None]:
    """A sign that no font has is drawn as a box, without matplotlib's warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from")
        yield


def _signs_lacking(text: str) -> set[int]:
    """Code points of `text` that DejaVu Sans has no glyph for."""
    return {ord(sign) for sign in text if not sign.isspace()} - _glyphs(font_manager.findfont(OWN_FONT))


def _font_with(signs: set[int]) -> FontEntry | None:
    """The installed font that has most of these signs; None if none has any."""
    fonts = [
        font
        for font in font_manager.fontManager.ttflist
        if "Last Resort" not in font.name  # boxes with the name of a script, for every sign there is
    ]
    best = max(fonts, key=lambda font: (len(signs & _glyphs(font.fname)), font.name))
    return best if signs & _glyphs(best.fname) else None


@cache
def _glyphs(file: str) -> frozenset[int]:
    """Code points of a font file's glyphs; none for a font that matplotlib cannot read, as those of coloured emoji."""
    try:
        return frozenset(FT2Font(file).get_charmap())
    except (RuntimeError, OSError):
        return frozenset()
