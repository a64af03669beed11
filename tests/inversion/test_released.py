"""`--faithful` and the online benchmark against the released loop, written down once more from its source.

The source: train.py of github.com/JaydenLyh/InPO at commit a9cfc4d, lines 993 to 1015, with set_timesteps and step of
DDIMInverseScheduler and _get_variance of DDIMScheduler in diffusers 0.20.0 (its requirements.txt), under
`--mixed_precision fp16` (its examples/sd15.sh). In numpy, in the types that torch computes in there.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from benchmarks.online import OnlineLoop
from inpo.common.denoiser import Denoiser
from inpo.common.errors import ModelError, UsageError
from inpo.common.families import FAMILIES
from inpo.common.levels import Levels
from inpo.common.seeding import normal
from tests.inversion.conftest import condition
from tests.rounding import half_unit

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
DRAWN = (0, 1, 2, 57, 101, 480, 802, 999)
Network = Callable[[np.ndarray, int], np.ndarray]
Randn = Callable[[int], np.ndarray]
half, single = np.float16, np.float32


def released_loop(
    config: dict[str, Any], latents: np.ndarray, timestep: int, unet: Network, randn: Randn, *, grid_points: int = 10
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """(x in float32 before it is cast for the loss, target in float32, the labels that the network was told)."""
    abar = DDIMScheduler(**config).alphas_cumprod.numpy()  # float32: the inverse scheduler's, moved but not cast
    cast = abar.astype(half)  # the noise scheduler's, cast to the weights' type
    first = single(1) if config["set_alpha_to_one"] else abar[0]  # of both: made before the cast
    stride = 1000 // grid_points
    # set_timesteps: the grid rolled by one, its first entry replaced
    labels = [config["steps_offset"] - stride] + [config["steps_offset"] + stride * i for i in range(grid_points - 1)]
    labels = [label for label in labels if label < timestep]
    x = latents.astype(single)
    for label in labels:
        after = label + stride
        eps = unet(x, label)
        alpha, alpha_after = first if label < 0 else abar[label], abar[after]
        clean = (x - np.sqrt(1 - alpha) * eps) / np.sqrt(alpha)
        if config["clip_sample"]:
            clean = clean.clip(-1, 1)
        x = np.sqrt(alpha_after) * clean + np.sqrt(1 - alpha_after) * eps
        before = first if label < 0 else cast[label]
        variance = (1 - before) / (1 - cast[after]) * (1 - cast[after] / before)
        x = x + (single(0.1) * randn(after).astype(half)).astype(half) * half(np.sqrt(variance))
    alpha = cast[timestep]
    target = (x - (latents * np.sqrt(alpha)).astype(half)) / np.sqrt(half(1) - alpha)
    return x, target.astype(single), labels


def rounding_of_target(x: np.ndarray, target: np.ndarray, s: float) -> np.ndarray:
    """It is stored as float16, and x is off by some float32 roundings a step, tenfold for the network, over s."""
    return half_unit(target) + 100 * 2.0**-24 * np.abs(x).max() / s


def rounding_of_x_t(x: np.ndarray, x0: np.ndarray, target: np.ndarray, timestep: int, abar: np.ndarray) -> np.ndarray:
    """x_t is made from the float16 target by the exact table: it is off by the target's rounding, by that of a x0 in
    float16, by the two tables' difference, and by its own rounding."""
    exact, cast = abar[timestep], np.float64(half(abar[timestep]))
    tables = np.abs(np.sqrt(exact) - np.sqrt(cast)) * np.abs(x0)
    tables = tables + np.abs(np.sqrt(1 - exact) - np.sqrt(1 - cast)) * np.abs(target)
    s = np.sqrt(1 - exact)
    coefficients = 2.0**-11 * (np.abs(x0) + s * np.abs(target))  # sqrt(abar) and sqrt(1 - abar) are float16 too
    return tables + coefficients + s * rounding_of_target(x, target, s) + half_unit(x0) + half_unit(x)


@pytest.mark.parametrize("grid_points", [10, 7, 3])
@pytest.mark.parametrize(
    "changes",
    [{}, {"set_alpha_to_one": True}, {"steps_offset": 0}, {"clip_sample": True}],
    ids=["stable-diffusion", "alpha-one", "offset-0", "clipped"],
)
def test_faithful_is_the_released_loop(
    linear: Callable, latents: Callable, inverted: Callable, changes: dict[str, Any], grid_points: int
) -> None:
    """Every record of 4 pairs: the same latents, the same noise, to rounding."""
    config = {**STABLE_DIFFUSION, **changes}
    schedule = Levels.from_scheduler(DDIMScheduler(**config))
    denoiser = Denoiser(linear().network, schedule, FAMILIES["sd"].call)
    x0 = latents(4)
    kept = min(grid_points, 6)
    made = inverted(
        denoiser, x0, grid_points=grid_points, faithful=True, timesteps_per_pair=kept, seed=2, extra=("delta_prev",)
    )
    told: list[int] = []

    def unet(x: np.ndarray, label: int) -> np.ndarray:
        told.append(label)
        text = condition(1)["embedding"]
        with torch.no_grad():
            return denoiser.network(torch.from_numpy(x), torch.full((2,), label), encoder_hidden_states=text)[0].numpy()

    abar = DDIMScheduler(**config).alphas_cumprod.double().numpy()
    for pair, step in np.ndindex(4, kept):
        t = int(made.timestep[pair, step])
        clean = x0[pair].numpy()
        x, target, labels = released_loop(
            config,
            clean,
            t,
            unet,
            lambda level, pair=pair: normal((2, 2, 3, 3), 2, f"pair-{pair}", "extra", level).numpy(),
            grid_points=grid_points,
        )
        got = made.target[pair, step].double().numpy()
        bound = rounding_of_target(x, target, np.sqrt(1 - abar[t]))
        assert (np.abs(got - target) <= bound).all(), (pair, t, labels, np.abs(got - target).max(), bound.max())
        x_t = made.x_t[pair, step].double().numpy()
        assert (np.abs(x_t - x) <= rounding_of_x_t(x, clean, target, t, abar)).all(), (pair, t)
        # What the loss needs is taken at the stored point, with the drawn timestep as label.
        stored = made.x_t[pair, step].float().numpy()
        eps = unet(stored, t).astype(np.float64)
        assert (np.abs(made.delta[pair, step].double().numpy() - eps) <= 1.01 * half_unit(eps) + 1e-5).all()
        error = np.mean((got - eps) ** 2, axis=(1, 2, 3))
        np.testing.assert_allclose(made.reference_error[pair, step].numpy(), error, rtol=1e-4)
        np.testing.assert_array_equal(
            x_t, (np.sqrt(abar[t]) * clean.astype(np.float64) + np.sqrt(1 - abar[t]) * got).astype(half)
        )
    assert min(told) == config["steps_offset"] - 1000 // grid_points


def test_the_online_loop_is_the_same_one(linear: Callable, latents: Callable) -> None:
    """Pairs that stop at different levels in one batch, each against the released loop alone."""
    denoiser = Denoiser(linear().network, Levels.from_scheduler(DDIMScheduler(**STABLE_DIFFUSION)), FAMILIES["sd"].call)
    loop = OnlineLoop(trained=denoiser, reference=denoiser, images=None, text=None, optimizer=None)  # type: ignore[arg-type]
    x0 = latents(len(DRAWN)).flatten(0, 1)
    timestep = torch.tensor(DRAWN).repeat_interleave(2)
    torch.manual_seed(4)
    with torch.no_grad():
        x_t, target = loop.invert(x0, timestep, condition(len(DRAWN)))
    # The same draws: at every level, one row for each image that has not stopped below it.
    torch.manual_seed(4)
    randn = {}
    for level in range(1, 1000, 100):
        rows = (timestep > level - 100) if level > 1 else (timestep >= 0)
        randn[level] = torch.zeros_like(x0, dtype=torch.float32)
        randn[level][rows] = torch.randn(int(rows.sum()), *x0.shape[1:])
    abar = denoiser.levels.signal.numpy() ** 2

    def unet(x: np.ndarray, label: int) -> np.ndarray:
        text = condition(1)["embedding"]
        with torch.no_grad():
            return denoiser.network(torch.from_numpy(x), torch.full((2,), label), encoder_hidden_states=text)[0].numpy()

    for pair, t in enumerate(DRAWN):
        both = slice(2 * pair, 2 * pair + 2)
        x, want, _ = released_loop(
            STABLE_DIFFUSION, x0[both].numpy(), t, unet, lambda level, both=both: randn[level][both].numpy()
        )
        assert (np.abs(target[both].numpy() - want) <= rounding_of_target(x, want, np.sqrt(1 - abar[t]))).all(), t
        assert (np.abs(x_t[both].numpy() - x) <= 1.01 * half_unit(x)).all(), t
        np.testing.assert_array_equal(x_t[both].numpy(), x_t[both].half().numpy())


@pytest.mark.parametrize(
    ("changes", "grid_points", "words"),
    [
        ({"prediction_type": "v_prediction"}, 10, ["--faithful", "v_prediction"]),
        ({"timestep_spacing": "trailing"}, 10, ["--faithful", "trailing"]),
        ({}, 501, ["--grid-points", "at most 500", "501"]),
    ],
)
def test_what_the_released_loop_cannot_do_is_refused(
    linear: Callable, latents: Callable, inverted: Callable, changes: dict[str, Any], grid_points: int, words: list[str]
) -> None:
    schedule = Levels.from_scheduler(DDIMScheduler(**{**STABLE_DIFFUSION, **changes}))
    with pytest.raises((ModelError, UsageError)) as raised:
        inverted(
            Denoiser(linear().network, schedule, FAMILIES["sd"].call),
            latents(1),
            grid_points=grid_points,
            faithful=True,
            timesteps_per_pair=1,
        )
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("levels", [Levels.from_scheduler(DDIMScheduler()), Levels.from_density("uniform", 1.0, 1000)])
def test_the_online_loop_of_dpo_aims_at_what_leads_back_to_the_image(
    levels: Levels, shared: bool, latents: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise and velocity alike: a flow's x_t less s times its velocity is x0, and x_t less s times noise is a x0."""
    denoiser = Denoiser(torch.nn.Linear(1, 1), levels, FAMILIES["sd"].call)
    loop = OnlineLoop(trained=denoiser, reference=denoiser, images=None, text=None, optimizer=None)  # type: ignore[arg-type]
    x0, made = latents(4).flatten(0, 1), []
    monkeypatch.setattr(loop, "encode", lambda *_: (x0, condition(4)))
    monkeypatch.setattr(loop, "_update", lambda *given: made.append(given))
    torch.manual_seed(2)
    loop.dpo_step(torch.zeros(4, 2, 3, 8, 8, dtype=torch.uint8), ["a", "b", "c", "d"], shared=shared)
    ((x_t, target, timestep, _),) = made
    a, s, *_ = denoiser.at(timestep)
    is_flow = levels.space == "velocity"
    torch.testing.assert_close(x_t - s * target, x0.float() if is_flow else a * x0.float(), rtol=0, atol=1e-5)
    noise = target + x0.float() if is_flow else target
    assert torch.allclose(noise[::2], noise[1::2], atol=1e-5) == shared
    assert torch.equal(timestep[::2], timestep[1::2])
