"""One pair's inversion from its clean latents to its last kept record, under the stored-point rule.

A trajectory is a generator: it yields Requests for network calls and receives raw outputs, so that a batch can mix
pairs that stand at different points (batching.py). Both sides of the pair travel together.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float16, Float32
from torch import Tensor

from inpo.common.cache.derive import mean_square, point_from_target, stored_point
from inpo.common.cache.schema import InverterIdentity
from inpo.common.denoiser import Denoiser
from inpo.common.inversion.inverters import Asked, Calls, Request, State, Stepper, inverter_named
from inpo.common.inversion.path import Path
from inpo.common.levels import Levels
from inpo.common.seeding import normal

Visit = Callable[[Tensor, int], Generator[Asked, Tensor, State]]
_EXTRA_NOISE = 0.1


@dataclass(kw_only=True, eq=False)
class Records:
    """What one pair's inversion stores: one entry per kept timestep, both sides."""

    timestep: list[int] = field(default_factory=list)
    target: list[Float16[Tensor, "side c h w"]] = field(default_factory=list)
    x_t: list[Float16[Tensor, "side c h w"]] = field(default_factory=list)
    delta: list[Float16[Tensor, "side c h w"]] = field(default_factory=list)
    x0_t: list[Float16[Tensor, "side c h w"]] = field(default_factory=list)
    reference_error: list[Float32[Tensor, "side"]] = field(default_factory=list)
    delta_prev: list[Float16[Tensor, "side c h w"]] = field(default_factory=list)
    eps_ref: list[Float16[Tensor, "side c h w"]] = field(default_factory=list)
    residual: list[Float32[Tensor, "side"]] = field(default_factory=list)
    inversion_error: Float32[Tensor, "side"] | None = None


def trajectory(
    x0: Float16[Tensor, "side c h w"],
    path: Path,
    *,
    identity: InverterIdentity,
    denoiser: Denoiser,
    seed: int,
    pair_id: str,
    measure: bool,
    extra: tuple[str, ...] = (),
) -> Generator[Asked, Tensor, Records]:
    """Invert one pair along `path`.

    E_ref is always the loss's: the prediction under the training caption without guidance. Where that is also what
    inverts (guidance 1), or a part of it (any but 0), it costs no call; under the empty prompt one more per record.
    """
    schedule = denoiser.levels
    step = inverter_named(identity.name)
    guidance = identity.guidance
    under_caption: Tensor | None = None
    """Raw output under the caption at the point evaluated last, if the inverting model asked for it."""

    def evaluate(x: Tensor, timestep: int) -> Calls:
        """Raw output of the inverting model: guidance combines outputs, which are linear in the prediction."""
        nonlocal under_caption
        if guidance == 0.0:
            under_caption = None
            return (yield Request(x=x, timestep=timestep, empty=True))
        under_caption = yield Request(x=x, timestep=timestep)
        if guidance == 1.0:
            return under_caption
        empty = yield Request(x=x, timestep=timestep, empty=True)
        return empty + guidance * (under_caption - empty)

    def visit(x: Tensor, timestep: int) -> Generator[Asked, Tensor, State]:
        output = yield from evaluate(x, timestep)
        label = torch.full((2,), timestep, device=x.device)
        return State(
            a=float(schedule.signal[timestep]),
            s=float(schedule.noise[timestep]),
            x=x,
            clean=denoiser.to_clean(output, x, label),
            delta=denoiser.to_noise(output, x, label),
        )

    def reference(state: State, timestep: int) -> Calls:
        """eps_ref at the point just visited."""
        if guidance == 1.0:
            return state.delta
        output = (yield Request(x=state.x, timestep=timestep)) if under_caption is None else under_caption
        return denoiser.to_noise(output, state.x, torch.full((2,), timestep, device=x.device))

    records = Records()
    clean = x0.float()
    noise: Tensor | None = None
    history: list[State] = []
    path_schedule = _released_schedule(schedule) if identity.faithful else schedule
    stepper = Stepper(schedule=path_schedule, denoiser=denoiser, evaluate=evaluate, identity=identity)
    if path.starts_clean:
        start = yield from visit(clean, 0)
        history = [State(a=1.0, s=0.0, x=clean, clean=clean, delta=start.delta)]
    for index, point in enumerate(path.points):
        stepper.residual = None
        if point.noised:
            if noise is None:
                noise = normal(tuple(x0.shape[1:]), seed, pair_id, "noise").to(x0.device).expand_as(clean)
            carried = noise
            x = float(schedule.signal[point.level]) * clean + float(schedule.noise[point.level]) * noise
        else:
            carried = history[-1].delta
            x = yield from step(history, point.level, stepper)
            if identity.faithful:
                before = path.points[index - 1].level if index else None
                x = x + _released_noise(schedule, before, point.level) * normal(
                    tuple(x0.shape), seed, pair_id, "extra", point.level
                ).to(x0.device)
        arrived: State | None = None
        for timestep in point.records:
            a, s = float(schedule.signal[timestep]), float(schedule.noise[timestep])
            if point.noised:
                target = carried.half()
                x_t = point_from_target(x0, target, a, s)
            else:
                target, x_t = stored_point(x0, x, a, s)
            state = yield from visit(x_t.float(), timestep)
            eps_ref = yield from reference(state, timestep)
            records.timestep.append(timestep)
            records.target.append(target)
            records.x_t.append(x_t)
            records.delta.append(state.delta.half())
            records.x0_t.append(state.clean.half())
            records.reference_error.append(mean_square(target.float() - eps_ref))
            if "delta_prev" in extra:
                records.delta_prev.append(carried.half())
            if "eps_ref" in extra:
                records.eps_ref.append(eps_ref.half())
            if identity.name == "fixed_point":
                records.residual.append(
                    torch.zeros(2, device=x.device) if stepper.residual is None else stepper.residual.float()
                )
            if timestep == point.level or index == len(path.points) - 1:
                arrived = state
        # An unkept noised point matters only if the inversion goes on from it.
        if arrived is None and not (point.noised and path.points[index + 1].noised):
            arrived = yield from visit(x, point.level)
        if arrived is not None and identity.faithful and index < len(path.points) - 1:
            arrived = _on_level(arrived, path_schedule, point.level)
        if arrived is not None:
            # Noised points lie on no common trajectory: a second-order step must not extrapolate from one to the next.
            history = [arrived] if point.noised else [*history[-1:], arrived]
    if measure:
        assert history, "the last point of a path is a record, so that its state is known"
        records.inversion_error = yield from _round_trip(clean, history[-1], path, schedule, visit)
    return records


def _round_trip(clean: Tensor, last: State, path: Path, schedule: Levels, visit: Visit) -> Calls:
    """Relative RMS between x0 and where deterministic DDIM lands from the last stored x_t, down the same points."""
    state = last
    for point in reversed(path.points[:-1]):
        x = float(schedule.signal[point.level]) * state.clean + float(schedule.noise[point.level]) * state.delta
        state = yield from visit(x, point.level)
    error = (state.clean - clean).square().mean((-3, -2, -1)).sqrt()
    return error / clean.square().mean((-3, -2, -1)).sqrt()


def _released_noise(schedule: Levels, before: int | None, level: int) -> float:
    """0.1 * sqrt(DDIM variance) of the step from `before` (None: the clean end) to `level`."""
    abar = float(schedule.signal[level]) ** 2
    abar_before = 1.0 if before is None else float(schedule.signal[before]) ** 2
    variance = (1 - abar_before) / (1 - abar) * (1 - abar / abar_before)
    return _EXTRA_NOISE * variance**0.5


def _on_level(state: State, schedule: Levels, level: int) -> State:
    """The same prediction, with x0(t) by Eq. 8 from another table: one path, one table."""
    a, s = float(schedule.signal[level]), float(schedule.noise[level])
    return State(a=a, s=s, x=state.x, clean=(state.x - s * state.delta) / a, delta=state.delta)


def _released_schedule(schedule: Levels) -> Levels:
    """The released code's path uses alphas_cumprod rounded to float16."""
    abar = (schedule.signal**2).half().double()
    return replace(schedule, signal=abar.sqrt(), noise=(1 - abar).sqrt())
