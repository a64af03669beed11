"""A tiny Stable Diffusion with half the layers, for tests that call its network often."""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from inpo.common.testing import save_tiny_pipeline

LIGHT = "light"
"""Among the kinds of tiny pipelines."""


def save_light_pipeline(folder: Path, kind: str = LIGHT, *, seed: int = 0) -> Path:
    """As `save_tiny_pipeline`, which has the other kinds. A layer takes its time, whatever its size."""
    if kind != LIGHT:
        return save_tiny_pipeline(folder, kind, seed=seed)  # type: ignore[arg-type]
    unet = save_tiny_pipeline(folder, "sd15", seed=seed) / "unet"
    fewer = {"up_block_types": ("UpBlock2D", "UpBlock2D"), "mid_block_type": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        UNet2DConditionModel.from_config({**UNet2DConditionModel.load_config(unet), **fewer}).save_pretrained(unet)
    return folder
