"""Small worlds for the inversion: a schedule, a network, and a Denoiser around it, all made here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from inpo.common.cache.schema import InverterIdentity
from inpo.common.conditions import Condition
from inpo.common.denoiser import Denoiser
from inpo.common.families import FAMILIES
from inpo.common.inversion import Group, Inverted, invert
from inpo.common.levels import Levels
from inpo.common.testing import save_tiny_pipeline

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def sd15_levels() -> Levels:
    return Levels.from_scheduler(DDIMScheduler(**SD15))


class Linear(nn.Module):
    """A network of known smoothness, cheap, and different for every x, label and condition.

    output = x @ A(t) + condition mean, with all rows of a latent mixed, so that an error in any element shows.
    """

    def __init__(self, size: int, total: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.mix = nn.Parameter(torch.randn(size, size, generator=random) / size**0.5)
        self.total = total

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: Any = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        flat = x.flatten(1)
        time = (timestep.to(x.dtype) / self.total)[:, None]
        text = encoder_hidden_states.to(x.dtype).mean((1, 2))[:, None]
        output = torch.tanh(flat @ self.mix.to(x.dtype) + time) + 0.3 * flat * (1 - time) + text
        return (output.view_as(x),)


@pytest.fixture(scope="session")
def linear() -> Callable[..., Denoiser]:
    """linear(prediction_type, shape): a Denoiser around the cheap network, on SD1.5's schedule."""

    def build(prediction_type: str = "epsilon", shape: tuple[int, int, int] = (2, 3, 3)) -> Denoiser:
        return Denoiser(Linear(int(np.prod(shape)), 1000), sd15_levels(), FAMILIES["sd"].call, prediction_type)

    return build


@pytest.fixture(scope="session")
def tiny_unet(tmp_path_factory: pytest.TempPathFactory) -> UNet2DConditionModel:
    """A genuine UNet with random weights, latents of [4, 8, 8], text width 32."""
    folder: Path = save_tiny_pipeline(tmp_path_factory.mktemp("tiny"))
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet").requires_grad_(False).eval()


@pytest.fixture(scope="session")
def latents() -> Callable[..., Tensor]:
    """latents(num_pairs, shape): clean latents, float16, the same for the same pair number."""

    def build(num_pairs: int, shape: tuple[int, int, int] = (2, 3, 3)) -> Tensor:
        rows = [torch.randn(2, *shape, generator=torch.Generator().manual_seed(7 + pair)) for pair in range(num_pairs)]
        return torch.stack(rows).half()

    return build


def condition(num_pairs: int, width: int = 32, seed: int = 1) -> Condition:
    """One prompt for all pairs: [pair * side, 5 tokens, width]."""
    tokens = torch.randn(5, width, generator=torch.Generator().manual_seed(seed))
    return Condition(embedding=tokens.expand(2 * num_pairs, 5, width).clone())


class Pairs:
    """What an inversion of plain pairs, groups of two images, gave: arrays of images as [pair, record, side, ...]."""

    def __init__(self, made: Inverted) -> None:
        self.made = made
        self.timestep = made.timestep

    def __getattr__(self, name: str) -> Tensor | None:
        values = getattr(self.made, name)
        if values is None:
            return None
        by_side = values.unflatten(0, (-1, 2))
        return by_side if name in ("inversion_error", "finite") else by_side.transpose(1, 2)


@pytest.fixture(scope="session")
def inverted() -> Callable[..., Pairs]:
    """inverted(denoiser, x0 [pair, side, ...], **settings): the function under test with short settings.

    Settings that belong to the identity (name, grid_points, guidance, ...) and to the call (seed, timesteps_per_pair,
    extra, measure_inversion, pairs_per_batch, ids of pairs) may be mixed.
    """

    def build(denoiser: Denoiser, x0: Tensor, *, pairs_per_batch: int = 16, **settings: Any) -> Pairs:
        count = x0.shape[0]
        total = denoiser.levels.num_train_timesteps
        call = {
            key: settings.pop(key)
            for key in ("seed", "timesteps_per_pair", "extra", "measure_inversion")
            if key in settings
        }
        ids = settings.pop("pair_ids", [f"pair-{index}" for index in range(count)])
        grid_points = settings.setdefault("grid_points", 5)
        identity = InverterIdentity(**{"name": "ddim", "timestep_range": (0, total), **settings})
        made = invert(
            denoiser,
            x0.flatten(0, 1),
            [Group(id=each, num_images=2) for each in ids],
            **{
                "identity": identity,
                "seed": 0,
                "timesteps_per_pair": grid_points,
                "caption": condition(count),
                "empty": condition(count, seed=2),
                "images_per_batch": 2 * pairs_per_batch,
                **call,
            },
        )
        return Pairs(made)

    return build
