"""Noise and noised start, guidance, the released code's mode, and independence of batching."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from inpo.common.cache.schema import InverterIdentity
from inpo.common.denoiser import Denoiser, prepare_for_inference
from inpo.common.families import FAMILIES
from inpo.common.inversion import build_path
from inpo.common.levels import Levels
from inpo.common.seeding import normal
from tests.rounding import assert_alike, half_unit

SCHEDULER = DDIMScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    steps_offset=1,
    set_alpha_to_one=False,
    clip_sample=False,
)
ABAR = SCHEDULER.alphas_cumprod.double().numpy()
A, S = np.sqrt(ABAR), np.sqrt(1 - ABAR)


def test_noise_is_diffusion_dpos_noising(linear: Callable, latents: Callable, inverted: Callable) -> None:
    """x_t = scheduler.add_noise(x0, noise, t), target = noise, one noise for both sides, another at every timestep."""
    denoiser, x0 = linear(shape=(4, 8, 8)), latents(6, (4, 8, 8))
    made = inverted(denoiser, x0, name="noise", noised_start=1.0, grid_points=4)
    noise = made.target[:, :, :1]
    assert (made.target == noise).all()
    assert len({tuple(record.flatten().tolist()) for record in noise.flatten(0, 1)}) == 6 * 4
    for pair, step in np.ndindex(6, 4):  # it hangs on seed, group and timestep alone
        drawn = normal((4, 8, 8), 0, f"pair-{pair}", "noise", int(made.timestep[pair, step]))
        assert torch.equal(noise[pair, step, 0], drawn.half())
    values = noise.double().flatten()
    assert abs(float(values.mean())) < 4 / len(values) ** 0.5
    assert abs(float(values.std()) - 1) < 4 / (2 * len(values)) ** 0.5
    for pair, step in np.ndindex(6, 4):
        expected = SCHEDULER.add_noise(x0[pair].double(), made.target[pair, step].double(), made.timestep[pair, step])
        assert (made.x_t[pair, step].double() - expected).abs().max() < 2.0**-10 * expected.abs().max()
    torch.testing.assert_close(
        made.reference_error,
        (made.target.double() - made.delta.double()).square().mean((-3, -2, -1)).float(),
        rtol=2e-3,
        atol=1e-5,
    )
    # the same as a start noised up to the last label; and no network call but one per record
    calls = denoiser.num_calls
    same = inverted(denoiser, x0, name="ddim", noised_start=1.0, grid_points=4)
    assert denoiser.num_calls - calls == 6 * 2 * 4
    for name in ("timestep", "target", "x_t", "delta", "reference_error"):
        assert torch.equal(getattr(same, name), getattr(made, name)), name


@pytest.mark.parametrize("name", ["ddim", "ab2", "fixed_point"])
def test_noised_start_then_inversion(linear: Callable, latents: Callable, inverted: Callable, name: str) -> None:
    denoiser, x0 = linear(), latents(4)
    made = inverted(
        denoiser, x0, name=name, noised_start=0.4, grid_points=8, extra=("delta_prev",), iterations=1, tolerance=0.0
    )
    pure = inverted(denoiser, x0, name="noise", noised_start=1.0, grid_points=8)
    for pair in range(4):
        below = made.timestep[pair] < 400
        assert 2 <= int(below.sum()) <= 4
        assert torch.equal(made.target[pair, below], pure.target[pair, below])
        assert torch.equal(made.x_t[pair, below], pure.x_t[pair, below])
        above = (~below).nonzero().flatten().tolist()
        assert not torch.equal(made.target[pair, above[0], 0], made.target[pair, above[0], 1])
        # The inversion goes on from the last noised point, whose delta carries the first step.
        first = above[0]
        assert torch.equal(made.delta_prev[pair, first], made.delta[pair, first - 1])
        if name != "fixed_point":  # the first step beyond has one point of its trajectory behind it: ddim's
            t = int(made.timestep[pair, first])
            clean, delta, x_t, target = (
                values.double().numpy()
                for values in (
                    made.x0_t[pair, first - 1],
                    made.delta[pair, first - 1],
                    made.x_t[pair, first],
                    made.target[pair, first],
                )
            )
            # Half a unit of everything that enters, and float32 in between.
            bound = A[t] * half_unit(clean) + S[t] * (half_unit(delta) + half_unit(target)) + half_unit(x_t) + 1e-5
            assert (np.abs(x_t - A[t] * clean - S[t] * delta) <= bound).all()


def test_noised_start_does_not_depend_on_which_points_are_kept(
    linear: Callable, latents: Callable, inverted: Callable
) -> None:
    denoiser, x0 = linear(), latents(6)
    for name in ("ddim", "ab2"):
        settings = {"name": name, "noised_start": 0.5, "grid_points": 8}
        whole = inverted(denoiser, x0, timesteps_per_pair=8, **settings)
        some = inverted(denoiser, x0, timesteps_per_pair=2, **settings)
        for pair in range(6):
            for step, t in enumerate(some.timestep[pair].tolist()):
                position = whole.timestep[pair].tolist().index(t)
                difference = some.x_t[pair, step].double() - whole.x_t[pair, position].double()
                assert difference.abs().max() < 0.02  # float16 rounding at more or fewer points on the way


def test_guidance_calls_and_reference(linear: Callable, latents: Callable, inverted: Callable) -> None:
    """E_ref never has guidance in it, and costs a call only where the caption was not asked anyway."""
    x0 = latents(2)
    made, calls = {}, {}
    for guidance in (0.0, 1.0, 5.0):
        denoiser = linear()
        made[guidance] = inverted(denoiser, x0, grid_points=4, guidance=guidance, extra=("eps_ref",))
        calls[guidance] = denoiser.num_calls / 4
    assert calls == {0.0: 5 + 4, 1.0: 5, 5.0: 2 * 5}
    assert torch.equal(made[1.0].eps_ref, made[1.0].delta)
    for guidance in (0.0, 5.0):
        got = made[guidance]
        assert not torch.allclose(got.eps_ref, got.delta, atol=0.05)
        error = (got.target.double() - got.eps_ref.double()).square().mean((-3, -2, -1))
        torch.testing.assert_close(got.reference_error.double(), error, rtol=5e-3, atol=1e-5)


class Constant(nn.Module):
    """Predicts the same noise everywhere: then x on level L is a_L x0 + s_L noise, whatever the path."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__()
        self.noise = nn.Parameter(noise)

    def forward(self, x: Tensor, timestep: Tensor, **ignored: object) -> tuple[Tensor]:
        return (self.noise.expand_as(x),)


@pytest.mark.parametrize(("timestep", "on_x0", "on_noise"), [(50, -0.137, 1.361), (250, -0.093, 1.084)])
def test_the_released_codes_target_is_not_the_noise(
    inverted: Callable, timestep: int, on_x0: float, on_noise: float
) -> None:
    """c0 * x0 + ce * noise off the grid, the closed form's numbers for SD1.5's schedule with n = 10.

    The loop's own noise is at most 0.1 of the target: over 2,304 values that leaves the weights uncertain by 0.002.
    """
    identity = InverterIdentity(name="ddim", grid_points=10, faithful=True, timestep_range=(0, 1000))
    schedule = Levels.from_scheduler(SCHEDULER)

    def kept(number: int) -> list[int]:
        path = build_path(identity, schedule, seed=0, group_id=str(number), timesteps_per_pair=10)
        return [t for point in path.points for t in point.records]

    number = next(number for number in range(2000) if timestep in kept(number))
    random = torch.Generator().manual_seed(0)
    x0 = torch.randn(1, 2, 4, 24, 24, generator=random).half()
    noise = torch.randn(4, 24, 24, generator=random)
    denoiser = Denoiser(Constant(noise), schedule, FAMILIES["sd"].call)
    made = inverted(denoiser, x0, grid_points=10, faithful=True, pair_ids=[str(number)])
    step = made.timestep[0].tolist().index(timestep)
    for side in range(2):
        columns = np.stack([x0[0, side].double().numpy().ravel(), noise.double().numpy().ravel()], axis=1)
        weights = np.linalg.lstsq(columns, made.target[0, step, side].double().numpy().ravel(), rcond=None)[0]
        assert weights == pytest.approx([on_x0, on_noise], abs=0.012)


NAMES = ("x_t", "delta", "x0_t", "target", "reference_error")


def _compare(one: object, other: object) -> dict[str, float]:
    """RMS difference of each tensor, relative to the tensor's RMS."""
    found = {}
    for name in NAMES:
        left, right = getattr(one, name).double(), getattr(other, name).double()
        found[name] = float(((left - right).square().mean() / right.square().mean()).sqrt())
    return found


@pytest.mark.parametrize("name", ["ddim", "ab2", "fireflow", "noise"])
def test_batch_size_and_order_change_nothing_but_rounding(
    tiny_unet: nn.Module, latents: Callable, inverted: Callable, name: str
) -> None:
    x0 = latents(6, (4, 8, 8))
    denoiser = Denoiser(tiny_unet, Levels.from_scheduler(SCHEDULER), FAMILIES["sd"].call)
    settings = {
        "name": name,
        "grid_points": 4,
        "timesteps_per_pair": 3,
        "refine_start": 3 if name in ("ab2", "fireflow") else 0,
        "noised_start": 1.0 if name == "noise" else 0.0,
    }
    ids = [f"pair-{number}" for number in range(6)]
    one = inverted(denoiser, x0, pairs_per_batch=1, **settings)
    eight = inverted(denoiser, x0, pairs_per_batch=8, **settings)
    back = inverted(denoiser, x0.flip(0), pairs_per_batch=4, pair_ids=ids[::-1], **settings)
    assert torch.equal(one.timestep, eight.timestep)
    assert torch.equal(one.timestep, back.timestep.flip(0))
    assert_alike(one, eight, A, S)
    reversed_back = {name: getattr(back, name).flip(0) for name in ("timestep", *NAMES)}
    assert_alike(one, SimpleNamespace(**reversed_back), A, S)
    if name == "noise":  # nothing of the network enters x_t
        assert torch.equal(one.x_t, eight.x_t)


@pytest.mark.parametrize(("dtype", "least", "most"), [("bfloat16", 1e-3, 0.05), ("float16", 1e-4, 0.01)])
def test_half_precision_networks_agree_to_their_own_rounding(
    tiny_unet: nn.Module, latents: Callable, inverted: Callable, dtype: str, least: float, most: float
) -> None:
    """State in float32 under autocast: batch sizes differ by the network's rounding, and no more."""
    import copy

    unet = copy.deepcopy(tiny_unet)
    prepare_for_inference(unet, network_dtype=dtype, device=torch.device("cpu"))
    schedule = Levels.from_scheduler(SCHEDULER)
    x0 = latents(6, (4, 8, 8))
    half = Denoiser(unet, schedule, FAMILIES["sd"].call, network_dtype=dtype)
    seen: set[torch.dtype] = set()
    unet.register_forward_pre_hook(lambda module, inputs: seen.add(inputs[0].dtype))
    one, eight = inverted(half, x0, pairs_per_batch=1), inverted(half, x0, pairs_per_batch=8)
    exact = inverted(Denoiser(tiny_unet, schedule, FAMILIES["sd"].call), x0)
    assert seen == {torch.float32}, "the state enters the network in float32; autocast rounds inside"
    assert torch.equal(one.timestep, eight.timestep)
    batches, rounding = _compare(eight, one), _compare(one, exact)
    print(f"{dtype}, batch 8 against 1:", batches, "against float32:", rounding)
    # Two ways to sum in this dtype lie as far from float32 as each other, so at most twice that from one another.
    for tensor, apart in batches.items():
        assert apart < 2 * rounding[tensor], tensor
    assert least < rounding["x_t"] < most  # it did run in this dtype
    # The stored-point rule does not care for the network's dtype.
    axes = one.timestep.long()[:, :, None, None, None, None]
    signal = schedule.signal[axes].numpy() * x0[:, None].double().numpy()
    x_t = signal + schedule.noise[axes].numpy() * one.target.double().numpy()
    np.testing.assert_array_equal(one.x_t.numpy(), x_t.astype(np.float16))


class NotANumber(nn.Module):
    """Breaks one pair: the rows whose latent is larger than the others'."""

    def __init__(self, inner: nn.Module, value: float) -> None:
        super().__init__()
        self.inner, self.value = inner, value

    def forward(self, x: Tensor, *arguments: object, **keywords: object) -> tuple[Tensor]:
        output = self.inner(x, *arguments, **keywords)[0]
        sick = x.abs().amax((1, 2, 3)) > 50
        return (torch.where(sick[:, None, None, None], torch.full_like(output, self.value), output),)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["ddim", "ab2", "fireflow", "fixed_point"])
def test_a_pair_that_is_not_finite_is_named_and_harms_no_other(
    linear: Callable, latents: Callable, inverted: Callable, name: str, value: float
) -> None:
    x0 = latents(5)
    settings = {"name": name, "iterations": 2, "tolerance": 1e-3, "measure_inversion": 1.0, "extra": ("delta_prev",)}
    well = inverted(linear(), x0, **settings)
    x0[2, 1] *= 60
    denoiser = linear()
    denoiser.network = NotANumber(denoiser.network, value)
    made = inverted(denoiser, x0, pairs_per_batch=3, **settings)
    # The other image of the pair is told as whole, too: it may stand in other pairs.
    assert made.finite.tolist() == [[True, True], [True, True], [True, False], [True, True], [True, True]]
    others = [0, 1, 3, 4]
    assert_alike(well, made, A, S, pairs=others)
    torch.testing.assert_close(made.inversion_error[others], well.inversion_error[others], rtol=1e-2, atol=1e-3)
