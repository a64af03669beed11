"""PickScore (Kirstain et al. 2023): CLIP ViT-H/14 tuned on Pick-a-Pic preferences."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64
from PIL import Image

from inpo.evaluation.scorers.clip_similarity import ClipSimilarity
from inpo.evaluation.scorers.weights import local_weights, model_location

MODEL = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScorer:
    """Cosine, about 0.2. Its authors' code multiplies by the model's logit scale (100), as papers' tables do."""

    name = "pickscore"
    preference_temperature = 0.01
    """1 / logit scale: with it sigmoid((win - lose) / temperature) is the preference that PickScore was trained for."""

    def __init__(self, *, model: str | None = None, processor: str | None = None) -> None:
        """`model` and `processor` are folders or hub ids; a folder of INPO_SCORERS may hold the processor's files."""
        local = local_weights(self.name)
        # transformers 4 writes the first, transformers 5 the second.
        files = ("preprocessor_config.json", "processor_config.json")
        has_processor = local is not None and any((local / name).is_file() for name in files)
        self._clip = ClipSimilarity(
            self.name,
            model=model or model_location(self.name, MODEL),
            processor=processor or (str(local) if has_processor else PROCESSOR),
        )

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Float64[np.ndarray, " image"]:
        return self._clip.cosine(images, prompts)
