"""What a scorer of images is, and how one is found by name.

Scorers are plugins in the entry-point group `inpo.scorers`: ours and a user's own package alike. A stage finds them by
name without importing the package that defines them.
"""

from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64
from PIL import Image

from inpo.common.errors import UsageError

GROUP = "inpo.scorers"


@runtime_checkable
class Scorer(Protocol):
    """Scores images against their prompts; higher is better."""

    name: str

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Float64[np.ndarray, " image"]:
        """One float64 per image, in the scorer's own raw unit."""
        ...


def scorer_names() -> list[str]:
    """The names of all installed scorers."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def load_scorer(name: str) -> Scorer:
    """Load a scorer by its entry-point name. Raises UsageError listing the names there are."""
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            scorer: Scorer = entry.load()()
            return scorer
    raise UsageError(
        "Unknown scorer.", where="--scorer", expected=", ".join(scorer_names()), got=name, fix="choose one"
    )
