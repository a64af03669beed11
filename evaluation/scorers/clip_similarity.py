"""Cosine similarity of image and text under a CLIP model in transformers' format: PickScore and CLIP score."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from PIL import Image

from evaluation.scorers.weights import VARIABLE, device, loading

MAX_TOKENS = 77


class ClipSimilarity:
    """A CLIP model and its processor, loaded at first use, in float32."""

    def __init__(self, scorer: str, *, model: str, processor: str) -> None:
        """`model` and `processor` are folders or hub ids."""
        self.scorer, self.model_location, self.processor_location = scorer, model, processor

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import CLIPModel, CLIPProcessor

        fix = (
            f"download {self.model_location} once while online, or set {VARIABLE} to a folder "
            f"that holds it as {self.scorer}/"
        )
        with loading(self.scorer, self.model_location, fix):
            model = CLIPModel.from_pretrained(self.model_location, dtype=torch.float32)
            processor = CLIPProcessor.from_pretrained(self.processor_location)
        return model.eval().to(device()), processor

    @torch.inference_mode()
    def cosine(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Float64[np.ndarray, "image"]:
        """Cosine between each image and its own prompt; text is cut at 77 tokens, or the model's own limit."""
        model, processor = self._loaded
        inputs = processor(
            text=list(prompts), images=list(images), return_tensors="pt", padding=True, truncation=True,
            max_length=min(MAX_TOKENS, model.config.text_config.max_position_embeddings),
        )  # fmt: skip
        output = model(**inputs.to(model.device))
        # The embeddings are normalised by the model itself.
        return (output.image_embeds * output.text_embeds).sum(dim=-1).double().cpu().numpy()
