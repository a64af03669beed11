"""The inversion of images of one group from their clean latents to the last kept record, by the stored-point rule.

A trajectory is a generator: it yields Requests for network calls and receives raw outputs, so that a batch can mix
images that stand at different points (batching.py). What is inverted together here shares its path.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32
from torch import Tensor

from inpo.common.cache.derive import mean_square, point_from_target, stored_point
from inpo.common.cache.schema import InverterIdentity
from inpo.common.denoiser import Denoiser
from inpo.common.inversion.inverters import INVERTERS, Asked, Calls, Request, State, Stepper
from inpo.common.inversion.path import Path
from inpo.common.levels import Levels
from inpo.common.seeding import normal

Visit = Callable[[Tensor, int], Generator[Asked, Tensor, State]]
"""(x, label) -> the point visited: one evaluation of the inverting model."""


@dataclass(kw_only=True, eq=False)
class Records:
    """What an inversion stores: one entry per kept timestep, all images."""

    timestep: list[int] = field(default_factory=list)
    target: list[Float16[Tensor, "image c h w"]] = field(default_factory=list)
    x_t: list[Float16[Tensor, "image c h w"]] = field(default_factory=list)
    delta: list[Float16[Tensor, "image c h w"]] = field(default_factory=list)
    x0_t: list[Float16[Tensor, "image c h w"]] = field(default_factory=list)
    reference_error: list[Float32[Tensor, "image"]] = field(default_factory=list)
    delta_prev: list[Float16[Tensor, "image c h w"]] = field(default_factory=list)
    eps_ref: list[Float16[Tensor, "image c h w"]] = field(default_factory=list)
    residual: list[Float32[Tensor, "image"]] = field(default_factory=list)
    inversion_error: Float32[Tensor, "image"] | None = None

    def add(
        self,
        timestep: int,
        target: Float16[Tensor, "image c h w"],
        x_t: Float16[Tensor, "image c h w"],
        state: State,
        *,
        eps_ref: Float32[Tensor, "image c h w"],
        predicted: Float32[Tensor, "image c h w"],
        carried: Float[Tensor, "image c h w"],
        extra: tuple[str, ...],
    ) -> None:
        """One record: `state` is the point visited at `x_t`, `carried` the noise that led there, `eps_ref` the
        reference's noise, `predicted` its prediction of what `target` is of."""
        self.timestep.append(timestep)
        self.target.append(target)
        self.x_t.append(x_t)
        self.delta.append(state.delta.half())
        self.x0_t.append(state.clean.half())
        self.reference_error.append(mean_square(target.float() - predicted))
        if "delta_prev" in extra:
            self.delta_prev.append(carried.half())
        if "eps_ref" in extra:
            self.eps_ref.append(eps_ref.half())


def trajectory(
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
    """Invert images of one group along its `path`.

    E_ref is always the loss's: the prediction under the training caption without guidance. Where that is also what
    inverts (guidance 1), or a part of it (any but 0), it costs no call; under the empty prompt one more per record.
    """
    schedule = denoiser.levels
    step = INVERTERS[identity.name]
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
        label = torch.full(x.shape[:1], timestep, device=x.device)
        a, s = schedule.point(timestep)
        return State(
            a=a, s=s, x=x, clean=denoiser.to_clean(output, x, label), delta=denoiser.to_noise(output, x, label)
        )

    def reference(state: State, timestep: int) -> Calls:
        """The reference's raw output at the point just visited."""
        return (yield Request(x=state.x, timestep=timestep)) if under_caption is None else under_caption

    records = Records()
    clean = x0.float()
    history: list[State] = []
    stepper = Stepper(schedule=schedule, denoiser=denoiser, evaluate=evaluate, identity=identity)
    if path.starts_clean:
        start = yield from visit(clean, schedule.clean)
        history = [State(a=1.0, s=0.0, x=clean, clean=clean, delta=start.delta)]
    for index, point in enumerate(path.points):
        stepper.residual = None
        a, s = schedule.point(point.level)
        if point.noised:
            noise = normal(tuple(x0.shape[1:]), seed, group_id, "noise", point.level).to(x0.device)
            carried = noise.expand_as(clean)
            x = a * clean + s * noise
        else:
            carried = history[-1].delta
            x = yield from step(history, point.level, stepper)
        if point.records:
            mixture = [float(each) for each in schedule.mixture(np.array(point.level))]
            if point.noised:
                target = (carried if schedule.space == "noise" else carried - clean).half()
                x_t = point_from_target(x0, target, *mixture)
            else:
                target, x_t = stored_point(x0, x, *mixture)
            arrived = yield from visit(x_t.float(), point.level)
            output = yield from reference(arrived, point.level)
            at = (output, arrived.x, torch.full(x.shape[:1], point.level, device=x.device))
            eps_ref, predicted = denoiser.to_noise(*at), denoiser.to_space(*at)
            records.add(
                point.level, target, x_t, arrived, eps_ref=eps_ref, predicted=predicted, carried=carried, extra=extra
            )
            if identity.name == "fixed_point":
                records.residual.append(
                    torch.zeros(x.shape[:1], device=x.device) if stepper.residual is None else stepper.residual.float()
                )
        elif point.noised and path.points[index + 1].noised:
            continue  # an unkept noised point matters only if the inversion goes on from it
        else:
            arrived = yield from visit(x, point.level)
        # Noised points lie on no common trajectory: a second-order step must not extrapolate from one to the next.
        history = [arrived] if point.noised else [*history[-1:], arrived]
    if measure:
        assert history, "the last point of a path is a record, so that its state is known"
        records.inversion_error = yield from round_trip(clean, history[-1], path, schedule, visit)
    return records


def round_trip(clean: Tensor, last: State, path: Path, schedule: Levels, visit: Visit) -> Calls:
    """Relative RMS between x0 and where deterministic DDIM lands from the last stored x_t, down the same points."""
    state = last
    for point in reversed(path.points[:-1]):
        a, s = schedule.point(point.level)
        x = a * state.clean + s * state.delta
        state = yield from visit(x, point.level)
    error = (state.clean - clean).square().mean((-3, -2, -1)).sqrt()
    return error / clean.square().mean((-3, -2, -1)).sqrt()
