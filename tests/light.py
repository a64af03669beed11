"""Tiny Stable Diffusions with half the layers, for tests that call their networks often."""

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from inpo.common.testing import save_tiny_pipeline

LIGHT, LIGHT_V = "light", "light-v"
"""Among the kinds of tiny pipelines; the second predicts v."""


def save_light_pipeline(folder: Path, kind: str = LIGHT, *, seed: int = 0) -> Path:
    """As `save_tiny_pipeline`, which has the other kinds. A layer takes its time, whatever its size."""
    whole: Any = {LIGHT: "sd15", LIGHT_V: "sd2-v"}.get(kind, kind)
    save_tiny_pipeline(folder, whole, seed=seed)
    if kind == whole:
        return folder
    unet = folder / "unet"
    fewer = {"up_block_types": ("UpBlock2D", "UpBlock2D"), "mid_block_type": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        UNet2DConditionModel.from_config({**UNet2DConditionModel.load_config(unet), **fewer}).save_pretrained(unet)
    return folder
