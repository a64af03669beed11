"""Images that share a prompt share path and noise; how many they are, and who travels with them, changes no number."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from inpo.common.cache.schema import InverterIdentity
from inpo.common.denoiser import Denoiser
from inpo.common.inversion import Group, Inverted, invert
from tests.inversion.conftest import SD15, condition
from tests.rounding import record_bounds, rms

GROUPS = [Group(id="three", num_images=3), Group(id="one", num_images=1), Group(id="two", num_images=2)]
NAMES = ("x_t", "delta", "x0_t", "target", "reference_error")
ABAR = DDIMScheduler(**SD15).alphas_cumprod.double().numpy()
CHOICES = {
    "ddim": {},
    "ab2": {"refine_start": 2},
    "fixed_point": {"iterations": 3, "tolerance": 1e-3},
    "noise": {"noised_start": 1.0},
}


def invert_groups(
    denoiser: Denoiser, x0: Tensor, groups: list[Group], name: str, images_per_batch: int, *, measure: float = 1.0
) -> Inverted:
    identity = InverterIdentity(name=name, grid_points=4, timestep_range=(0, 1000), **CHOICES[name])
    return invert(
        denoiser,
        x0,
        groups,
        identity=identity,
        seed=3,
        timesteps_per_pair=3,
        caption=condition(len(x0)).rows(torch.arange(len(x0))),
        measure_inversion=measure,
        images_per_batch=images_per_batch,
    )


def assert_images_alike(made: Inverted, rows: list[int], other: Inverted, timestep: Tensor) -> None:
    """Images `rows` of one inversion are those of another, to rounding (tests/rounding.py)."""
    for number, row in enumerate(rows):
        for record, t in enumerate(timestep.tolist()):
            left = {name: getattr(made, name)[row, record][None].double().numpy() for name in NAMES}
            right = {name: getattr(other, name)[number, record][None].double().numpy() for name in NAMES}
            bounds = record_bounds(left, np.sqrt(ABAR[t]), np.sqrt(1 - ABAR[t]))
            for name in NAMES:
                apart = rms(left[name] - right[name]) / rms(left[name])
                assert apart <= bounds[name], (name, row, t, apart, bounds[name])


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("images_per_batch", [1, 4, 64])
def test_a_group_is_inverted_as_alone(linear: Callable, latents: Callable, name: str, images_per_batch: int) -> None:
    denoiser, x0 = linear(), latents(3).flatten(0, 1)
    made = invert_groups(denoiser, x0, GROUPS, name, images_per_batch)
    assert made.timestep.shape == (3, 3)
    assert made.x_t.shape == (6, 3, 2, 3, 3)
    assert made.reference_error.shape == (6, 3)
    assert made.finite.tolist() == [True] * 6
    start = 0
    for row, group in enumerate(GROUPS):
        images = list(range(start, start + group.num_images))
        alone = invert_groups(denoiser, x0[images], [group], name, 64)
        assert torch.equal(made.timestep[row], alone.timestep[0])
        assert_images_alike(made, images, alone, made.timestep[row])
        start += group.num_images


def test_the_images_of_a_group_share_timesteps_and_noise(linear: Callable, latents: Callable) -> None:
    made = invert_groups(linear(), latents(3).flatten(0, 1), GROUPS, "noise", 4)
    assert torch.equal(made.target[0], made.target[1])
    assert torch.equal(made.target[0], made.target[2])
    assert torch.equal(made.target[4], made.target[5])
    assert not torch.equal(made.target[0], made.target[3])
    assert len({tuple(row.tolist()) for row in made.timestep}) == 3


def test_an_image_takes_the_same_numbers_beside_more_images(linear: Callable, latents: Callable) -> None:
    """The first two images of a group of two, and of one of five; their path hangs on the group's id alone."""
    denoiser, x0 = linear(), latents(3).flatten(0, 1)[:5]
    five = invert_groups(denoiser, x0, [Group(id="same", num_images=5)], "ddim", 64)
    two = invert_groups(denoiser, x0[:2], [Group(id="same", num_images=2)], "ddim", 64)
    assert torch.equal(five.timestep, two.timestep)
    assert_images_alike(five, [0, 1], two, two.timestep[0])


def test_each_image_costs_its_own_calls_and_no_more(linear: Callable, latents: Callable) -> None:
    denoiser, x0 = linear(), latents(3).flatten(0, 1)
    invert_groups(denoiser, x0, [Group(id="a", num_images=6)], "noise", 4, measure=0.0)
    assert denoiser.num_calls == 6 * 3  # one for each record
