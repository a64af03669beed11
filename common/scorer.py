"""What a scorer of images is, and how one is found by name.

Scorers are plugins in the entry-point group `inpo.scorers`: ours and a user's own package alike. A stage finds them by
name without importing the package that defines them.
"""

from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float64
from PIL import Image

from inpo.common.errors import UsageError

GROUP = "inpo.scorers"
_ROUNDING = 16 * float(np.finfo(np.float32).eps)
"""Of a score's size: what another batch size was seen to change, 4 steps of float32, and some more."""


@runtime_checkable
class Scorer(Protocol):
    """Scores images against their prompts; higher is better."""

    name: str

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Float64[np.ndarray, " image"]:
        """One float64 per image, in the scorer's own raw unit."""
        ...


def alike(a: Float64[np.ndarray, " image"], b: Float64[np.ndarray, " image"]) -> Bool[np.ndarray, " image"]:
    """Where one scorer's scores `a` and `b` are equal, or apart by float32 rounding of their size.

    That is the larger of both, or the median of all if that is larger still: a score near 0 is rounded as the others.
    """
    sizes = np.abs([a, b])
    near: np.ndarray = np.abs(b - a) <= _ROUNDING * np.maximum(sizes.max(axis=0), np.median(sizes))
    return near


def scorer_names() -> list[str]:
    """The names of all installed scorers."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def load_scorer(name: str) -> Scorer:
    """Load a scorer by its entry-point name. Raises UsageError listing the names there are, and for a package that
    cannot be imported or has another name for it."""
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            try:
                kind = entry.load()
            except (ImportError, AttributeError) as error:
                raise UsageError(
                    "The scorer's package cannot be imported.",
                    where=f"{name} = {entry.value}",
                    expected="a class that its entry point names",
                    got=f"{type(error).__name__}: {error}",
                    fix="install what that package needs, or correct it",
                ) from error
            scorer: Scorer = kind()
            if getattr(scorer, "name", None) != name:  # its files of scores would have a name that nobody asks for
                raise UsageError(
                    "The scorer has another name than its entry point.",
                    where=f"{name} = {entry.value}",
                    expected=f"name = {name!r} in that class",
                    got=getattr(scorer, "name", None),
                    fix="give both the same name in the scorer's package",
                )
            return scorer
    raise UsageError(
        "Unknown scorer.", where="--scorer", expected=", ".join(scorer_names()), got=name, fix="choose one"
    )
