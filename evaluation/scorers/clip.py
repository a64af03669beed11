"""CLIP score: cosine under the laion2B ViT-H/14 that the papers of this field use."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64
from PIL import Image

from inpo.evaluation.scorers.clip_similarity import ClipSimilarity
from inpo.evaluation.scorers.weights import model_location

MODEL = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class ClipScorer:
    """Cosine, about 0.3; papers' tables show 100 times as much."""

    name = "clip"
    preference_temperature = 0.01

    def __init__(self, *, model: str | None = None) -> None:
        """`model` is a folder or hub id with model and processor."""
        location = model or model_location(self.name, MODEL)
        self._clip = ClipSimilarity(self.name, model=location, processor=location)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Float64[np.ndarray, " image"]:
        return self._clip.cosine(images, prompts)
