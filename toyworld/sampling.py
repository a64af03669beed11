"""Loads a base model of the toy world and makes pictures with it."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Float
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    import diffusers

    from inpo.common import families

MODELS = {name: Path(__file__).parent / name for name in ("base", "flow")}
LATENT_SHAPE = (12, 8, 8)
MAX_TOKENS = 20
"""Of a prompt: the 18 words of the longest caption, between a start and an end."""
STEPS = 20
GUIDANCE = 2.5


@cache
def _load(name: str) -> "tuple[families.Family, diffusers.DiffusionPipeline]":
    """A base model in float32 on the CPU, without a progress bar, and its family."""
    # Seconds to import, for which the process that only hands out the work need not wait.
    from inpo.common.models import open_model

    model = open_model(str(MODELS[name]))
    pipeline = model.load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return model.family, pipeline


def generate(
    captions: Sequence[str],
    noise: Float[Tensor, "caption 12 8 8"],
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    model: str = "base",
) -> list[Image.Image]:
    """One RGB picture of 64 x 64 pixels per caption, from its starting noise (standard normal), without other noise."""
    family, pipeline = _load(model)
    tokens = MAX_TOKENS if family.max_tokens else None
    told = family.drawing(captions, guidance, tokens)
    images: list[Image.Image] = pipeline(latents=noise, num_inference_steps=steps, output_type="pil", **told).images
    return images
