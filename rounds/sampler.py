"""The sampler whose path is the inversion: from noise down a group's grid to x0, and x_t at the kept timesteps.

A step is DDIM's, for flows Euler's in t: x at (a, s) is a x0(t) + s eps of the point before. It begins at the noisy
end with noise alone and ends at the clean end (a = 1, s = 0).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int
from torch import Tensor

from inpo.common.cache import Manifest
from inpo.common.conditions import Condition
from inpo.common.denoiser import Denoiser
from inpo.common.inversion import build_path
from inpo.common.inversion.records import upload
from inpo.common.levels import Levels, exact_grid
from inpo.common.seeding import uniform


@dataclass(frozen=True, kw_only=True)
class SamplerGrid:
    """Where the images of a group step, and what is kept: numbers of points, ascending."""

    grid: Int[np.ndarray, " point"]
    kept: Int[np.ndarray, " record"]
    """Places in the grid, ascending."""

    @property
    def timestep(self) -> Int[np.ndarray, " record"]:
        """The kept points."""
        found: Int[np.ndarray, " record"] = self.grid[self.kept]
        return found


def sampler_grid(manifest: Manifest, levels: Levels, group_id: str) -> SamplerGrid:
    """As an inversion of the group would have it."""
    identity = manifest.inverter
    path = build_path(
        identity, levels, seed=manifest.seed, group_id=group_id, timesteps_per_pair=manifest.timesteps_per_pair
    )
    kept = [timestep for point in path.points for timestep in point.records]
    grid = exact_grid(uniform(manifest.seed, group_id, "offset"), identity.grid_points, levels.num_train_timesteps)
    return SamplerGrid(grid=grid, kept=np.searchsorted(grid, kept))


@torch.inference_mode()
def sample_path(
    denoiser: Denoiser,
    noise: Float32[Tensor, "image c h w"],
    grids: Sequence[SamplerGrid],
    *,
    caption: Condition,
    empty: Condition,
    guidance: float,
) -> tuple[Float32[Tensor, "image c h w"], Float32[Tensor, "image record c h w"]]:
    """(x0, x_t at the kept points), on the CPU, of one batch.

    Args:
        noise: what each image is made from, on the CPU.
        grids: of each image's group.
    """
    device, levels = denoiser.device, denoiser.levels
    caption, empty = caption.to(device), empty.to(device)
    grid, kept = (np.stack([getattr(each, name) for each in grids]) for name in ("grid", "kept"))
    steps = grid.shape[1]
    numbers = np.concatenate([np.full((len(grids), 1), levels.noisy), grid[:, ::-1]], axis=1)
    signal, spread, _ = levels.walked.numpy()[:, numbers]
    a, s = (
        upload(torch.from_numpy(np.append(table, np.full((len(grids), 1), end), axis=1)).float(), device)
        for table, end in ((signal, 1.0), (spread, 0.0))
    )
    at = upload(torch.from_numpy(numbers), device)
    x = upload(noise, device)
    made = torch.empty(*kept.shape, *noise.shape[1:], device=device)
    for point in range(steps + 1):
        image, record = np.nonzero(kept == steps - point)
        if len(image):
            rows, places = upload(torch.from_numpy(image), device), upload(torch.from_numpy(record), device)
            made[rows, places] = x[rows]
        if guidance in (0.0, 1.0):
            output = denoiser.predict(x, at[:, point], caption if guidance else empty)
        else:
            output = denoiser.predict(x, at[:, point], empty)
            output = output + guidance * (denoiser.predict(x, at[:, point], caption) - output)
        clean, eps = denoiser.to_clean(output, x, at[:, point]), denoiser.to_noise(output, x, at[:, point])
        x = a[:, point + 1, None, None, None] * clean + s[:, point + 1, None, None, None] * eps
    return x.cpu(), made.cpu()
