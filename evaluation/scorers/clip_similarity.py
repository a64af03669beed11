"""Cosine similarity of image and text under a CLIP model in transformers' format: PickScore and CLIP score."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from PIL import Image

from inpo.common.errors import ModelError
from inpo.evaluation.scorers.weights import VARIABLE, device, loading

MAX_TOKENS = 77


def load_clip(scorer: str, location: str, *, local_name: str) -> Any:
    """A whole CLIPModel in float32 on this process's device, from a folder or hub id.

    Raises ModelError if it is not to be had, or if the file lacks weights: transformers would draw those at random.
    """
    from transformers import CLIPModel

    fix = f"download {location} once while online, or set {VARIABLE} to a folder that holds it as {local_name}/"
    with loading(scorer, location, fix):
        model, found = CLIPModel.from_pretrained(location, dtype=torch.float32, output_loading_info=True)
        lacking = sorted(str(name) for kind in ("missing_keys", "mismatched_keys") for name in found[kind])
        if lacking:
            raise ModelError(
                f"The weights of scorer {scorer} are not a whole CLIP model.",
                where=location,
                got=f"{len(lacking)} weights missing or of another shape, the first {lacking[0]}",
                fix=fix,
            )
    return model.eval().to(device())


class ClipSimilarity:
    """A CLIP model and its processor, loaded at first use, in float32."""

    def __init__(self, scorer: str, *, model: str, processor: str) -> None:
        """`model` and `processor` are folders or hub ids."""
        self.scorer, self.model_location, self.processor_location = scorer, model, processor

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import CLIPProcessor

        model = load_clip(self.scorer, self.model_location, local_name=self.scorer)
        fix = f"download {self.processor_location} once while online, or put its files beside the model's"
        with loading(self.scorer, self.processor_location, fix):
            return model, CLIPProcessor.from_pretrained(self.processor_location)

    @torch.inference_mode()
    def cosine(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Float64[np.ndarray, " image"]:
        """Cosine between each image and its own prompt; text is cut at 77 tokens, or the model's own limit."""
        model, processor = self._loaded
        inputs = processor(
            text=list(prompts),
            images=list(images),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=min(MAX_TOKENS, model.config.text_config.max_position_embeddings),
        )
        output = model(**inputs.to(model.device))
        # The embeddings are normalised by the model itself.
        return (output.image_embeds * output.text_embeds).sum(dim=-1).double().cpu().numpy()
