"""Sizes of images as users write them: N for squares, or HEIGHTxWIDTH; and as a network's configuration does."""

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator

from inpo.common.errors import UsageError


def size_text(height: int, width: int) -> str:
    """The one way in which a size is written."""
    return str(height) if height == width else f"{height}x{width}"


def sides(size: str) -> tuple[int, int]:
    """(height, width) in pixels."""
    height, _, width = size.partition("x")
    return int(height), int(width or height)


def _one_or_two_sides(value: object) -> object:
    if value is None:
        return None
    found = re.fullmatch(r"(\d{1,6})(?:[x*](\d{1,6}))?", str(value).strip().lower())
    given = [int(side) for side in found.groups() if side] if found and not isinstance(value, bool) else []
    if not given or not all(8 <= side <= 1 << 16 for side in given):
        raise ValueError("N or HEIGHTxWIDTH, for instance 512 or 1216x832, each from 8 to 65536")
    return size_text(given[0], given[-1])


ImageSize = Annotated[str, BeforeValidator(_one_or_two_sides)]
"""A setting that is such a size, in the form that `size_text` gives it."""


def latent_sides(sample_size: Any) -> tuple[int, int] | None:
    """(height, width) of the latents that a network was made for, by the configuration's one number, or two."""
    if sample_size is None:
        return None
    height, width = sample_size if isinstance(sample_size, Sequence) else (sample_size, sample_size)
    return int(height), int(width)


def check_sides(size: str, step: int, most: int | None) -> None:
    """Raise UsageError for a size that the network has no latents of: its sides are not multiples of `step` pixels, or
    longer than `most`."""
    if any(side % step for side in sides(size)):
        raise UsageError(
            "The resolution does not fit the model.",
            where="--resolution",
            expected=f"sides that are multiples of {step}",
            got=size,
            fix=f"round it up to {size_text(*(-(-side // step) * step for side in sides(size)))}",
        )
    if most is not None and max(sides(size)) > most:
        raise UsageError(
            "The model has no places for an image so large.",
            where="--resolution",
            expected=f"sides of {most} pixels at most",
            got=size,
            fix="take a smaller one",
        )
