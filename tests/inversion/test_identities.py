"""The equations of docs/equations.md as printed, in float64 numpy, against what the inversion stores."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from inpo.common.cache.derive import derive_x_t
from inpo.common.conditions import Condition
from inpo.common.denoiser import Denoiser
from inpo.common.families import FAMILIES
from inpo.common.levels import Levels

HALF_STEP = 2.0**-11
PREDICTIONS = ("epsilon", "v_prediction", "sample")
CAPTION = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).mean().item()
EMPTY = torch.randn(5, 32, generator=torch.Generator().manual_seed(2)).mean().item()
ABAR = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod.double().numpy()
A, S = np.sqrt(ABAR), np.sqrt(1 - ABAR)
SIGMA = S / A


def network(denoiser, x: np.ndarray, t: int, text: float = CAPTION) -> tuple[np.ndarray, np.ndarray]:
    """(eps, x0(t)) of the cheap network in float64, each prediction type by its own definition."""
    mix = denoiser.network.mix.detach().double().numpy()
    flat = x.astype(np.float64).reshape(-1)
    output = (np.tanh(flat @ mix + t / 1000) + 0.3 * flat * (1 - t / 1000) + text).reshape(x.shape)
    if denoiser.prediction == "epsilon":
        return output, (x - S[t] * output) / A[t]
    if denoiser.prediction == "v_prediction":  # v = a eps - s x0
        return S[t] * x + A[t] * output, A[t] * x - S[t] * output
    return (x - A[t] * output) / S[t], output


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(np.asarray(got, np.float64) - want).max() / np.sqrt(np.mean(np.square(want))))


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_equation_15_as_printed(linear: Callable, latents: Callable, inverted: Callable, prediction_type: str) -> None:
    """x0(t+k) = x0(t) - sigma_{t+k} * [eps(a_{t+k} x0(t) + s_{t+k} delta_t, t+k, c) - delta_t]."""
    denoiser = linear(prediction_type)
    x0 = latents(3)
    made = inverted(denoiser, x0, grid_points=6)
    for pair in range(3):
        for side in range(2):
            clean = x0[pair, side].double().numpy()
            delta = network(denoiser, clean, 0)[0]
            for step, t in enumerate(made.timestep[pair].tolist()):
                x_t = made.x_t[pair, step, side].double().numpy()
                eps = network(denoiser, A[t] * clean + S[t] * delta, t)[0]
                printed = clean - SIGMA[t] * (eps - delta)
                assert relative(made.x0_t[pair, step, side].numpy(), printed) < 2**-6 * max(1, SIGMA[t] / 4)
                # ... and exactly, up to one rounding, at the point that is stored.
                delta, clean = network(denoiser, x_t, t)
                assert relative(made.delta[pair, step, side].numpy(), delta) < 4 * HALF_STEP
                assert relative(made.x0_t[pair, step, side].numpy(), clean) < 4 * HALF_STEP


@settings(max_examples=25)
@given(
    prediction_type=st.sampled_from(PREDICTIONS),
    name=st.sampled_from(["ddim", "ab2", "fireflow", "fixed_point", "noise"]),
    grid_points=st.integers(1, 12),
    kept=st.integers(1, 12),
    refine=st.integers(0, 3),
    noised=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    guidance=st.sampled_from([0.0, 1.0, 3.0]),
    seed=st.integers(0, 10),
    shape=st.sampled_from([(1, 1, 1), (2, 3, 3), (4, 2, 5)]),
)
def test_the_identities_hold_for_every_inverter(
    linear: Callable,
    latents: Callable,
    inverted: Callable,
    prediction_type: str,
    name: str,
    grid_points: int,
    kept: int,
    refine: int,
    noised: float,
    guidance: float,
    seed: int,
    shape: tuple[int, int, int],
) -> None:
    denoiser = linear(prediction_type, shape)
    x0 = latents(2, shape)
    kept = min(kept, grid_points)
    made = inverted(
        denoiser,
        x0,
        name=name,
        grid_points=grid_points,
        timesteps_per_pair=kept,
        seed=seed,
        refine_start=0 if name == "noise" else refine,
        noised_start=1.0 if name == "noise" else noised,
        guidance=guidance,
        extra=("eps_ref",),
        iterations=3,
        tolerance=1e-3,
    )
    assert made.finite.all()
    timestep = made.timestep.long().numpy()
    assert timestep.shape == (2, kept)
    assert (np.diff(timestep, axis=1) > 0).all()
    # Stored-point rule: x_t is float16(a x0 + s target) bit for bit, so that a lean cache derives a full one's.
    images = timestep.repeat(2, axis=0)
    lean = derive_x_t(x0.flatten(0, 1).numpy(), made.made.target.numpy(), A[images], S[images])
    np.testing.assert_array_equal(made.made.x_t.numpy().view(np.uint16), lean.view(np.uint16))
    for pair, step, side in np.ndindex(2, kept, 2):
        t = int(timestep[pair, step])
        x_t = made.x_t[pair, step, side].double().numpy()
        clean, target = x0[pair, side].double().numpy(), made.target[pair, step, side].double().numpy()
        reference = network(denoiser, x_t, t)[0]
        empty = network(denoiser, x_t, t, EMPTY)[0]
        delta = empty + guidance * (reference - empty)
        clean_t = (x_t - S[t] * delta) / A[t]
        where = np.abs(made.delta[pair, step, side].numpy() - delta).max()
        scale = 1 + np.abs(x_t).max() + np.abs(delta).max()
        # delta is the inverting model's prediction at the stored x_t
        assert where < 4 * HALF_STEP * scale
        # (8) x0(t) = x_t / a_t - sigma_t eps, and (16) x_t = a_t x0(t) + s_t delta_t
        assert np.abs(made.x0_t[pair, step, side].numpy() - clean_t).max() < 4 * HALF_STEP * scale / A[t]
        # (18) tau_t = (x0(t) - x0) / sigma_t + delta_t, identity 2: = (x_t - a_t x0) / s_t
        spread = (S[t] / A[t] + 1) * scale / (S[t] / A[t])
        assert np.abs((clean_t - clean) / SIGMA[t] + delta - target).max() < 4 * HALF_STEP * spread
        # E_ref: against the prediction under the caption without guidance, whatever inverted, before any rounding
        error = np.mean(np.square(target - reference))
        tolerance = 1e-5 * error + 1e-5 * np.sqrt(error) * scale / S[t] + 1e-9
        assert abs(float(made.reference_error[pair, step, side]) - error) < tolerance
        assert np.abs(made.eps_ref[pair, step, side].numpy() - reference).max() < 4 * HALF_STEP * scale
        # identity 3: with guidance 1 also MSE(x0(t) - x0) / sigma_t^2
        if guidance == 1.0:
            also = np.mean(np.square(clean_t - clean)) / SIGMA[t] ** 2
            # The two differ by the rounding of x_t over s_t; that is a bound on the difference of the roots.
            rounding = 1.01 * HALF_STEP * np.abs(x_t).max() / S[t] + 1e-6
            assert abs(np.sqrt(also) - np.sqrt(error)) <= rounding


@pytest.mark.parametrize("name", ["ddim", "ab2"])
def test_the_step_before_the_first_record_leaves_the_clean_end(
    linear: Callable, latents: Callable, inverted: Callable, name: str
) -> None:
    denoiser, x0 = linear(), latents(1)
    made = inverted(denoiser, x0, name=name, grid_points=4, extra=("delta_prev",))
    t = int(made.timestep[0, 0])
    clean = x0[0].double().numpy()
    for side in range(2):
        delta = network(denoiser, clean[side], 0)[0]
        assert relative(made.x_t[0, 0, side].numpy(), A[t] * clean[side] + S[t] * delta) < 4 * HALF_STEP
        assert relative(made.delta_prev[0, 0, side].numpy(), delta) < 4 * HALF_STEP


def test_identity_4_delta_prev_carried_the_trajectory(linear: Callable, latents: Callable, inverted: Callable) -> None:
    """delta_{t-k} = (x_t - a_t x0(t-k)) / s_t: the noise that carried the trajectory is the previous point's."""
    made = inverted(linear(), latents(2), grid_points=6, extra=("delta_prev",))
    for pair, step, side in np.ndindex(2, 6, 2):
        if step == 0:
            continue
        t = int(made.timestep[pair, step])
        previous = made.delta[pair, step - 1, side].numpy()
        np.testing.assert_array_equal(made.delta_prev[pair, step, side].numpy(), previous)
        before = made.x0_t[pair, step - 1, side].double().numpy()
        carried = (made.x_t[pair, step, side].double().numpy() - A[t] * before) / S[t]
        assert np.abs(carried - previous).max() < 8 * HALF_STEP * (1 + np.abs(before).max()) / S[t]


def test_ab2_step_as_printed(linear: Callable, latents: Callable, inverted: Callable) -> None:
    """z_t = z_s + (sigma_t - sigma_s) delta_s + C (delta_s - delta_r), C from asinh, sigma_0 the table's first."""
    denoiser, x0 = linear(), latents(1)
    made = inverted(denoiser, x0, name="ab2", grid_points=6)

    def big_a(sigma: float) -> float:
        return np.arcsinh(sigma / SIGMA[0])

    def big_r(sigma: float) -> float:
        return np.sqrt(sigma**2 + SIGMA[0] ** 2)

    for side in range(2):
        clean = x0[0, side].double().numpy()
        before, last = (0.0, network(denoiser, clean, 0)[0]), None
        for step, t in enumerate(made.timestep[0].tolist()):
            x_t = made.x_t[0, step, side].double().numpy()
            if last is not None:
                (sigma_r, delta_r), (sigma_s, delta_s, z_s) = before, last
                c = (SIGMA[t] * (big_a(SIGMA[t]) - big_a(sigma_s)) - (big_r(SIGMA[t]) - big_r(sigma_s))) / (
                    big_a(sigma_s) - big_a(sigma_r)
                )
                z_t = z_s + (SIGMA[t] - sigma_s) * delta_s + c * (delta_s - delta_r)
                assert relative(x_t, A[t] * z_t) < 4 * HALF_STEP
                before = (sigma_s, delta_s)
            last = (SIGMA[t], network(denoiser, x_t, t)[0], x_t / A[t])


def test_theta_equal_to_the_reference_has_the_stored_error(
    tiny_unet: torch.nn.Module, latents: Callable, inverted: Callable
) -> None:
    """Identity 6, the acceptance test of a cache: a trainer's E_theta at what is stored is E_ref, record by record."""
    denoiser = Denoiser(tiny_unet, Levels.from_alphas_cumprod(torch.from_numpy(ABAR)), FAMILIES["sd"].call)
    made = inverted(denoiser, latents(3, (4, 8, 8)), grid_points=5, pairs_per_batch=2)
    tokens = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    x_t, target = made.x_t.flatten(0, 2).float(), made.target.flatten(0, 2).float()
    timestep = made.timestep[:, :, None].expand(3, 5, 2).flatten().long()
    with torch.no_grad():
        eps = denoiser(x_t, timestep, Condition(embedding=tokens.expand(30, 5, 32)))
    error = (target - eps).square().mean((1, 2, 3))
    torch.testing.assert_close(error, made.reference_error.flatten(), rtol=1e-4, atol=1e-7)
