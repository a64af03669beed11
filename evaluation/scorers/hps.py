"""HPSv2 and HPSv2.1 (Wu et al. 2023): CLIP ViT-H/14 in open_clip's format, tuned on human choices."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from PIL import Image

from inpo.evaluation.scorers.weights import VARIABLE, device, loading, local_weights, missing_package

REPOSITORY = "xswu/HPSv2"


class HpsV2Scorer:
    """Cosine, about 0.27; papers' tables show 100 times as much."""

    name = "hpsv2"
    preference_temperature = 0.01
    checkpoint_name = "HPS_v2_compressed.pt"

    def __init__(self, *, checkpoint: Path | None = None, architecture: str = "ViT-H-14") -> None:
        """`checkpoint` is the project's own .pt file, `architecture` a name that open_clip knows."""
        self._checkpoint, self._architecture = checkpoint, architecture

    @cached_property
    def _loaded(self) -> tuple[Any, Any, Any]:
        try:
            import open_clip
        except ImportError:
            raise missing_package(self.name, "open_clip_torch") from None
        fix = (
            f"download {self.checkpoint_name} of {REPOSITORY} once while online, or set {VARIABLE} to a folder with it"
        )
        with loading(self.name, self.checkpoint_name, fix):
            file = self._checkpoint or local_weights(self.checkpoint_name) or self._download()
            model, _, preprocess = open_clip.create_model_and_transforms(
                self._architecture, precision="fp32", device=device(), pretrained_image=False
            )
            open_clip.load_checkpoint(model, str(file), weights_only=True)
        return model.eval(), preprocess, open_clip.get_tokenizer(self._architecture)

    def _download(self) -> str:
        from huggingface_hub import hf_hub_download

        return hf_hub_download(REPOSITORY, self.checkpoint_name)

    @torch.inference_mode()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Float64[np.ndarray, " image"]:
        model, preprocess, tokenizer = self._loaded
        pixels = torch.stack([preprocess(image) for image in images]).to(device())
        image_features = model.encode_image(pixels, normalize=True)
        text_features = model.encode_text(tokenizer(list(prompts)).to(device()), normalize=True)
        return (image_features * text_features).sum(dim=-1).double().cpu().numpy()


class HpsV21Scorer(HpsV2Scorer):
    """HPSv2.1: the same network, trained on more and better data. Its numbers do not compare with HPSv2's."""

    name = "hpsv21"
    checkpoint_name = "HPS_v2.1_compressed.pt"
