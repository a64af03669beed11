"""How the trajectory gets from one point to the next: the choice of x_t, before any rounding.

Every inverter is a generator function: it may ask for network calls by yielding a Request and gets the raw output
back; it may ask for a number by yielding a Question. It returns x at the new level. `docs/inversion.md` compares them.
"""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from inpo.common.cache.schema import InverterIdentity
from inpo.common.choices import InverterName
from inpo.common.denoiser import Denoiser
from inpo.common.levels import Levels


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One network evaluation of a trajectory's images at one label, under the caption or the empty prompt."""

    x: Float[Tensor, "image c h w"]
    timestep: int
    empty: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """A number that decides how a step goes on. Those of all trajectories are fetched together, with one wait."""

    value: Float[Tensor, ""]


@dataclass(frozen=True, kw_only=True, eq=False)
class State:
    """A visited point. sigma = s / a; the clean end has a = 1, s = 0 and sigma = 0.

    x is what the network saw, clean and delta follow from its output there: x = a * clean + s * delta (Eq. 16).
    """

    a: float
    s: float
    x: Float[Tensor, "image c h w"]
    clean: Float[Tensor, "image c h w"]
    delta: Float[Tensor, "image c h w"]

    @property
    def sigma(self) -> float:
        return self.s / self.a


Asked = Request | Question
Calls = Generator[Asked, Tensor, Tensor]
Evaluate = Callable[[Tensor, int], Calls]
"""(x, label) -> the inverting model's raw output there, guidance included."""


@dataclass(kw_only=True)
class Stepper:
    """What a step may use: the schedule, the network behind `evaluate`, and a place for the residual."""

    schedule: Levels
    denoiser: Denoiser
    evaluate: Evaluate
    identity: InverterIdentity
    residual: Tensor | None = None
    """fixed_point: relative RMS change of the last iteration, float32 [image]."""


def ddim(history: list[State], timestep: int, stepper: Stepper) -> Calls:
    """x_t = a_t x0(s) + s_t delta_s: Eq. 15 with Eq. 16. First order."""
    yield from ()
    a, s = _levels(stepper.schedule, timestep)
    return a * history[-1].clean + s * history[-1].delta


def ab2(history: list[State], timestep: int, stepper: Stepper) -> Calls:
    """Second order: dz/dsigma = eps(a z, t) with z = x / a, eps extrapolated linearly in A = asinh(sigma / sigma_0).

    z_t = z_s + (sigma_t - sigma_s) delta_s + C (delta_s - delta_r) with
    C = [sigma_t (A_t - A_s) - (R_t - R_s)] / (A_s - A_r), R = sqrt(sigma^2 + sigma_0^2). Our derivation: in plain
    sigma the weight overshoots at the clean end. With one point behind it the step is ddim's.
    """
    if len(history) < 2:
        return (yield from ddim(history, timestep, stepper))
    a, s = _levels(stepper.schedule, timestep)
    before, last = history[-2], history[-1]
    floor = stepper.schedule.floor

    def stretched(sigma: float) -> float:
        return math.asinh(sigma / floor)

    def radius(sigma: float) -> float:
        return math.hypot(sigma, floor)

    sigma = s / a
    weight = (sigma * (stretched(sigma) - stretched(last.sigma)) - (radius(sigma) - radius(last.sigma))) / (
        stretched(last.sigma) - stretched(before.sigma)
    )
    drift = last.clean + sigma * last.delta
    return a * (drift + weight * (last.delta - before.delta))


def fixed_point(history: list[State], timestep: int, stepper: Stepper) -> Calls:
    """ReNoise family: x^0 is the ddim step, x^{k+1} the DDIM step of x_s with eps(x^k, t); the exact DDIM inverse.

    Stops at `tolerance` (relative RMS change) or after `iterations` network calls; the residual is recorded.
    """
    a, s = _levels(stepper.schedule, timestep)
    last = history[-1]
    x = a * last.clean + s * last.delta
    label = torch.full((x.shape[0],), timestep, device=x.device)
    for _ in range(stepper.identity.iterations or 0):
        output = yield from stepper.evaluate(x, timestep)
        eps = stepper.denoiser.to_noise(output, x, label)
        # z_t = z_s + (sigma_t - sigma_s) eps, with z = x / a
        moved = a * (last.x / last.a + (s / a - last.sigma) * eps)
        change = (moved - x).square().mean((-3, -2, -1)).sqrt() / x.square().mean((-3, -2, -1)).sqrt()
        x, stepper.residual = moved, change
        if float((yield Question(value=change.max()))) <= (stepper.identity.tolerance or 0.0):
            break
    return x


INVERTERS: dict[InverterName, Callable[[list[State], int, Stepper], Calls]] = {
    "ddim": ddim,
    "ab2": ab2,
    "fixed_point": fixed_point,
    "noise": ddim,  # every grid point is noised (path.py), so that no step is ever taken
}


def _levels(schedule: Levels, timestep: int) -> tuple[float, float]:
    return schedule.point(timestep)
