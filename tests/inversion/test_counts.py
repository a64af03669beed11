"""What the inversion asks of a device, counted on torch's meta device, which has no numbers to wait for. No clock."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from benchmarks.operations import CHOICES, Counts, count
from inpo.common.cache.schema import InverterIdentity
from inpo.common.denoiser import Denoiser
from inpo.common.inversion import Group, build_path

MOST = 160
"""Operations between two network calls in which everything happens: walks begin, step, store, end and go back."""


def pairs(number: int) -> list[Group]:
    return [Group(id=str(each), num_images=2) for each in range(number)]


def counts(name: str, groups: list[Group], images_per_batch: int) -> Counts:
    identity = InverterIdentity(**{"grid_points": 6, "timestep_range": (0, 1000), **CHOICES[name]})
    return count(identity, groups, images_per_batch=images_per_batch, measure_inversion=0.5, extra=("delta_prev",))


@pytest.mark.parametrize("name", CHOICES)
def test_a_batch_of_any_size_takes_the_same_operations(name: str) -> None:
    """One pair alone, and 16 that walk its path beside each other: a group's id says which."""
    one = counts(name, [Group(id="3", num_images=2)], 64)
    many = counts(name, [Group(id="3", num_images=2)] * 16, 64)
    assert len(one.operations) > 4
    assert one.operations == many.operations
    assert one.copies == many.copies
    assert one.waits == many.waits


@pytest.mark.parametrize("name", CHOICES)
def test_walks_at_different_points_take_one_set_of_operations(name: str) -> None:
    """A batch of half the pairs, which the others fill again."""
    made = counts(name, pairs(24), 24)
    assert max(made.operations) <= MOST
    num_calls = len(made.operations) - 1
    if name == "fixed_point":  # which asks how far all have come, at most once for a network call
        assert num_calls / 2 < made.waits <= num_calls
    else:
        assert made.waits == 0
    assert made.copies <= 3 * num_calls  # latents, figures, round trips; none of them is waited for


@pytest.mark.parametrize("measured", [0.0, 1.0])
@pytest.mark.parametrize(
    "settings",
    [
        *CHOICES.values(),
        {"name": "ddim", "iterations": 5},
        {"name": "fixed_point", "iterations": 3, "tolerance": 0.0, "guidance": 0.0},
        {"name": "ab2", "refine_start": 2, "noised_start": 0.5, "guidance": 3.0},
        {"name": "fireflow", "refine_start": 2, "noised_start": 0.5, "guidance": 3.0},
        {"name": "fireflow", "guidance": 0.0},
    ],
    ids=lambda settings: ", ".join(map(str, settings.values())),
)
def test_a_path_says_how_many_calls_it_takes(
    linear: Callable[..., Denoiser], latents: Callable, inverted: Callable, settings: dict[str, Any], measured: float
) -> None:
    """Counted by the denoiser, group by group: what `inpo plan` adds up."""
    settings = {"grid_points": 6, "timestep_range": (0, 1000), **settings}
    if settings["name"] == "fixed_point":
        settings["tolerance"] = 0.0  # no point settles early
    for number in range(4):
        denoiser, group = linear(), f"group-{number}"
        inverted(denoiser, latents(1), pair_ids=[group], timesteps_per_pair=2, measure_inversion=measured, **settings)
        identity = InverterIdentity(**settings)
        path = build_path(identity, denoiser.levels, seed=0, group_id=group, timesteps_per_pair=2)
        assert denoiser.num_calls == 2 * path.num_calls(identity, measured=measured)


def test_a_walk_that_ends_makes_room_at_once(
    linear: Callable[..., Denoiser], latents: Callable, inverted: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    predict = Denoiser.predict
    monkeypatch.setattr(Denoiser, "predict", lambda self, x, *rest: (sizes.append(len(x)), predict(self, x, *rest))[1])
    settings: dict[str, Any] = {"grid_points": 8, "timesteps_per_pair": 1}
    x0: Tensor = latents(12)
    inverted(linear(), x0, pairs_per_batch=1, **settings)
    lengths = [size for size in sizes if size == 2]
    assert lengths == sizes
    total = len(sizes)
    sizes.clear()
    inverted(linear(), x0, pairs_per_batch=3, **settings)
    assert sum(sizes) == 2 * total
    full = sizes.count(6)
    assert sizes == [6] * full + sorted(sizes[full:], reverse=True)
    assert len(sizes[full:]) <= 1 + 8  # the last two pairs' longest paths
