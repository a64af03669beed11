"""The inversion of the released training code, number for number: `--faithful`, and what the benchmarks run online.

The reference is train.py of github.com/JaydenLyh/InPO at commit a9cfc4d, with the DDIMInverseScheduler and the
DDIMScheduler of diffusers 0.20.0, which it pins, in its launcher's float16. It differs from the exact path in the grid,
in the label and the level of the clean end, in the noise after every step, and in which numbers are float16
(docs/equations.md).
"""

from collections.abc import Generator

import torch
from jaxtyping import Float, Float16, Float32, Int
from torch import Tensor

from inpo.common.cache.derive import point_from_target
from inpo.common.cache.schema import InverterIdentity
from inpo.common.denoiser import Denoiser
from inpo.common.errors import ModelError, UsageError
from inpo.common.inversion.inverters import Asked, Request, State
from inpo.common.inversion.path import Path, Point
from inpo.common.inversion.trajectory import Records, round_trip
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
        self, x: Float32[Tensor, "image c h w"], x0: Float16[Tensor, "image c h w"], timestep: Int[Tensor, "#image"]
    ) -> Float32[Tensor, "image c h w"]:
        """What the loss aims at: x, at whatever level, taken for a point at `timestep` (CPU, one or by image)."""
        abar = self._half_abar[timestep.long()].view(-1, 1, 1, 1)
        signal, spread = abar.sqrt().to(x.device), (1 - abar).sqrt().to(x.device)
        return (x - x0 * signal) / spread

    def _ends(self, table: Float[Tensor, "timestep"], level: int) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
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


def released_trajectory(
    x0: Float16[Tensor, "image c h w"],
    path: Path,
    *,
    identity: InverterIdentity,
    denoiser: Denoiser,
    seed: int,
    group_id: str,
    measure: bool,
    extra: tuple[str, ...] = (),
) -> Generator[Asked, Tensor, Records]:
    """Invert the images of one pair along `path` as the released code does for each of its timesteps.

    One noise is drawn for a level and an image, and shared by the timesteps that pass it. At a record the stored-point
    rule holds, with the manifest's table; the path goes on from x itself, in float32.
    """
    schedule = denoiser.levels
    loop = ReleasedLoop(schedule, identity.grid_points)

    def visit(x: Tensor, timestep: int) -> Generator[Asked, Tensor, State]:
        eps = yield Request(x=x, timestep=timestep)
        a, s = float(schedule.signal[timestep]), float(schedule.noise[timestep])
        return State(a=a, s=s, x=x, clean=(x - s * eps) / a, delta=eps)

    records = Records()
    clean = x = x0.float()
    state: State | None = None
    for point in path.points:
        carried = yield Request(x=x, timestep=loop.label(point.level))
        randn = normal(tuple(x0.shape), seed, group_id, "extra", point.level).to(x0.device)
        x = loop.step(x, carried, point.level) + loop.noise(randn, point.level)
        for timestep in point.records:
            target = loop.target(x, x0, torch.tensor([timestep])).half()
            x_t = point_from_target(x0, target, float(schedule.signal[timestep]), float(schedule.noise[timestep]))
            state = yield from visit(x_t.float(), timestep)
            records.add(
                timestep, target, x_t, state, eps_ref=state.delta, predicted=state.delta, carried=carried, extra=extra
            )
    if measure:
        assert state is not None, "the last point of a path has a record"
        records.inversion_error = yield from round_trip(clean, state, path, schedule, visit)
    return records
