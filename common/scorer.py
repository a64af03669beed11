"""What a scorer of images is, and how one is found by name.

Scorers are plugins in the entry-point group `inpo.scorers`: ours and a user's own package alike. A stage finds them by
name without importing the package that defines them.
"""

import math
import re
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float64
from PIL import Image

from inpo.common.errors import DataError, InpoError, UsageError

GROUP = "inpo.scorers"
_NAME = re.compile(r"[^/\\*?\[\]]{1,100}")
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
    cannot be used: one that fails, or whose class is not what a scorer is."""
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            try:
                scorer: Scorer = entry.load()()
            except (InpoError, MemoryError):
                raise
            except Exception as error:  # whatever that package raises
                raise UsageError(
                    "The scorer's package cannot be used.",
                    where=f"{name} = {entry.value}",
                    expected="a class that its entry point names, and that takes no arguments",
                    got=f"{type(error).__name__}: {error}",
                    fix="install what that package needs, or correct it",
                ) from error
            _check(scorer, entry)
            return scorer
    raise UsageError(
        "Unknown scorer.", where="--scorer", expected=", ".join(scorer_names()), got=name, fix="choose one"
    )


def _check(scorer: Any, entry: EntryPoint) -> None:
    name, own, temperature = entry.name, getattr(scorer, "name", None), getattr(scorer, "preference_temperature", 1.0)
    for right, what, expected, got in (
        # Its files of scores would have a name that nobody asks for, or cannot have it.
        (own == name, "The scorer has another name than its entry point.", f"name = {name!r} in that class", own),
        (
            _NAME.fullmatch(name),
            "The scorer's name cannot be part of a file's name.",
            "at most 100 signs, none of them / \\ * ? [ or ]",
            name,
        ),
        (
            callable(getattr(scorer, "score", None)),
            "The scorer does not score.",
            "a method score(images, prompts) in that class",
            type(scorer).__name__,
        ),
        (
            isinstance(temperature, int | float | np.floating) and 0 < temperature < math.inf,
            "The scorer's temperature must be above 0 and finite.",
            "preference_temperature = 0.01, for instance, in that class, or none",
            temperature,
        ),
    ):
        if not right:
            raise UsageError(
                what,
                where=f"{name} = {entry.value}",
                expected=expected,
                got=got,
                fix="correct it in the scorer's package",
            )


def checked_scores(
    scorer: Scorer, images: Sequence[Image.Image], prompts: Sequence[str], names: Sequence[str]
) -> list[float]:
    """The scorer's numbers, one per image, as floats; `names` are the images' own, for messages.

    Raises DataError, naming an image, for a scorer that fails, for what are not as many numbers as images, and for a
    number that is not finite. Memory that is short is raised as it comes: batch_size.py has words for it.
    """
    try:
        given = scorer.score(images, prompts)
    except (InpoError, MemoryError):
        raise
    except Exception as error:  # whatever that package raises
        from inpo.common.batch_size import is_out_of_memory  # torch

        if is_out_of_memory(error):
            raise
        raise DataError(
            "The scorer failed.",
            where=f"{scorer.name}, {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""),
            got=f"{type(error).__name__}: {error}",
            fix="look at those images; correct the scorer's package: --verbose shows where it failed",
        ) from error
    try:
        scores = np.asarray(given)
        told = f"{type(given).__name__} of shape {scores.shape}, {scores.dtype}"
        right = scores.dtype.kind in "fiub" and scores.shape == (len(images),)  # numpy makes numbers of text
    except Exception as error:  # whatever that object's own conversion raises
        right, told = False, f"{type(given).__name__}, of which numpy says {type(error).__name__}: {error}"
    if not right:
        raise DataError(
            "The scorer does not give one number per image.",
            where=f"{scorer.name}, {names[0]}",
            expected=f"numbers of shape ({len(images)},)",
            got=told,
            fix="correct the scorer's package",
        )
    scores = scores.astype(np.float64)
    with np.errstate(over="ignore"):
        bad = np.flatnonzero(~np.isfinite(scores.astype(np.float32)))  # as caches keep them
    if len(bad):
        raise DataError(
            "The scorer gave a number that is not finite.",
            where=f"{scorer.name}, {names[bad[0]]}",
            expected="a finite number, also in float32",
            got=scores[bad[0]],
            fix="look at that image; check the scorer's weights",
        )
    return [float(score) for score in scores]
