"""Loads the committed base model and makes pictures with it."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Float
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    import diffusers

BASE_FOLDER = Path(__file__).parent / "base"
LATENT_SHAPE = (6, 8, 8)
STEPS = 20
GUIDANCE = 2.5


@cache
def load_base() -> "diffusers.StableDiffusionPipeline":
    """The base model in float32 on the CPU, without a progress bar."""
    # Seconds to import, for which the process that only hands out the work need not wait.
    from inpo.common.models import open_model

    pipeline = open_model(str(BASE_FOLDER)).load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(
    captions: Sequence[str], noise: Float[Tensor, "caption 6 8 8"], *, steps: int = STEPS, guidance: float = GUIDANCE
) -> list[Image.Image]:
    """One RGB picture of 32 x 32 pixels per caption, from its starting noise (standard normal) by DDIM."""
    pipeline = load_base()
    return pipeline(
        list(captions), latents=noise, num_inference_steps=steps, guidance_scale=guidance, output_type="pil"
    ).images
