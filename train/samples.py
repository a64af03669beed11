"""Sample images during training: fixed prompts and seeds, so that pictures of different steps can be compared."""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from jaxtyping import UInt8

from common.models import Model


@torch.no_grad()
def sample_images(
    unet: UNet2DConditionModel, model: Model, prompts: Sequence[str], *, steps: int, guidance: float, seed: int,
    resolution: int,
) -> UInt8[np.ndarray, "height width 3"]:
    """One image per prompt, side by side. VAE and text encoders are loaded for this and freed again."""
    device = next(unet.parameters()).device
    pipeline = model.load_pipeline(unet=unet)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    was_training = unet.training
    unet.eval()
    images = pipeline(
        list(prompts), num_inference_steps=steps, guidance_scale=guidance, output_type="np",
        height=resolution, width=resolution,
        generator=[torch.Generator().manual_seed(seed + number) for number in range(len(prompts))],
    ).images
    unet.train(was_training)
    return (np.concatenate(list(images), axis=1) * 255).round().clip(0, 255).astype(np.uint8)
