"""How near the inverters come to the exact ODE and to the exact DDIM inverse, where both are known."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from inpo.common.denoiser import Denoiser
from inpo.common.seeding import normal
from tests.mixture import mixture_eps, noise_mixture
from tests.rounding import assert_alike

T = 20_000
SIGMA = np.linspace(0.01, 2.0, T)
"""A schedule so fine that the labels' rounding does not matter."""


@pytest.fixture(scope="module")
def mixture() -> Denoiser:
    return noise_mixture(SIGMA)


def ode_error(
    mixture: Denoiser,
    inverted: Callable,
    x0: Tensor,
    name: str,
    grid_points: int,
    *,
    noised_start: float = 0.0,
    **settings: object,
) -> float:
    """RMS distance from the exact ODE dz/dsigma = eps(z, sigma) at each pair's last grid point.

    The ODE starts where the inverter does: at the clean latents, or at the last noised point.
    """
    made = inverted(
        mixture,
        x0,
        name=name,
        grid_points=grid_points,
        timesteps_per_pair=1,
        timestep_range=(T - T // grid_points, T),
        noised_start=noised_start,
        **settings,
    )
    squares = []
    if noised_start:
        grid = inverted(mixture, x0, name="noise", noised_start=1.0, grid_points=grid_points).timestep.numpy()
    for pair in range(len(x0)):
        start, begin = x0[pair].double().numpy().ravel(), 0.0
        if noised_start:
            last = int(grid[pair][grid[pair] < noised_start * T].max())
            begin = SIGMA[last]
            noise = normal(tuple(x0.shape[2:]), 0, f"pair-{pair}", "noise", last).double().numpy()
            start = (x0[pair].double().numpy() + begin * noise).ravel()
        sigma = SIGMA[int(made.timestep[pair, 0])]
        exact = solve_ivp(lambda s, z: mixture_eps(z, s), (begin, sigma), start, rtol=1e-7, atol=1e-7).y[:, -1]
        got = made.x_t[pair, 0].double().numpy().ravel() * np.sqrt(1 + sigma**2)
        squares.append(np.mean((got - exact) ** 2))
    return float(np.sqrt(np.mean(squares)))


def test_ddim_is_of_first_order_and_the_others_of_second(
    mixture: Denoiser, latents: Callable, inverted: Callable
) -> None:
    x0 = latents(2, (1, 5, 5))
    order = {}
    for name, steps in {"ddim": (32, 64, 128), "ab2": (32, 64, 128), "fireflow": (8, 16, 32)}.items():
        # From n = 64 on fireflow's error is the rounding of what is stored.
        errors = [ode_error(mixture, inverted, x0, name, grid_points) for grid_points in steps]
        order[name] = np.log2(np.array(errors[:-1]) / errors[1:])
    assert (np.abs(order["ddim"] - 1) < 0.1).all(), order
    # Second order up to a logarithm: at the clean end the extrapolation's variable is the logarithm of sigma.
    # The test below begins where there is no clean end.
    assert (order["ab2"] > 1.6).all(), order
    assert (order["ab2"] < 2.3).all(), order
    assert (np.abs(order["fireflow"] - 2) < 0.35).all(), order


def test_from_a_noised_point_on_both_are_of_full_second_order(
    mixture: Denoiser, latents: Callable, inverted: Callable
) -> None:
    x0 = latents(2, (1, 5, 5))
    order = {}
    for name, steps in {"ddim": (8, 16, 32), "ab2": (8, 16, 32), "fireflow": (4, 8, 16)}.items():
        # Not finer: then the rounding of what is stored is as large as the error.
        errors = [ode_error(mixture, inverted, x0, name, grid_points, noised_start=0.25) for grid_points in steps]
        order[name] = np.log2(np.array(errors[:-1]) / errors[1:])
    print(order)
    # The grid's offset moves where the inversion begins and ends from one n to the next: 1.8 to 2.3 without rounding.
    assert (np.abs(order["ddim"] - 1) < 0.35).all(), order
    assert (np.abs(order["ab2"] - 2) < 0.35).all(), order
    assert (np.abs(order["fireflow"] - 2) < 0.35).all(), order


def test_a_refined_start_brings_ab2_nearer_at_once_and_middles_do_more(
    mixture: Denoiser, latents: Callable, inverted: Callable
) -> None:
    x0 = latents(2, (1, 6, 6))
    coarse = ode_error(mixture, inverted, x0, "ddim", 10)
    plain = ode_error(mixture, inverted, x0, "ab2", 10)
    refined = ode_error(mixture, inverted, x0, "ab2", 10, refine_start=3)
    assert refined < plain / 2 < coarse / 2
    # By the middles of steps it is nearer still.
    assert ode_error(mixture, inverted, x0, "fireflow", 10) < plain / 3
    assert ode_error(mixture, inverted, x0, "fireflow", 10, refine_start=3) < refined / 2


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_fixed_point_converges_to_the_exact_ddim_inverse(
    linear: Callable, latents: Callable, inverted: Callable, prediction_type: str
) -> None:
    """Every forward DDIM step, in float64 from the stored points, lands on the stored point below it."""
    denoiser = linear(prediction_type)
    denoiser.network.mix.data *= 0.3  # a contraction, so that the iteration has a limit
    x0 = latents(2)
    settings = {"grid_points": 12, "timesteps_per_pair": 12, "timestep_range": (0, 1000)}
    made = inverted(denoiser, x0, name="fixed_point", iterations=60, tolerance=2e-6, **settings)
    explicit = inverted(denoiser, x0, name="ddim", **settings)
    assert made.residual is not None
    table = denoiser.levels
    a, s = table.signal.numpy(), table.noise.numpy()
    worst = {"fixed_point": 0.0, "ddim": 0.0}
    for name, result in (("fixed_point", made), ("ddim", explicit)):
        for pair, step, side in np.ndindex(2, 12, 2):
            t = int(result.timestep[pair, step])
            if prediction_type == "sample" and t < 100:
                continue  # eps = (x - a x0_t) / s: rounding of x_t is divided by s there
            clean = result.x0_t[pair, step, side].double().numpy()
            delta = result.delta[pair, step, side].double().numpy()
            if step == 0:
                back, below = clean, x0[pair, side].double().numpy()
            else:
                before = int(result.timestep[pair, step - 1])
                back = a[before] * clean + s[before] * delta
                below = result.x_t[pair, step - 1, side].double().numpy()
            worst[name] = max(worst[name], float(np.abs(back - below).max()))
    assert worst["fixed_point"] < 0.02, worst  # float16 storage of x_t, delta and x0_t
    assert worst["ddim"] > 4 * worst["fixed_point"], worst


def test_fixed_point_records_what_did_not_converge(linear: Callable, latents: Callable, inverted: Callable) -> None:
    denoiser, x0 = linear(), latents(2)
    loose = inverted(denoiser, x0, name="fixed_point", grid_points=4, iterations=2, tolerance=1e-12)
    assert loose.residual is not None
    assert (loose.residual > 1e-12).all()
    assert loose.finite.all()
    calls = denoiser.num_calls
    inverted(denoiser, x0, name="fixed_point", grid_points=4, iterations=9, tolerance=1e6)
    # one iteration is enough for any tolerance that large: start, then 2 calls per point
    assert denoiser.num_calls - calls == 2 * 2 * (1 + 2 * 4)


def test_inversion_error_is_the_forward_round_trip(linear: Callable, latents: Callable, inverted: Callable) -> None:
    """Relative RMS between x0 and where deterministic DDIM lands from the last stored x_t: once more, in float64."""
    denoiser, x0 = linear(), latents(3)
    made = inverted(denoiser, x0, grid_points=6, measure_inversion=1.0)
    mix = denoiser.network.mix.detach().double()
    text = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).mean().item()
    a, s = denoiser.levels.signal, denoiser.levels.noise
    for pair in range(3):
        for side in range(2):
            x = made.x_t[pair, -1, side].double().flatten()
            levels = made.timestep[pair].tolist()
            for t, below in zip(levels[::-1], [*levels[-2::-1], None], strict=True):
                eps = torch.tanh(x @ mix + t / 1000) + 0.3 * x * (1 - t / 1000) + text
                clean = (x - s[t] * eps) / a[t]
                x = clean if below is None else a[below] * clean + s[below] * eps
            want = x0[pair, side].double().flatten()
            error = ((x - want).square().mean() / want.square().mean()).sqrt()
            assert float(made.inversion_error[pair, side]) == pytest.approx(float(error), rel=1e-3)
    assert (made.inversion_error > 0.01).all()


def test_the_share_of_measured_pairs(linear: Callable, latents: Callable, inverted: Callable) -> None:
    denoiser, x0 = linear(), latents(40)
    none = inverted(denoiser, x0, grid_points=2, measure_inversion=0.0)
    some = inverted(denoiser, x0, grid_points=2, measure_inversion=0.3)
    assert none.inversion_error.isnan().all()
    measured = ~some.inversion_error.isnan()
    assert (measured[:, 0] == measured[:, 1]).all()
    assert 4 <= int(measured[:, 0].sum()) <= 24
    assert some.finite.all()
    assert_alike(
        none, some, denoiser.levels.signal.numpy(), denoiser.levels.noise.numpy()
    )  # measuring changes nothing else
