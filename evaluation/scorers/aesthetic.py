"""The LAION aesthetic predictor: a small head on normalised CLIP ViT-L/14 image embeddings. It reads no prompt."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from PIL import Image
from torch import Tensor, nn

from inpo.common.errors import ModelError
from inpo.evaluation.scorers.clip_similarity import load_clip
from inpo.evaluation.scorers.weights import VARIABLE, device, loading, local_weights, model_location

CLIP_MODEL = "openai/clip-vit-large-patch14"
HEAD_FILE = "sac+logos+ava1-l14-linearMSE.pth"
_FIX = f"get {HEAD_FILE} from christophschuhmann/improved-aesthetic-predictor and set {VARIABLE} to the folder it is in"


class AestheticHead(nn.Module):
    """The predictor's head: linear layers with nothing but dropout in between, which is off here."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = (width, 1024, 128, 64, 16, 1)
        dropouts = (0.2, 0.2, 0.1)
        layers: list[nn.Module] = []
        for index in range(len(widths) - 1):
            layers.append(nn.Linear(widths[index], widths[index + 1]))
            if index < len(dropouts):
                layers.append(nn.Dropout(dropouts[index]))
        self.layers = nn.Sequential(*layers)

    def forward(self, embeddings: Float[Tensor, "image width"]) -> Float[Tensor, " image"]:
        """One number per L2-normalised embedding; of real pictures mostly between 4 and 7."""
        scores: Tensor = self.layers(embeddings)
        return scores.squeeze(-1)


def load_head(file: Path) -> AestheticHead:
    """The head from its state dict. Raises ModelError for a file that is no such state dict; runs no pickled code."""
    with loading("aesthetic", str(file), _FIX):
        state = torch.load(file, map_location="cpu", weights_only=True)
        if "layers.0.weight" not in state:
            raise ModelError(
                "This is no aesthetic head.", where=file, expected="layers.0.weight", got=list(state)[:3], fix=_FIX
            )
        head = AestheticHead(state["layers.0.weight"].shape[1])
        head.load_state_dict(state)
    return head.eval()


class AestheticScorer:
    """Predicted mean opinion from 1 to 10. Prompts are ignored."""

    name = "aesthetic"

    def __init__(self, *, clip: str | None = None, head: Path | None = None) -> None:
        """`clip` is a folder or hub id, `head` the state dict's file."""
        self._clip, self._head = clip, head

    @cached_property
    def _loaded(self) -> tuple[Any, Any, AestheticHead]:
        from transformers import CLIPImageProcessor

        file = self._head or local_weights(HEAD_FILE)
        if file is None:
            raise ModelError("The weights of scorer aesthetic are missing.", where=HEAD_FILE, fix=_FIX)
        head = load_head(file)
        location = self._clip or model_location("aesthetic-clip", CLIP_MODEL)
        clip = load_clip(self.name, location, local_name="aesthetic-clip")
        with loading(self.name, location, f"download {CLIP_MODEL} once while online"):
            processor = CLIPImageProcessor.from_pretrained(location)
        width = head.layers[0].in_features
        if clip.config.projection_dim != width:
            raise ModelError(
                "The aesthetic head does not fit the CLIP model.",
                where=location,
                expected=f"embeddings of width {width}",
                got=clip.config.projection_dim,
                fix=f"use {CLIP_MODEL}",
            )
        return clip, processor, head.to(device())

    @torch.inference_mode()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Float64[np.ndarray, " image"]:
        clip, processor, head = self._loaded
        inputs = processor(images=list(images), return_tensors="pt").to(device())
        embeddings = clip.visual_projection(clip.vision_model(**inputs).pooler_output)
        return head(nn.functional.normalize(embeddings, dim=-1)).double().cpu().numpy()
