"""The noise schedule and the inversion grid.

Notation (docs/equations.md): a_t = sqrt(abar_t), s_t = sqrt(1 - abar_t), sigma_t = s_t / a_t, where
abar_t is the scheduler's `alphas_cumprod`. Tables are float64; label t is an integer 0..T-1. The clean end of a
trajectory lies outside the table: a = 1, s = 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from inpo.common.errors import ModelError, UsageError

PredictionType = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """What diffusers' DDIM schedulers take from the scheduler's configuration beside the table.

    Only the released code's inversion (inversion/released.py) reads it. The defaults are Stable Diffusion's.
    """

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
            steps_offset=config.get("steps_offset", 0),
            set_alpha_to_one=config.get("set_alpha_to_one", True),
            clip_range=config.get("clip_sample_range", 1.0) if config.get("clip_sample", True) else None,
            timestep_spacing=config.get("timestep_spacing", "leading"),
        )


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Immutable tables of a discrete diffusion schedule.

    `a` and `s` are float64 of shape [timestep] with a^2 + s^2 = 1; `prediction_type` says what the network predicts.
    """

    a: Float[Tensor, "timestep"]
    s: Float[Tensor, "timestep"]
    prediction_type: PredictionType
    sampler: SamplerSettings = SamplerSettings()
    _copies: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    @classmethod
    def from_scheduler(cls, scheduler: object) -> "NoiseSchedule":
        """Build from any diffusers scheduler that has `alphas_cumprod`.

        Raises ModelError for a scheduler without such a table (flow matching), for a zero-terminal-SNR table
        (a = 0 at T-1: x_t holds nothing of x0) and for a prediction type that is not noise, v or sample.
        """
        table = getattr(scheduler, "alphas_cumprod", None)
        name = type(scheduler).__name__
        config = getattr(scheduler, "config", {})
        if table is None:
            raise ModelError(
                "The scheduler has no alphas_cumprod table.",
                where=name,
                expected="a discrete DDPM/DDIM-family schedule (SD1.x, SD2.x, SDXL)",
                fix="flow-matching and other continuous-time models are not supported yet",
            )
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in get_args(PredictionType):
            raise ModelError(
                "Unknown prediction type.",
                where=name,
                expected=", ".join(get_args(PredictionType)),
                got=prediction_type,
                fix="use a model that predicts noise, v or the sample",
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
        schedule = cls.from_alphas_cumprod(torch.as_tensor(table), prediction_type)
        return replace(schedule, sampler=SamplerSettings.from_config(config))

    @classmethod
    def from_alphas_cumprod(
        cls, alphas_cumprod: Float[Tensor, "timestep"], prediction_type: PredictionType = "epsilon"
    ) -> "NoiseSchedule":
        """Build from the table abar_t itself, in (0, 1) and decreasing."""
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
        return cls(a=abar.sqrt(), s=(1 - abar).sqrt(), prediction_type=prediction_type)

    @property
    def num_train_timesteps(self) -> int:
        """T, the length of the table."""
        return self.a.shape[0]

    @property
    def sigma(self) -> Float[Tensor, "timestep"]:
        """sigma_t = s_t / a_t, float64."""
        return self.s / self.a

    def at(
        self, timestep: Int[Tensor, "*shape"], *, trailing: int = 0, dtype: torch.dtype = torch.float64
    ) -> tuple[Float[Tensor, "*axes"], Float[Tensor, "*axes"]]:
        """(a_t, s_t) at integer labels, on the labels' device, with `trailing` axes of length 1 appended."""
        shape = (*timestep.shape, *([1] * trailing))
        a, s = self._tables(timestep.device, dtype)
        index = timestep.long()
        return a[index].reshape(shape), s[index].reshape(shape)

    def _tables(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(a, s) on a device, copied there once: a look-up per call would wait for the device."""
        key = (device, dtype)
        if key not in self._copies:
            self._copies[key] = (self.a.to(dtype).to(device), self.s.to(dtype).to(device))
        return self._copies[key]

    def timestep_from_sigma(self, sigma: float) -> int:
        """The label whose sigma is nearest to `sigma` in the logarithm. Inverse of `sigma`."""
        return int((self.sigma.log() - float(np.log(sigma))).abs().argmin())


def exact_grid(offset: float, steps: int, num_train_timesteps: int) -> Int[np.ndarray, "grid"]:
    """The exact inversion grid of a pair: t_i = floor((i + u) * T / n), i = 0..n-1, int64 ascending.

    `offset` is u in [0, 1). Over uniform u every timestep 0..T-1 is covered uniformly, for any n, and every record
    sits exactly on its own level. Our derivation; it replaces the released code's grid, where x_t and its label
    disagree.
    """
    if not 0.0 <= offset < 1.0:
        raise UsageError("The grid's offset lies outside [0, 1).", got=offset, fix="draw it from the pair's hash")
    if not 1 <= steps <= num_train_timesteps:
        raise UsageError(
            "The number of inversion steps is out of range.",
            where="--steps",
            expected=f"1..{num_train_timesteps}",
            got=steps,
            fix="the paper uses 10",
        )
    # Nearer to 1 than 2^-32, i + u would round up to i + 1 and leave its cell.
    offset = min(offset, 1.0 - 2.0**-32)
    return np.floor((np.arange(steps) + offset) * num_train_timesteps / steps).astype(np.int64)
