"""The levels are the scheduler's own table, and the exact grid covers every timestep evenly."""

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inpo.common.errors import ModelError, UsageError
from inpo.common.families import FAMILIES
from inpo.common.levels import Levels, exact_grid

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"])
def test_the_table_is_the_schedulers(name):
    scheduler = getattr(diffusers, name)(**SD15)
    levels = Levels.from_scheduler(scheduler)
    assert (levels.num_train_timesteps, levels.space) == (1000, "noise")
    assert torch.equal(levels.signal, scheduler.alphas_cumprod.double().sqrt())
    assert torch.equal(levels.noise, (1 - scheduler.alphas_cumprod.double()).sqrt())
    assert levels.label.tolist() == list(range(1000))
    assert levels.floor == float(levels.sigma[0])
    assert {table.dtype for table in (levels.signal, levels.noise, levels.label)} == {torch.float64}
    one = torch.ones(1000, dtype=torch.float64)
    torch.testing.assert_close(levels.signal**2 + levels.noise**2, one, rtol=0, atol=1e-15)


def test_at_agrees_with_add_noise_of_diffusers():
    scheduler = diffusers.DDIMScheduler(**SD15)
    levels = Levels.from_scheduler(scheduler)
    x0, noise = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0)).unbind()
    timestep = torch.tensor([0, 500, 999])
    a, s = (torch.from_numpy(value).float()[:, None, None, None] for value in levels.at(timestep.numpy()))
    torch.testing.assert_close(a * x0 + s * noise, scheduler.add_noise(x0, noise, timestep))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_prediction_type_is_the_schedulers(prediction_type):
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction_type)
    assert FAMILIES["sd"].prediction(scheduler) == prediction_type


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(ModelError, match="Unknown prediction type") as caught:
        FAMILIES["sd"].prediction(diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"))
    assert "flow_prediction" in str(caught.value)


def test_schedules_that_the_equations_do_not_hold_for_are_refused():
    with pytest.raises(ModelError, match="no alphas_cumprod"):
        Levels.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ModelError, match="zero-terminal-SNR"):
        Levels.from_scheduler(diffusers.DDIMScheduler(**SD15, rescale_betas_zero_snr=True))
    other = {"timestep_type": "continuous", "prediction_type": "v_prediction"}
    with pytest.raises(ModelError, match=r"(?s)timestep_type.*continuous"):
        Levels.from_scheduler(diffusers.EulerDiscreteScheduler(**SD15, **other))
    with pytest.raises(ModelError, match="use_flow_sigmas"):
        Levels.from_scheduler(diffusers.DPMSolverMultistepScheduler(**SD15, use_flow_sigmas=True))
    for table, message in [([0.9, 0.5, 0.0], "zero-terminal"), ([0.5, 0.9], "decreasing"), ([1.0, 0.5], "decreasing")]:
        with pytest.raises(ModelError, match=message):
            Levels.from_alphas_cumprod(torch.tensor(table))


@given(st.data())
def test_a_grid_is_ascending_in_range_and_one_point_a_cell(data):
    timesteps = data.draw(st.integers(1, 2000), label="T")
    steps = data.draw(st.integers(1, timesteps), label="n")
    offset = data.draw(st.floats(0, 1, exclude_max=True), label="u")
    grid = exact_grid(offset, steps, timesteps)
    assert grid.shape == (steps,)
    assert grid[0] >= 0
    assert grid[-1] < timesteps
    assert (np.diff(grid) > 0).all()
    # Point i lies in its own n-th of the table.
    index = np.arange(steps)
    assert (grid >= index * timesteps // steps).all()
    assert (grid * steps < (index + 1) * timesteps).all()


@given(timesteps=st.integers(1, 300), data=st.data())
def test_over_all_offsets_every_timestep_comes_equally_often(timesteps, data):
    steps = data.draw(st.integers(1, timesteps), label="n")
    # u = (j + 1/2) / T for j = 0..T-1 walks evenly over [0, 1) and hits no rounding edge for integer cells.
    counts = np.zeros(timesteps, int)
    for j in range(timesteps):
        counts[exact_grid((j + 0.5) / timesteps, steps, timesteps)] += 1
    assert (counts == steps).all()


def test_impossible_grids_are_refused():
    for steps in (0, 11):
        with pytest.raises(UsageError, match="out of range"):
            exact_grid(0.5, steps, 10)
    for offset in (-0.1, 1.0):
        with pytest.raises(UsageError, match="offset"):
            exact_grid(offset, 5, 10)
