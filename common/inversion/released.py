"""The inversion of the released training code, number for number: `--faithful`, and what the benchmarks run online.

The reference is train.py of github.com/JaydenLyh/InPO at commit a9cfc4d, with the DDIMInverseScheduler and the
DDIMScheduler of diffusers 0.20.0, which it pins, in its launcher's float16. It differs from the exact path in the grid,
in the label and the level of the clean end, in the noise after every step, and in which numbers are float16
(docs/equations.md).
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, Float64, Int, Int64
from torch import Tensor

from inpo.common.cache.derive import mean_square, point_from_target
from inpo.common.cache.schema import InverterIdentity
from inpo.common.conditions import Condition
from inpo.common.denoiser import Denoiser
from inpo.common.errors import ModelError, UsageError
from inpo.common.inversion.path import Part, Path, Point
from inpo.common.inversion.records import Records, upload
from inpo.common.levels import Levels
from inpo.common.seeding import generator, normal

_EXTRA_NOISE = 0.1


class ReleasedLoop:
    """Grid and steps of the released loop over `grid_points` points of a schedule.

    A step takes x, made at the level before, to `level`, and calls the network with the label `level` - T // n: -99 for
    the first step of n = 10. Raises ModelError for a scheduler that the released code refuses, UsageError for too many
    steps.
    """

    def __init__(self, schedule: Levels, grid_points: int) -> None:
        sampler = schedule.sampler
        if sampler.prediction_type != "epsilon" or sampler.timestep_spacing != "leading":
            raise ModelError(
                "The released code does not invert this model.",
                where="--faithful",
                expected="a scheduler with prediction_type epsilon and timestep_spacing leading",
                got=f"{sampler.prediction_type}, {sampler.timestep_spacing}",
                fix="leave --faithful out",
            )
        self.stride = schedule.num_train_timesteps // grid_points
        if self.stride <= sampler.steps_offset:
            raise UsageError(
                "The released code's grid has no clean end with that many grid points.",
                where="--grid-points",
                expected=f"at most {schedule.num_train_timesteps // (sampler.steps_offset + 1)} with --faithful",
                got=grid_points,
                fix="the released code uses 10",
            )
        self.levels = tuple(sampler.steps_offset + index * self.stride for index in range(grid_points))
        self.clip_range = sampler.clip_range
        # The scheduler that steps keeps its float32 table; the other one, which gives the noise's variance and the
        # target, has it cast to the weights' float16. Both keep the clean end in float32.
        self._abar = (schedule.signal**2).float()
        self._half_abar = self._abar.half()
        self._clean_end = torch.tensor(1.0) if sampler.set_alpha_to_one else self._abar[0]

    def level_of(self, timestep: int) -> int:
        """Where x stops for a drawn timestep: the first level at or above it, or the last one."""
        return next((level for level in self.levels if level >= timestep), self.levels[-1])

    def label(self, level: int) -> int:
        """What the network is told on the step to `level`."""
        return level - self.stride

    def step(
        self, x: Float32[Tensor, "*image c h w"], eps: Float32[Tensor, "*image c h w"], level: int
    ) -> Float32[Tensor, "*image c h w"]:
        """The inverse scheduler's step to `level`, from the network's prediction at (x, label(level))."""
        before, after = self._ends(self._abar, level)
        clean = (x - float((1 - before).sqrt()) * eps) / float(before.sqrt())
        if self.clip_range is not None:
            clean = clean.clamp(-self.clip_range, self.clip_range)
        return float(after.sqrt()) * clean + float((1 - after).sqrt()) * eps

    def noise(self, randn: Float[Tensor, "*image c h w"], level: int) -> Float16[Tensor, "*image c h w"]:
        """What is added to x after the step to `level`: 0.1 sqrt(DDIM's variance) times standard normal numbers."""
        before, after = self._ends(self._half_abar, level)
        variance = (1 - before) / (1 - after) * (1 - after / before)
        return _EXTRA_NOISE * randn.half() * float(variance.sqrt().half())

    def target(
        self, x: Float32[Tensor, "image c h w"], x0: Float16[Tensor, "image c h w"], timestep: Int[Tensor, " #image"]
    ) -> Float32[Tensor, "image c h w"]:
        """What the loss aims at: x, at whatever level, taken for a point at `timestep` (CPU, one or by image)."""
        abar = self._half_abar[timestep.long()].view(-1, 1, 1, 1)
        signal, spread = upload(torch.stack([abar.sqrt(), (1 - abar).sqrt()]), x.device).unbind()
        return (x - x0 * signal) / spread

    def _ends(self, table: Float[Tensor, " timestep"], level: int) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """abar before and after the step to `level`."""
        label = self.label(level)
        return self._clean_end if label < 0 else table[label], table[level]


def released_path(
    identity: InverterIdentity, schedule: Levels, *, seed: int, group_id: str, timesteps_per_pair: int
) -> "ReleasedPath":
    """The released grid, up to the largest timestep; timesteps are drawn from 0..T-1, whatever the levels."""
    loop = ReleasedLoop(schedule, identity.grid_points)
    total = schedule.num_train_timesteps
    drawn = generator(seed, group_id, "timesteps").choice(total, size=timesteps_per_pair, replace=False)
    records: dict[int, list[int]] = {}
    for timestep in sorted(drawn.tolist()):
        records.setdefault(loop.level_of(timestep), []).append(timestep)
    return ReleasedPath(
        points=tuple(
            Point(level=level, records=tuple(records.get(level, ())), noised=False)
            for level in loop.levels
            if level <= max(records)
        )
    )


class ReleasedPath(Path):
    """A path whose records take calls of their own, since their labels are not the levels'."""

    def num_calls(self, identity: InverterIdentity, *, measured: float) -> float:
        return len(self.points) + self.num_records + measured * (len(self.points) - 1)


def run_released(
    parts: Sequence[Part],
    denoiser: Denoiser,
    identity: InverterIdentity,
    x0: Float16[Tensor, "image c h w"],
    caption: Condition,
    records: Records,
    *,
    seed: int,
    images_per_batch: int,
) -> None:
    """Invert the images of every part as the released code does for each of its timesteps, batch after batch."""
    loop = ReleasedLoop(denoiser.levels, identity.grid_points)
    waiting = list(parts)
    while waiting:
        batch = [waiting.pop(0)]
        while waiting and sum(len(part.images) for part in (*batch, waiting[0])) <= images_per_batch:
            batch.append(waiting.pop(0))
        _run_batch(batch, denoiser, loop, x0, caption, records, seed)


def _run_batch(
    parts: Sequence[Part],
    denoiser: Denoiser,
    loop: ReleasedLoop,
    x0: Float16[Tensor, "image c h w"],
    caption: Condition,
    records: Records,
    seed: int,
) -> None:
    """All paths have the same levels, so that a batch goes from level to level, without those that have ended.

    One noise is drawn for a level and an image, and shared by the timesteps that pass it. At a record the stored-point
    rule holds, with the manifest's table; the path goes on from x itself, in float32.
    """
    device, levels = x0.device, denoiser.levels
    images = np.array([image for part in parts for image in part.images])
    back = np.array([part.back for part in parts for _ in part.images])
    kept = np.array(
        [[(each.level, t) for each in part.path.points for t in each.records] for part in parts for _ in part.images]
    )
    level_of, timestep_of = kept[..., 0], kept[..., 1]  # [row, record]
    everyone = upload(torch.from_numpy(images), device)
    x0, caption = x0[everyone], caption.rows(everyone)
    x = x0.float()
    clean, delta, carried = (torch.zeros_like(x) for _ in range(3))

    def told(values: np.ndarray) -> Int64[Tensor, " row"]:
        return upload(torch.from_numpy(values), device)

    def table(timestep: np.ndarray) -> list[Float64[Tensor, "row 1 1 1"]]:
        return [upload(torch.from_numpy(each), device)[:, None, None, None] for each in levels.at(timestep)]

    def visit(
        rows: np.ndarray, x: Float32[Tensor, "row c h w"], timestep: np.ndarray
    ) -> tuple[Float32[Tensor, "row c h w"], Float32[Tensor, "row c h w"]]:
        """(clean, delta) at x."""
        a, s = (each.float() for each in table(timestep))
        eps = denoiser.predict(x, told(timestep), caption.rows(told(rows)))
        return (x - s * eps) / a, eps

    for level in loop.levels:
        going = np.flatnonzero(level_of[:, -1] >= level)
        if not len(going):
            break
        at = told(going)
        eps = denoiser.predict(x[at], torch.full_like(at, loop.label(level)), caption.rows(at))
        drawn = [
            normal((len(part.images), *x.shape[1:]), seed, part.group_id, "extra", level)
            for part in parts
            if part.path.points[-1].level >= level
        ]
        noise = loop.noise(upload(torch.cat(drawn), device), level)
        x.index_copy_(0, at, loop.step(x[at], eps, level) + noise)
        carried.index_copy_(0, at, eps)
        where = np.argwhere(level_of == level)
        for first in range(0, len(where), len(images)):
            rows, numbers = where[first : first + len(images)].T
            at, timestep = told(rows), timestep_of[rows, numbers]
            target = loop.target(x[at], x0[at], torch.from_numpy(timestep)).half()
            x_t = point_from_target(x0[at], target, *table(timestep)).float()
            x0_t, eps = visit(rows, x_t, timestep)
            latents = {"x_t": x_t, "delta": eps, "x0_t": x0_t, "target": target}
            latents |= {"delta_prev": carried[at], "eps_ref": eps}
            records.add(images[rows], numbers, latents, {"reference_error": mean_square(target.float() - eps)})
            last = told(np.flatnonzero(numbers == level_of.shape[1] - 1))
            clean.index_copy_(0, at[last], x0_t[last])
            delta.index_copy_(0, at[last], eps[last])
    for level in reversed(loop.levels):
        rows = np.flatnonzero(back & (level < level_of[:, -1]))
        if len(rows):
            at, timestep = told(rows), np.full(len(rows), level)
            a, s = (each.float() for each in table(timestep))
            x0_t, eps = visit(rows, a * clean[at] + s * delta[at], timestep)
            clean.index_copy_(0, at, x0_t)
            delta.index_copy_(0, at, eps)
    if back.any():
        at = told(np.flatnonzero(back))
        records.add_round_trips(images[back], clean[at], x0[at])
