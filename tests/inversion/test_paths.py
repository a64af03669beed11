"""Which points a pair visits: grid, kept timesteps, refined and noised start, range, and the settings refused."""

import numpy as np
import pytest
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from inpo.common.cache.schema import InverterIdentity
from inpo.common.errors import UsageError
from inpo.common.inversion import build_path, check_settings
from inpo.common.levels import Levels

SCHEDULE = Levels.from_scheduler(
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
)
SIGMA = SCHEDULE.sigma.numpy()


def identity(**changes: object) -> InverterIdentity:
    return InverterIdentity(**{"name": "ddim", "grid_points": 10, "timestep_range": (0, 1000), **changes})


def levels_of(path: object) -> list[int]:
    return [point.level for point in path.points]  # type: ignore[attr-defined]


def kept_of(path: object) -> list[int]:
    return [t for point in path.points for t in point.records]  # type: ignore[attr-defined]


@settings(max_examples=150)
@given(data=st.data(), n=st.integers(1, 60), seed=st.integers(0, 5), pair=st.text(max_size=8))
def test_every_path(data: st.DataObject, n: int, seed: int, pair: str) -> None:
    kept = data.draw(st.integers(1, n))
    refine = data.draw(st.integers(0, 8))
    noised_start = data.draw(st.sampled_from([0.0, 0.01, 0.3, 0.95, 1.0]))
    low = data.draw(st.integers(0, 900))
    high = data.draw(st.integers(low + 1, 1000))
    chosen = identity(grid_points=n, refine_start=refine, noised_start=noised_start, timestep_range=(low, high))
    try:
        check_settings(chosen, num_train_timesteps=1000, timesteps_per_pair=kept)
    except UsageError:
        assert kept > 1 or high - low < 1000 / n + 1  # one point per 1000 / n labels is always there
        return
    path = build_path(chosen, SCHEDULE, seed=seed, group_id=pair, timesteps_per_pair=kept)
    # The grid, from a path that keeps everything and adds nothing.
    whole = build_path(identity(grid_points=n), SCHEDULE, seed=seed, group_id=pair, timesteps_per_pair=n)
    grid = kept_of(whole)
    assert len(grid) == n
    gaps = np.diff(grid)
    assert n == 1 or (np.floor(1000 / n) <= gaps.min() and gaps.max() <= np.ceil(1000 / n))
    assert 0 <= grid[0] < np.ceil(1000 / n)
    levels, records = levels_of(path), kept_of(path)
    assert len(records) == kept == len(set(records))
    assert records == sorted(records)
    assert set(records) <= {t for t in grid if low <= t < high}
    assert levels == sorted(set(levels))
    assert levels[-1] == records[-1]  # the inversion stops at the largest kept one
    assert {t for t in grid if t <= records[-1]} <= set(levels)
    assert len(levels) <= sum(t <= records[-1] for t in grid) + refine
    for point in path.points:
        assert point.noised == (point.level in grid and point.level < noised_start * 1000)
    assert path.starts_clean == (not path.points[0].noised)


def refined_by_hand(grid: list[int], extra: int) -> list[int]:
    """math: p times, split the step with the largest sigma ratio at the label nearest sqrt(left * right)."""
    levels = list(grid)
    for _ in range(extra):
        best = (0.0, 0.0, 0)
        for index, right in enumerate(levels):
            left = 0.8 * SIGMA[0] if index == 0 else SIGMA[levels[index - 1]]
            best = max(best, (SIGMA[right] / left, np.sqrt(left * SIGMA[right]), index))
        label = min(range(1000), key=lambda t: abs(np.log(SIGMA[t] / best[1])))
        levels.insert(best[2], label)
    return levels


@pytest.mark.parametrize("pair", ["a", "b", "c", "d"])
def test_refined_start_splits_the_widest_step(pair: str) -> None:
    plain = build_path(identity(), SCHEDULE, seed=0, group_id=pair, timesteps_per_pair=10)
    refined = build_path(identity(refine_start=3), SCHEDULE, seed=0, group_id=pair, timesteps_per_pair=10)
    assert levels_of(refined) == refined_by_hand(levels_of(plain), 3)
    assert kept_of(refined) == kept_of(plain)  # the extra points are no records


def test_all_noised_leaves_nothing_to_refine() -> None:
    for pair in range(50):  # 0.95: for some pairs the whole grid is noised, for others its last point is inverted
        path = build_path(
            identity(name="ab2", refine_start=3, noised_start=0.95),
            SCHEDULE,
            seed=0,
            group_id=str(pair),
            timesteps_per_pair=10,
        )
        assert len(kept_of(path)) == 10


def test_every_timestep_is_covered_uniformly() -> None:
    counts = np.zeros(1000)
    for pair in range(3000):
        path = build_path(identity(grid_points=7), SCHEDULE, seed=0, group_id=str(pair), timesteps_per_pair=2)
        counts[kept_of(path)] += 1
    assert counts.sum() == 6000
    tens = counts.reshape(10, 100).sum(1)
    # Ten bins of 600 expected; chi-squared with 9 degrees of freedom stays below 27.9 with probability 0.999.
    assert ((tens - 600) ** 2 / 600).sum() < 27.9
    assert (counts[:10].sum(), counts[-10:].sum()) > (20, 20)


def test_the_released_grid() -> None:
    path = build_path(identity(faithful=True), SCHEDULE, seed=1, group_id="x", timesteps_per_pair=6)
    every = [1, 101, 201, 301, 401, 501, 601, 701, 801, 901]
    assert levels_of(path) == every[: len(levels_of(path))]
    for point in path.points:
        for timestep in point.records:
            above = [level for level in every if level >= timestep]
            assert point.level == (above[0] if above else 901)
    drawn = {
        t
        for pair in range(400)
        for t in kept_of(
            build_path(identity(faithful=True), SCHEDULE, seed=1, group_id=str(pair), timesteps_per_pair=6)
        )
    }
    assert len(drawn) > 800  # any timestep, not just the grid's
    # The stride is T // n: with 7 points 142, and the last level is not T - T/n.
    path = build_path(identity(faithful=True, grid_points=7), SCHEDULE, seed=0, group_id="x", timesteps_per_pair=7)
    assert set(levels_of(path)) <= {1, 143, 285, 427, 569, 711, 853}


@pytest.mark.parametrize(
    ("changes", "kept", "words"),
    [
        ({}, 11, ["--timesteps-per-pair", "1..10", "11"]),
        ({}, 0, ["--timesteps-per-pair", "0"]),
        ({"grid_points": 1001}, 1, ["--grid-points", "1..1000", "1001"]),
        ({"timestep_range": (0, 250)}, 3, ["--timestep-range", "at least 3", "2 of 10 in [0, 250)"]),
        ({"timestep_range": (500, 500)}, 1, ["--timestep-range", "500 500"]),
        ({"timestep_range": (0, 1001)}, 1, ["--timestep-range", "1000"]),
        ({"faithful": True, "name": "ab2"}, 1, ["--faithful"]),
        ({"faithful": True, "noised_start": 0.3}, 1, ["--faithful"]),
        ({"faithful": True, "guidance": 0.0}, 1, ["--faithful", "guidance"]),
    ],
)
def test_settings_that_no_pair_could_follow_are_refused(
    changes: dict[str, object], kept: int, words: list[str]
) -> None:
    with pytest.raises(UsageError) as raised:
        check_settings(identity(**changes), num_train_timesteps=1000, timesteps_per_pair=kept)
    for word in words:
        assert word in str(raised.value)


@settings(max_examples=100)
@given(grid_points=st.integers(1, 40), low=st.integers(0, 999), width=st.integers(1, 1000), kept=st.integers(1, 10))
def test_an_accepted_range_serves_every_offset(grid_points: int, low: int, width: int, kept: int) -> None:
    chosen = identity(grid_points=grid_points, timestep_range=(low, min(low + width, 1000)))
    try:
        check_settings(chosen, num_train_timesteps=1000, timesteps_per_pair=kept)
    except UsageError:
        return
    for pair in range(30):
        path = build_path(chosen, SCHEDULE, seed=0, group_id=str(pair), timesteps_per_pair=kept)
        assert len(kept_of(path)) == kept
