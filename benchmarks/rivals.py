"""The inverters of other papers, written from their formulas, to be measured beside ours; and the ODE that all solve.

For a flow they are as their papers have them. The rest is our transfer: in the normalised variable a network of noise
has an ODE of the same form, of which Euler's step is DDIM's.

    dy/dtau = f(y, tau), y = x0 at tau = 0
    target  = (y - x0) / tau                    the mean of f along the way
    flow      y = x,      tau = t,      f = v
    noise     y = x / a,  tau = s / a,  f = eps
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from inpo.common.conditions import Condition
from inpo.common.denoiser import Denoiser
from inpo.common.levels import Levels

_FINE = 2000


def fine_levels(levels: Levels) -> Levels:
    """A flow's levels with times between and below them; those of a network of noise as they are.

    A solver's own points may lie anywhere, and a flow is told any time. A network of noise is told whole timesteps.
    """
    if levels.space == "noise":
        return levels
    visited, between = levels.walked[1, levels.points], (torch.arange(_FINE, dtype=torch.float64) + 0.5) / _FINE
    times = torch.cat([visited, between]).unique()
    first, last = levels.walked[2, [levels.clean, levels.noisy]].tolist()
    return replace(levels, signal=1 - times, noise=times, label=first + (last - first) * times)


@dataclass(frozen=True, kw_only=True, eq=False)
class Ode:
    """The ODE of some images under their captions. Points are timesteps of the denoiser's levels, and `clean`."""

    denoiser: Denoiser
    """Its `num_calls` counts."""
    x0: Float32[Tensor, "image c h w"]
    caption: Condition

    @classmethod
    def of(cls, denoiser: Denoiser, x0: Float[Tensor, "image c h w"], caption: Condition) -> "Ode":
        """On `fine_levels` of the denoiser's network."""
        finer = Denoiser(
            denoiser.network,
            fine_levels(denoiser.levels),
            denoiser.call,
            denoiser.prediction,
            network_dtype=denoiser.network_dtype,
        )
        return cls(denoiser=finer, x0=x0.to(denoiser.device).float(), caption=caption.to(denoiser.device))

    @cached_property
    def scale(self) -> Float[np.ndarray, " timestep"]:
        """x / y at every timestep, float64."""
        return self._mixture()[0]

    @cached_property
    def tau(self) -> Float[np.ndarray, " timestep"]:
        """Ascending, float64."""
        signal, noise = self._mixture()
        return noise / signal

    def nearest(self, tau: Float[np.ndarray, " *point"]) -> Int[np.ndarray, " *point"]:
        """Timesteps."""
        edges = (self.tau[1:] + self.tau[:-1]) / 2
        return np.searchsorted(edges, tau)

    def slope(
        self, y: Float32[Tensor, "image c h w"], timestep: Int[np.ndarray, " image"]
    ) -> Float32[Tensor, "image c h w"]:
        """f at y: one network call per image."""
        at = torch.from_numpy(timestep).to(y.device)
        return self.denoiser(self.wide(self.scale[timestep]) * y, at, self.caption)

    def first_slope(self) -> Float32[Tensor, "image c h w"]:
        """f at the clean end, as our inverters begin."""
        clean = torch.full((len(self.x0),), self.denoiser.levels.clean, device=self.x0.device)
        return self.denoiser(self.x0, clean, self.caption)

    def wide(self, values: Float[np.ndarray, " image"]) -> Float32[Tensor, "image 1 1 1"]:
        return torch.from_numpy(values).float().to(self.x0.device)[:, None, None, None]

    def _mixture(self) -> tuple[Float[np.ndarray, " timestep"], Float[np.ndarray, " timestep"]]:
        levels = self.denoiser.levels
        return levels.mixture(np.arange(levels.num_train_timesteps))


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """From a point to the next one."""

    ode: Ode
    y: Float32[Tensor, "image c h w"]
    slope: Float32[Tensor, "image c h w"]
    """The last one that was evaluated; at the clean end f(x0)."""
    left: Float[np.ndarray, " image"]
    """tau."""
    right: Int[np.ndarray, " image"]
    """Timestep."""
    before: "Step | None"
    """The step that led here; None for the first."""

    @property
    def rise(self) -> Float[np.ndarray, " image"]:
        """Of tau."""
        return self.ode.tau[self.right] - self.left

    def euler(self, slope: Float32[Tensor, "image c h w"]) -> Float32[Tensor, "image c h w"]:
        """Where the whole step leads with one slope."""
        return self.y + self.ode.wide(self.rise) * slope

    def middle(self, slope: Float32[Tensor, "image c h w"]) -> tuple[Tensor, Float[np.ndarray, " image"]]:
        """(f in the middle of the step, reached with `slope`; tau there less tau here). The middle is the nearest
        timestep, the right end where none lies between."""
        near = np.minimum(self.ode.nearest(self.left + self.rise / 2), self.right)
        at = np.where(self.ode.tau[near] > self.left, near, self.right)
        part = self.ode.tau[at] - self.left
        return self.ode.slope(self.y + self.ode.wide(part) * slope, at), part


Move = Callable[[Step], tuple[Tensor, Tensor]]
"""-> (y at the right end, the slope that was evaluated last)."""


def uni_inv(step: Step) -> tuple[Tensor, Tensor]:
    """Uni-Inv, arXiv 2504.13109, its inversion, as in denoise_uniinv of the released sampling.py (e3633bc):

        v_i = f(y_{i-1} + (tau_i - tau_{i-1}) v_{i-1}, tau_i)
        y_i = y_{i-1} + (tau_i - tau_{i-1}) v_i

    The released DDIM scheduler is the transfer to noise. f is not evaluated at y_i itself.
    """
    slope = step.ode.slope(step.euler(step.slope), step.right)
    return step.euler(slope), slope


def fireflow(step: Step) -> tuple[Tensor, Tensor]:
    """FireFlow, arXiv 2412.07517, its modified midpoint method, as in denoise_fireflow of UniEdit-Flow's sampling.py:

        v_{i+1/2} = f(y_i + (h / 2) v_{i-1/2}, tau_i + h / 2),  v_{-1/2} = f(y_0, 0)
        y_{i+1} = y_i + h v_{i+1/2}

    The transfer to noise is ours. f is not evaluated at y_i itself.
    """
    slope, _ = step.middle(step.slope)
    return step.euler(slope), slope


def rf_solver(step: Step) -> tuple[Tensor, Tensor]:
    """RF-Solver of second order, arXiv 2411.04746, its Taylor step, as denoise in the released sampling.py (ccb2d21):

        v_i = f(y_i, tau_i),  v'_i = [f(y_i + (h / 2) v_i, tau_i + h / 2) - v_i] / (h / 2)
        y_{i+1} = y_i + h v_i + (h^2 / 2) v'_i

    The transfer to noise is ours.
    """
    here = step.slope if step.before is None else step.ode.slope(step.y, step.ode.nearest(step.left))
    ahead, part = step.middle(here)
    rise = step.rise
    return step.euler(here) + step.ode.wide(rise**2 / (2 * part)) * (ahead - here), ahead


def x0_extrapolated(step: Step) -> tuple[Tensor, Tensor]:
    """DDIM's step solved for its noisier end, with x0 = y - tau f there as it has changed in the step before:

        x_i = y_i - tau_i f(y_i, tau_i)
        y_{i+1} = (tau_{i+1} / tau_i) (y_i - z) + z,  z = x_i + (x_i - x_{i-1});  y_1 by Euler's step

    How the abstract of IFE (arXiv 2512.08547) can be read; its formula was not to be had, and may weigh the change
    otherwise.
    """
    if step.before is None:
        return step.euler(step.slope), step.slope
    here = step.ode.slope(step.y, step.ode.nearest(step.left))
    x0 = step.y - step.ode.wide(step.left) * here
    last = step.before.y - step.ode.wide(step.before.left) * step.slope
    return step.euler(here - (x0 - last) / step.ode.wide(step.left)), here


@dataclass(frozen=True, kw_only=True)
class Rival:
    move: Move
    calls_per_step: int
    begins: int
    """Calls before the first step that none of its own replaces."""
    evaluates: bool
    """Whether f is evaluated at the points themselves, all but the last: what a record of them needs."""


RIVALS = {
    "Uni-Inv": Rival(move=uni_inv, calls_per_step=1, begins=1, evaluates=False),
    "FireFlow": Rival(move=fireflow, calls_per_step=1, begins=1, evaluates=False),
    "x0 extrapolated": Rival(move=x0_extrapolated, calls_per_step=1, begins=0, evaluates=True),
    "RF-Solver": Rival(move=rf_solver, calls_per_step=2, begins=0, evaluates=True),
}


@torch.inference_mode()
def walk(ode: Ode, move: Move, tau: Float[np.ndarray, "point image"]) -> tuple[list[Tensor], Tensor]:
    """(y at the timesteps nearest to every tau, all images at once; the slope that was evaluated last)."""
    points, y, slope = [], ode.x0, ode.first_slope()
    left, before = np.zeros(len(y)), None
    for right in ode.nearest(tau):
        before = Step(ode=ode, y=y, slope=slope, left=left, right=right, before=before)
        y, slope = move(before)
        points.append(y)
        left = ode.tau[right]
    return points, slope


@torch.inference_mode()
def exact(ode: Ode, timesteps: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """(y at some timesteps, ascending and near to each other, f at the last): Heun's method from each to the next."""
    y, slope, tau, found = ode.x0, ode.first_slope(), 0.0, []
    for timestep in timesteps:
        at = np.full(len(y), timestep)
        rise = float(ode.tau[timestep] - tau)
        y = y + rise / 2 * (slope + ode.slope(y + rise * slope, at))
        slope, tau = ode.slope(y, at), float(ode.tau[timestep])
        found.append(y)
    return found, slope
