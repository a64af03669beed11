"""The points a group's inversion visits, drawn from (seed, group id) alone.

grid -> which K of its points are kept as records -> extra points that refine the start -> which points are noised.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from inpo.common.cache.schema import InverterIdentity
from inpo.common.choices import NOISING
from inpo.common.errors import UsageError
from inpo.common.inversion.inverters import most_iterations, takes_half_steps
from inpo.common.levels import NEAREST_CLEAN, Levels, exact_grid
from inpo.common.seeding import generator, uniform


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point of a path: the level x sits on and what happens there.

    `records` are the timesteps kept here as records: the level itself or none; the released code's (released.py) may
    lie off the level.
    """

    level: int
    records: tuple[int, ...]
    noised: bool


@dataclass(frozen=True, kw_only=True)
class Path:
    """A group's points in ascending order, up to the largest kept one."""

    points: tuple[Point, ...]

    @property
    def starts_clean(self) -> bool:
        """True if the first point is reached from the clean latent by a network call at (x0, label 0)."""
        return not self.points[0].noised

    @property
    def num_records(self) -> int:
        return sum(len(point.records) for point in self.points)

    def num_calls(self, identity: InverterIdentity, *, measured: float) -> float:
        """Network evaluations per image along this path; `measured` is the share whose round trip is measured.

        For fixed_point the maximum of iterations is counted.
        """
        halves = takes_half_steps(identity)
        pass_through = sum(
            1
            for here, after in itertools.pairwise(self.points)
            if not here.records and not (here.noised and after.noised) and (here.noised or not halves)
        )
        inverted = sum(not point.noised for point in self.points)
        visits = self.starts_clean + self.num_records + pass_through
        visits += inverted * (most_iterations(identity) + halves)
        guided = 1 if identity.guidance in (0.0, 1.0) else 2
        under_caption = self.num_records if identity.guidance == 0.0 else 0
        return guided * (visits + measured * (len(self.points) - 1)) + under_caption


@dataclass(frozen=True, kw_only=True)
class Part:
    """Images that walk together along their group's path."""

    images: range
    group_id: str
    path: Path
    back: bool
    """Whether the round trip is measured."""


def exact_path(
    identity: InverterIdentity, schedule: Levels, *, seed: int, group_id: str, timesteps_per_pair: int
) -> Path:
    """The path of one group on the exact grid."""
    num_train_timesteps = schedule.num_train_timesteps
    grid = exact_grid(uniform(seed, group_id, "offset"), identity.grid_points, num_train_timesteps)
    low, high = identity.timestep_range
    candidates = grid[(grid >= low) & (grid < high)]
    kept = set(
        generator(seed, group_id, "timesteps").choice(candidates, size=timesteps_per_pair, replace=False).tolist()
    )
    start = 1.0 if identity.name in NOISING else identity.noised_start
    noised = [int(t) for t in grid if t < start * num_train_timesteps]
    inverted = [int(t) for t in grid if t >= start * num_train_timesteps]
    refined = _refine(noised[-1:] + inverted, schedule, identity.refine_start, clean=not noised)
    levels = sorted({*noised, *inverted, *(refined if inverted else ())})
    last = max(kept)
    return Path(
        points=tuple(
            Point(level=level, records=(level,) if level in kept else (), noised=level in noised)
            for level in levels
            if level <= last
        )
    )


def _refine(levels: list[int], schedule: Levels, extra: int, *, clean: bool) -> list[int]:
    """`--refine-start p`: p times, split the step with the largest ratio of sigmas at its geometric middle.

    The clean end counts as 0.8 times the floor, so that its step has a finite ratio. Nothing is inserted where no level
    lies strictly between the ends of the widest step. Below a flow's table there are levels too.
    """
    if not extra:
        return levels
    levels, numbers = list(levels), schedule.points
    a, s, _ = schedule.walked[:, numbers].numpy()
    sigma = s / a
    first = int(numbers[0])
    for _ in range(extra):
        ends: list[tuple[int | None, int]] = [(None, levels[0])] if clean else []
        ends += list(itertools.pairwise(levels))
        if not ends:  # all is noised: there is no step to refine
            break
        sigmas = [
            (NEAREST_CLEAN * schedule.floor if left is None else sigma[left - first], sigma[right - first])
            for left, right in ends
        ]
        ratios = [right / left for left, right in sigmas]
        widest = int(np.argmax(ratios))
        middle = np.sqrt(sigmas[widest][0] * sigmas[widest][1])
        label = int(numbers[np.abs(np.log(sigma) - np.log(middle)).argmin()])
        left, right = ends[widest]
        low = 0.0 if left is None else sigma[left - first]
        if not low < sigma[label - first] < sigma[right - first]:  # a flow's neighbours may have one level
            break
        levels = sorted([*levels, label])
    return levels


def check_settings(
    identity: InverterIdentity, *, num_train_timesteps: int, timesteps_per_pair: int, option: str = "--grid-points"
) -> None:
    """Refuse settings that some group could not follow. Raises UsageError. `option` gave the grid's points."""
    n, k = identity.grid_points, timesteps_per_pair
    exact_grid(0.0, n, num_train_timesteps, option=option)
    if not 1 <= k <= n:
        raise UsageError(
            "Cannot keep that many timesteps per pair.",
            where="--timesteps-per-pair",
            expected=f"1..{n} ({option})",
            got=k,
            fix=f"raise {option} or lower --timesteps-per-pair",
        )
    low, high = identity.timestep_range
    if not 0 <= low < high <= num_train_timesteps:
        raise UsageError(
            "The timestep range is empty or outside the model's table.",
            where="--timestep-range",
            expected=f"0 <= low < high <= {num_train_timesteps}",
            got=f"{low} {high}",
            fix="give the first timestep and the one after the last; leave the option out for all",
        )
    # The count of grid points in the range changes with u only where a point crosses an end of the range.
    offsets = [0.0] + [shifted for end in (low, high) for shifted in _around((end * n / num_train_timesteps) % 1.0)]
    fewest = min(
        int(((grid := exact_grid(u, n, num_train_timesteps)) >= low).sum() - (grid >= high).sum()) for u in offsets
    )
    if fewest < k:
        raise UsageError(
            "The timestep range holds too few grid points for some groups.",
            where="--timestep-range",
            expected=f"at least {k} grid points (--timesteps-per-pair)",
            got=f"{fewest} of {n} in [{low}, {high})",
            fix=f"widen the range, raise {option}, or lower --timesteps-per-pair",
        )
    if identity.faithful and (
        identity.name != "ddim"
        or identity.refine_start
        or identity.noised_start
        or identity.guidance != 1.0
        or identity.timestep_range != (0, num_train_timesteps)
    ):
        raise UsageError(
            "--faithful reproduces the released code and fixes the inverter.",
            where="--faithful",
            expected="--inverter ddim without guidance, refined or noised start and timestep range",
            fix="drop the other options",
        )


def check_distinct(levels: Levels, grid_points: int, *, option: str = "--grid-points") -> None:
    """Raise UsageError if two points of some group's grid would lie on one level. `option` gave their number."""
    apart = levels.num_train_timesteps // grid_points
    if bool((levels.noise[apart:] <= levels.noise[: levels.num_train_timesteps - apart]).any()):
        raise UsageError(
            "Two points of the grid would lie on one level.",
            where=option,
            expected=f"levels apart, of which a network in half precision sees {len(levels.noise.unique())} exactly",
            got=grid_points,
            fix="take fewer of them, or --dtype float32",
        )


def _around(offset: float) -> list[float]:
    """`offset` and its neighbours inside [0, 1)."""
    return [min(max(offset + nudge, 0.0), 1.0 - 2.0**-32) for nudge in (-1e-9, 0.0, 1e-9)]
