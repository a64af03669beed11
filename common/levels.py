"""The levels of a model's noise schedule, and the inversion grid over them.

Timestep t is an index 0..T-1 into three float64 tables (docs/equations.md):

    x_t = signal[t] * x0 + noise[t] * eps         label[t]: what the network is told

a_t and s_t are signal and noise, sigma_t = s_t / a_t. The clean end of a trajectory lies outside the tables: a = 1,
s = 0. A table of another family is another constructor here; nothing else asks where the tables come from.

A flow's table may begin far from the clean end. What a path visits below it has negative numbers: -1 is the level just
below timestep 0, the last one is the clean end. Noise alone, which a sampler begins with, lies above a flow's table and
has the number T. Such points are never records.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from inpo.common.choices import DensityName, Space
from inpo.common.errors import ModelError, UsageError

_FLOW_FLOOR = 0.05
NEAREST_CLEAN = 0.8
"""Times the floor: what the clean end's sigma counts as where a path is refined."""
_BELOW = 32
"""Levels between the clean end and a flow's table."""


@dataclass(frozen=True, kw_only=True)
class TimeSettings:
    """Which times a flow's levels are. A scheduler's own table asks for none of this."""

    density: DensityName = "uniform"
    shift: str = "none"
    """auto: the scheduler's own; none: 1; or a number."""
    latent_shape: tuple[int, int, int] | None = None
    """What a shift by the image's size is for; None: the smallest that the scheduler names."""
    network_dtype: str = "float32"
    """In half precision a network sees some labels rounded; the times are those that it sees as they are."""


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """What diffusers' DDIM schedulers take from the scheduler's configuration beside the table.

    Only the released code's inversion (inversion/released.py) reads it. The defaults are Stable Diffusion's.
    """

    prediction_type: str = "epsilon"
    steps_offset: int = 1
    """The first label of a sampler's grid."""
    set_alpha_to_one: bool = False
    """Whether the clean end has abar = 1; else abar_0."""
    clip_range: float | None = None
    """x0(t) is clamped to [-r, r]; None: it is not."""
    timestep_spacing: str = "leading"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "SamplerSettings":
        """From a scheduler's configuration; what it does not say is as diffusers' DDIM schedulers take it."""
        return cls(
            prediction_type=config.get("prediction_type", "epsilon"),
            steps_offset=config.get("steps_offset", 0),
            set_alpha_to_one=config.get("set_alpha_to_one", True),
            clip_range=config.get("clip_sample_range", 1.0) if config.get("clip_sample", True) else None,
            timestep_spacing=config.get("timestep_spacing", "leading"),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Levels:
    """Immutable tables, float64 of shape [timestep], on the CPU."""

    signal: Float[Tensor, " timestep"]
    noise: Float[Tensor, " timestep"]
    label: Float[Tensor, " timestep"]
    floor: float
    """The sigma below which a step in log sigma is stretched (ab2) and from which the clean end is counted."""
    space: Space = "noise"
    """What `target` and the errors are of: noise, or velocity = noise - x0."""
    density: DensityName | None = None
    """Of a flow's times, before the shift."""
    shift: float | None = None
    sampler: SamplerSettings = SamplerSettings()

    @classmethod
    def from_scheduler(cls, scheduler: object) -> "Levels":
        """Build from any diffusers scheduler that has `alphas_cumprod`.

        Raises ModelError for a scheduler without such a table (flow matching), for one that tells the network other
        timesteps than the table's, and for a zero-terminal-SNR table (a = 0 at T-1: x_t holds nothing of x0).
        """
        table = getattr(scheduler, "alphas_cumprod", None)
        name = type(scheduler).__name__
        if table is None:
            raise ModelError(
                "The scheduler has no alphas_cumprod table.",
                where=name,
                expected="a discrete DDPM/DDIM-family schedule",
                fix="use the model's own scheduler; a flow is told by its pipeline's class (docs/models.md)",
            )
        config = getattr(scheduler, "config", {})
        is_continuous = config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"
        for key, is_other in (("timestep_type", is_continuous), ("use_flow_sigmas", config.get("use_flow_sigmas"))):
            if is_other:
                raise ModelError(
                    "The scheduler tells the network other timesteps than those of its alphas_cumprod table.",
                    where=f"{name}.{key}",
                    got=str(config[key]).lower(),
                    fix="use a model that was trained on the table's own timesteps 0, 1, 2, ...",
                )
        if config.get("rescale_betas_zero_snr", False):
            # diffusers patches the last entry to a tiny positive number; the sigma there is meaningless all the same.
            raise ModelError(
                "A zero-terminal-SNR schedule is not supported.",
                where=f"{name}.rescale_betas_zero_snr",
                expected="false",
                got="true",
                fix="at T-1 such a schedule has a = 0 and the latent holds nothing of the image; use another model",
            )
        return replace(cls.from_alphas_cumprod(torch.as_tensor(table)), sampler=SamplerSettings.from_config(config))

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Float[Tensor, " timestep"]) -> "Levels":
        """Build from the table abar_t itself, in (0, 1) and decreasing: signal^2 + noise^2 = 1, the label is t."""
        abar = alphas_cumprod.detach().to("cpu", torch.float64)
        if not bool((abar > 1e-9).all()):
            raise ModelError(
                "A zero-terminal-SNR schedule is not supported.",
                where="alphas_cumprod",
                expected="every entry above 0",
                got=f"minimum {abar.min().item():.3g}",
                fix="use a model whose last timestep still holds a little of the image",
            )
        if not bool((abar < 1).all()) or not bool((abar.diff() < 0).all()):
            raise ModelError(
                "alphas_cumprod is not a decreasing table below 1.",
                where="scheduler",
                expected="1 > abar_0 > abar_1 > ... > 0",
                got=f"first {abar[0].item():.6g}, last {abar[-1].item():.6g}",
                fix="check the scheduler's configuration",
            )
        signal, noise = abar.sqrt(), (1 - abar).sqrt()
        label = torch.arange(len(abar), dtype=torch.float64)
        return cls(signal=signal, noise=noise, label=label, floor=float(noise[0] / signal[0]))

    @classmethod
    def from_density(
        cls,
        density: DensityName,
        shift: float,
        num_train_timesteps: int,
        *,
        label: Callable[[Tensor], Tensor] = lambda times: times,
        exact: Float[Tensor, " time"] | None = None,
    ) -> "Levels":
        """A rectified flow's levels, signal = 1 - t and noise = t: t is the density's quantile at (i + 1/2) / T, then
        moved to S t / (1 + (S - 1) t).

        Args:
            label: what the network is told at times, linear in them.
            exact: the only times to take, ascending, in (0, 1): each of ours becomes the nearest of them, and
                neighbours may be equal.
        """
        share = (torch.arange(num_train_timesteps, dtype=torch.float64) + 0.5) / num_train_timesteps
        times = share if density == "uniform" else torch.special.ndtri(share).sigmoid()
        times = shift * times / (1 + (shift - 1) * times)
        if exact is not None:
            exact = exact.double()
            times = exact[torch.bucketize(times, (exact[1:] + exact[:-1]) / 2)]
        return cls(
            signal=1 - times,
            noise=times,
            label=label(times),
            floor=_FLOW_FLOOR,
            space="velocity",
            density=density,
            shift=shift,
            sampler=SamplerSettings(prediction_type="flow_prediction"),
        )

    @property
    def num_train_timesteps(self) -> int:
        """T, the length of the tables."""
        return self.signal.shape[0]

    @property
    def sigma(self) -> Float[Tensor, " timestep"]:
        """sigma_t = s_t / a_t, float64."""
        return self.noise / self.signal

    @cached_property
    def walked(self) -> Float[Tensor, "3 level"]:
        """(signal, noise, label) of every point that a path may visit: the tables, above a flow's the noisy end at time
        1, and behind them what lies below, so that negative numbers find it.

        Below a flow's table: the clean end at time 0, then levels evenly in log sigma from 0.8 floor to the table. A
        table in noise space has neither; its clean end is told timestep 0's label.
        """
        table = torch.stack([self.signal, self.noise, self.label])
        if self.space == "noise":
            return table
        lowest, first = NEAREST_CLEAN * self.floor, float(self.sigma[0])
        times = torch.tensor([1.0, 0.0], dtype=torch.float64)
        if first > lowest:
            sigma = torch.linspace(math.log(lowest), math.log(first), _BELOW + 2, dtype=torch.float64).exp()[1:-1]
            times = torch.cat([times, sigma / (1 + sigma)])
        # The label is linear in time; rounded, because a difference of rounded numbers must not make 0 a tiny number.
        slope = round(float((self.label[-1] - self.label[0]) / (self.noise[-1] - self.noise[0])), 6)
        start = round(float(self.label[0] - slope * self.noise[0]), 6)
        return torch.cat([table, torch.stack([1 - times, times, start + slope * times])], dim=1)

    @property
    def noisy(self) -> int:
        """Number of the noisy end: where a sampler begins, with noise alone."""
        return self.num_train_timesteps - (self.space == "noise")

    @property
    def clean(self) -> int:
        """Number of the clean end."""
        return self.noisy + 1 - self.walked.shape[1]

    def point(self, number: int) -> tuple[float, float]:
        """(a, s) of a point that a path may visit."""
        a, s, _ = self.walked[:, number].tolist()
        return a, s

    @property
    def points(self) -> Int[np.ndarray, " point"]:
        """Numbers of all points but a clean end that lies outside the table, ascending in sigma."""
        return np.arange(min(self.clean + 1, 0), self.num_train_timesteps)

    def at(
        self, timestep: Int[np.ndarray, " *shape"]
    ) -> tuple[Float[np.ndarray, " *shape"], Float[np.ndarray, " *shape"]]:
        """(a_t, s_t), float64."""
        index = timestep.astype(np.int64)
        return self.signal.numpy()[index], self.noise.numpy()[index]

    def mixture(
        self, timestep: Int[np.ndarray, " *shape"]
    ) -> tuple[Float[np.ndarray, " *shape"], Float[np.ndarray, " *shape"]]:
        """(A, B) of x_t = A x0 + B target, float64: (a_t, s_t) where the target is noise, (1, s_t) where it is
        velocity."""
        a, s = self.at(timestep)
        return (a, s) if self.space == "noise" else (np.ones_like(a), s)


def exact_grid(
    offset: float, steps: int, num_train_timesteps: int, *, option: str = "--grid-points"
) -> Int[np.ndarray, " grid"]:
    """The exact inversion grid of a pair: t_i = floor((i + u) * T / n), i = 0..n-1, int64 ascending.

    `offset` is u in [0, 1). Over uniform u every timestep 0..T-1 is covered uniformly, for any n, and every record
    sits exactly on its own level. Our derivation; it replaces the released code's grid, where x_t and its label
    disagree. `option` gave the number of steps.
    """
    if not 0.0 <= offset < 1.0:
        raise UsageError("The grid's offset lies outside [0, 1).", got=offset, fix="draw it from the pair's hash")
    if not 1 <= steps <= num_train_timesteps:
        raise UsageError(
            "The number of inversion steps is out of range.",
            where=option,
            expected=f"1..{num_train_timesteps}",
            got=steps,
            fix="take fewer" if steps > 1 else "take one at least",
        )
    # Nearer to 1 than 2^-32, i + u would round up to i + 1 and leave its cell.
    offset = min(offset, 1.0 - 2.0**-32)
    return np.floor((np.arange(steps) + offset) * num_train_timesteps / steps).astype(np.int64)
