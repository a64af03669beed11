"""A world whose ODE is known: an elementwise Gaussian mixture, and networks that predict its noise or velocity."""

import numpy as np
import torch
from torch import Tensor, nn

from inpo.common.denoiser import Denoiser
from inpo.common.families import FAMILIES
from inpo.common.levels import Levels

WEIGHT, MEAN, VARIANCE = np.array([0.4, 0.6]), np.array([-0.8, 0.6]), np.array([0.3, 0.25])


def mixture_eps(z: np.ndarray, sigma: float) -> np.ndarray:
    """Noise prediction at z = x / a."""
    return _estimates(z, 1.0, sigma)[0]


def mixture_velocity(x: np.ndarray, time: float) -> np.ndarray:
    """Prediction of noise - x0 at x = (1 - time) x0 + time noise."""
    noise, clean = _estimates(x, 1 - time, time)
    return noise - clean


def _estimates(x: np.ndarray, a: float, s: float) -> tuple[np.ndarray, np.ndarray]:
    """E[noise | x] and E[x0 | x] at x = a x0 + s noise: of every component, weighted by its responsibility."""
    spread = a**2 * VARIANCE + s**2
    offset = x[..., None] - a * MEAN
    log = np.log(WEIGHT) - 0.5 * np.log(spread) - offset**2 / (2 * spread)
    responsibility = np.exp(log - log.max(-1, keepdims=True))
    responsibility /= responsibility.sum(-1, keepdims=True)
    noise, clean = s * offset / spread, MEAN + a * VARIANCE * offset / spread
    return (responsibility * noise).sum(-1), (responsibility * clean).sum(-1)


class Mixture(nn.Module):
    """The closed form as a network: noise at a label of `sigma`, or without a table velocity, told the time."""

    def __init__(self, sigma: np.ndarray | None = None) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))
        self.sigma = sigma

    def forward(self, x: Tensor, timestep: Tensor, **ignored: object) -> tuple[Tensor]:
        rows = [self._row(row, told) for row, told in zip(x.double().numpy(), timestep.double().tolist(), strict=True)]
        return (torch.from_numpy(np.stack(rows)).float(),)

    def _row(self, x: np.ndarray, told: float) -> np.ndarray:
        if self.sigma is None:
            return mixture_velocity(x, told)
        sigma = self.sigma[int(told)]
        return mixture_eps(x * np.sqrt(1 + sigma**2), sigma)


def noise_mixture(sigma: np.ndarray) -> Denoiser:
    levels = Levels.from_alphas_cumprod(torch.from_numpy(1 / (1 + sigma**2)))
    return Denoiser(Mixture(sigma), levels, FAMILIES["sd"].call)


def flow_mixture(num_train_timesteps: int) -> Denoiser:
    levels = Levels.from_density("uniform", 1.0, num_train_timesteps)
    return Denoiser(Mixture(), levels, FAMILIES["sd"].call, "flow_prediction")
