"""A flow's levels: quantiles of a density of times, what lies below the table, and labels that half precision keeps."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from scipy.stats import norm

from inpo.common.cache.schema import InverterIdentity, LevelTables
from inpo.common.errors import ModelError, UsageError
from inpo.common.families import FAMILIES
from inpo.common.inversion import build_path
from inpo.common.inversion.path import check_distinct
from inpo.common.levels import Levels, TimeSettings

SD3 = FAMILIES["sd3"]
HALF = torch.arange(1, 125) / 125


@pytest.mark.parametrize("density", ["uniform", "logit-normal"])
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_the_table_is_the_quantile_function(density, shift):
    u = (np.arange(1000) + 0.5) / 1000
    t = u if density == "uniform" else 1 / (1 + np.exp(-norm.ppf(u)))
    t = shift * t / (1 + (shift - 1) * t)
    levels = Levels.from_density(density, shift, 1000, label=lambda times: 1000 * times)
    np.testing.assert_allclose(levels.noise.numpy(), t, rtol=1e-12)
    np.testing.assert_allclose(levels.signal.numpy(), 1 - t, rtol=1e-12)
    np.testing.assert_allclose(levels.label.numpy(), 1000 * t, rtol=1e-12)
    assert (levels.space, levels.floor, levels.density, levels.shift) == ("velocity", 0.05, density, shift)
    assert 0 < levels.noise[0] < levels.noise[-1] < 1


def test_auto_is_the_schedulers_own_shift():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    found = SD3.levels(scheduler, TimeSettings(density="uniform", shift="auto"))
    # The scheduler's own times are those of the same shift; they begin at 1, where nothing of the image is left.
    own = scheduler.sigmas.flip(0).double()
    u = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(3 * u / (1 + 2 * u), own, rtol=0, atol=1e-6)
    assert found.shift == 3.0
    assert SD3.levels(scheduler, TimeSettings(shift="none")).shift == 1.0
    assert SD3.levels(scheduler, TimeSettings(shift="2.5")).shift == 2.5


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("side", [64, 128])
def test_a_shift_by_the_images_size_is_the_schedulers(kind, side):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    shift = SD3.levels(scheduler, TimeSettings(shift="auto", latent_shape=(16, side, side))).shift
    mu = 0.5 + (side * side / 4 - 256) * (1.15 - 0.5) / (4096 - 256)
    sigmas = np.array([0.1, 0.5, 0.9])
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    expected = scheduler.sigmas[:3].numpy()
    np.testing.assert_allclose(shift * sigmas / (1 + (shift - 1) * sigmas), expected, rtol=1e-6)


def test_a_scheduler_of_another_kind_is_refused():
    for scheduler in (DDIMScheduler(), FlowMatchEulerDiscreteScheduler(invert_sigmas=True)):
        with pytest.raises(ModelError, match="rectified flow"):
            SD3.levels(scheduler)
    solver = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0)
    assert SD3.levels(solver, TimeSettings(shift="auto")).shift == 2.0


def test_images_are_drawn_at_the_shift_of_the_levels_without_noise_of_their_own():
    own = FlowMatchEulerDiscreteScheduler(shift=2.0, stochastic_sampling=True)
    solver = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0)
    drawn = [SD3.sampler(each) for each in (own, solver)]
    for each in drawn:
        each.set_timesteps(4)
        assert not each.config.stochastic_sampling
    own.set_timesteps(4)
    for each in drawn:
        torch.testing.assert_close(each.sigmas, own.sigmas)


def test_a_shift_by_the_images_size_that_is_not_told_is_refused():
    solver = DPMSolverMultistepScheduler(
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        use_dynamic_shifting=True,
        time_shift_type="exponential",
    )
    with pytest.raises(ModelError, match="base_image_seq_len"):
        SD3.levels(solver, TimeSettings(shift="auto"))


def test_exact_labels_only():
    levels = Levels.from_density("logit-normal", 3.0, 1000, exact=HALF)
    assert set(levels.noise.tolist()) <= set(HALF.double().tolist())
    free = Levels.from_density("logit-normal", 3.0, 1000)
    assert (levels.noise - free.noise).abs().max() <= 0.5 / 125 + 1e-7
    assert (levels.noise.diff() >= 0).all()
    assert LevelTables.of(levels).levels().noise.tolist() == levels.noise.tolist()
    check_distinct(levels, 10)
    with pytest.raises(UsageError, match="one level"):
        check_distinct(levels, 200)
    check_distinct(free, 200)


def test_below_a_table_lie_the_clean_end_and_levels_that_no_manifest_has():
    levels = LevelTables.of(Levels.from_density("logit-normal", 3.0, 1000, label=lambda t: 1000 * t)).levels()
    assert levels.walked[:, levels.clean].tolist() == [1.0, 0.0, 0.0]
    assert levels.point(levels.clean) == (1.0, 0.0)
    a, s, label = levels.walked[:, levels.points].numpy()
    sigma = s / a
    assert (np.diff(sigma) > 0).all()
    assert sigma[0] > 0.04
    np.testing.assert_allclose(label, 1000 * s, rtol=1e-6)
    assert list(levels.points) == list(range(levels.clean + 1, 1000))
    assert Levels.from_density("uniform", 1.0, 1000).clean == -1  # begins below the floor: nothing lies between


def test_the_start_is_refined_between_the_clean_end_and_a_table_that_begins_late():
    levels = Levels.from_density("logit-normal", 3.0, 1000)
    identity = InverterIdentity(name="ab2", grid_points=10, refine_start=3, timestep_range=(0, 1000))
    path = build_path(identity, levels, seed=0, group_id="g", timesteps_per_pair=10)
    below = [point for point in path.points if point.level < 0]
    assert below
    assert all(not point.records for point in below)
    sigmas = [levels.point(point.level)[1] / levels.point(point.level)[0] for point in path.points]
    assert sigmas == sorted(sigmas)
    assert sigmas[0] < float(levels.sigma[0])


def test_mixture_is_of_the_space():
    flow = Levels.from_density("uniform", 1.0, 10)
    timestep = np.array([[0, 9]])
    a, s = flow.mixture(timestep)
    assert a.tolist() == [[1.0, 1.0]]
    assert s.tolist() == [[0.05, 0.95]]
    noise = Levels.from_scheduler(DDIMScheduler())
    for got, want in zip(noise.mixture(timestep), noise.at(timestep), strict=True):
        np.testing.assert_array_equal(got, want)
