"""ImageReward (Xu et al. 2023), by its own package."""

import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from PIL import Image

from inpo.evaluation.scorers.weights import VARIABLE, device, loading, local_weights, missing_package

MODEL = "ImageReward-v1.0"


class ImageRewardScorer:
    """Reward, standardised over its training data: mean 0, standard deviation 1."""

    name = "imagereward"
    preference_temperature = 1.0
    """It was trained with sigmoid(win - lose)."""

    @cached_property
    def _model(self) -> Any:
        try:
            import ImageReward
        except ImportError:
            raise missing_package(self.name, "image-reward") from None
        fix = f"download {MODEL} once while online, or set {VARIABLE} to a folder with imagereward/ImageReward.pt"
        folder = local_weights(self.name)
        with loading(self.name, MODEL, fix):
            if folder is None:
                return ImageReward.load(MODEL, device=str(device()))
            return ImageReward.load(
                str(folder / "ImageReward.pt"), device=str(device()), med_config=str(folder / "med_config.json")
            )

    @torch.inference_mode()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Float64[np.ndarray, " image"]:
        model = self._model
        scores = []
        # A file is what every version of the package reads; PNG keeps the pixels as they are.
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "image.png"
            for image, prompt in zip(images, prompts, strict=True):
                image.save(file)
                scores.append(float(model.score(prompt, str(file))))
        return np.array(scores, dtype=np.float64)
