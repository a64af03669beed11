"""The images of a batch as tensors [row, ...]: all arithmetic between two network calls, for all of them at once.

The number of operations does not hang on the number of images, and but for fixed_point's stopping rule nothing waits
for the device: the CPU runs ahead and the network never pauses for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float16, Float32, Int64
from torch import Tensor

from inpo.common.cache.derive import coarse, mean_square, point_from_target, stored_point
from inpo.common.cache.schema import InverterIdentity
from inpo.common.conditions import Condition
from inpo.common.denoiser import Denoiser
from inpo.common.inversion.inverters import Call, Move, Use, takes_half_steps
from inpo.common.inversion.records import Records, rms, upload


@dataclass(kw_only=True, eq=False)
class _State:
    """Where the images stand. x is what the network sees at a point; clean and delta follow from its output there:
    x = a * clean + s * delta (Eq. 16)."""

    x: Float32[Tensor, "row c h w"]
    clean: Float32[Tensor, "row c h w"]
    delta: Float32[Tensor, "row c h w"]
    carried: Float32[Tensor, "row c h w"]
    """delta of the point before, or the noise: what led to x."""
    x_before: Float32[Tensor, "row c h w"]
    """fixed_point: x at the point before."""
    half: Float32[Tensor, "row c h w"]
    """Guidance: the output under the caption at x."""
    target: Float16[Tensor, "row c h w"]
    residual: Float32[Tensor, "row 1 1 1"]
    """fixed_point: relative RMS change of the last iteration; 0 at a point without one."""

    @classmethod
    def blank(cls, x0: Float16[Tensor, "row c h w"]) -> "_State":
        zero, names = torch.zeros_like(x0, dtype=torch.float32), ("x", "clean", "delta", "carried", "x_before", "half")
        return cls(target=torch.zeros_like(x0), residual=zero[:, :1, :1, :1], **dict.fromkeys(names, zero))

    def rows(self, rows: Tensor) -> "_State":
        return _State(**{name: tensor[rows] for name, tensor in vars(self).items()})


class ImageBatch:
    """The images that are under way, one row each. `everything`, `caption` and `empty` have one row per image."""

    def __init__(
        self,
        denoiser: Denoiser,
        identity: InverterIdentity,
        everything: Float16[Tensor, "image c h w"],
        caption: Condition,
        empty: Condition | None,
        records: Records,
        *,
        compact: bool = False,
    ) -> None:
        self._denoiser = denoiser
        self._compact = compact
        self._identity = identity
        self._everything = everything
        self._everyones_caption = caption
        self._everyones_empty = empty
        self._records = records
        self._images: list[int] = []
        self._state: _State

    @property
    def latent_shape(self) -> torch.Size:
        return self._everything.shape[1:]

    def seat(self, images: list[int]) -> None:
        """From now on the rows are `images`. Those that were not there until now are about to START."""
        if images == self._images:
            return
        former = {image: row for row, image in enumerate(self._images)}
        rows = upload(torch.tensor(images), self._everything.device)
        self._x0 = self._everything[rows]
        self._caption = self._everyones_caption.rows(rows)
        self._empty = None if self._everyones_empty is None else self._everyones_empty.rows(rows)
        if former:
            # A new row is a copy of any other: START and what follows set all that is read later.
            places = torch.tensor([former.get(image, 0) for image in images])
            self._state = self._state.rows(upload(places, rows.device))
        else:
            self._state = _State.blank(self._x0)
        self._images = images

    def call(self, calls: Sequence[Call], noise: Sequence[Float32[Tensor, "c h w"]]) -> dict[int, float]:
        """Do what every row's call says, around one network call. Returns, if any row ITERATEs, {image: residual}.

        `noise` is on the CPU, one tensor for each row, of which those of noised points are read.
        """
        columns = upload(torch.from_numpy(np.array(calls, dtype=np.float64).T), self._x0.device)
        told = SimpleNamespace(**dict(zip(Call._fields, columns[..., None, None, None], strict=True)))
        self._move(told, calls, noise)
        condition = self._caption
        if any(call.empty for call in calls):
            assert self._empty is not None, "guidance other than 1 needs the empty prompt"
            condition = self._empty.where(told.empty.flatten() == 1, condition)
        timestep = told.timestep.flatten().long()
        return self._use(self._denoiser.predict(self._state.x, timestep, condition), timestep, told, calls)

    def _move(self, told: Any, calls: Sequence[Call], noise: Sequence[Float32[Tensor, "c h w"]]) -> None:
        """x, and by the stored-point rule target, as every row's call wants them."""
        state, x0, a, s = self._state, self._x0, told.a.float(), told.s.float()
        start = told.move == Move.START
        if any(call.move is Move.START for call in calls):
            state.clean = torch.where(start, x0.float(), state.clean)
            state.delta = torch.where(start, upload(torch.stack(list(noise)), x0.device), state.delta)
        x = a * state.clean + s * state.delta
        if self._identity.name == "ab2":
            second = state.clean + told.sigma.float() * state.delta
            second = a * (second + told.weight.float() * (state.delta - state.carried))
            x = torch.where(told.move == Move.AB2, second, x)
        stay = told.move == Move.STAY
        if self._identity.name == "fixed_point":
            state.x_before = torch.where(stay, state.x_before, state.x)
            state.residual = torch.where(stay, state.residual, 0.0)
        x = torch.where(stay, state.x, x)
        stored = np.flatnonzero([call.store for call in calls])
        if len(stored):
            at = upload(torch.from_numpy(stored), x.device)
            is_noise = self._denoiser.levels.space == "noise"
            x0, s = x0[at], told.s[at]
            a = told.a[at] if is_noise else torch.ones_like(s)  # Levels.mixture
            target, x_t = stored_point(x0, x[at], a, s, compact=self._compact)
            if any(calls[row].is_noised for row in stored.tolist()):
                noised, delta = start[at], state.delta[at]
                as_target = (delta if is_noise else delta - x0.float()).half()
                if self._compact:
                    as_target = coarse(as_target)
                target = torch.where(noised, as_target, target)
                x_t = torch.where(noised, point_from_target(x0, as_target, a, s), x_t)
            state.target.index_copy_(0, at, target)
            x.index_copy_(0, at, x_t.float())
        state.x = x

    def _use(
        self, output: Float32[Tensor, "row c h w"], timestep: Int64[Tensor, " row"], told: Any, calls: Sequence[Call]
    ) -> dict[int, float]:
        """Guidance, clean and delta, finished records, iterations: from the network's own output at x."""
        state, denoiser, guidance = self._state, self._denoiser, self._identity.guidance
        under_caption = output
        if guidance not in (0.0, 1.0):  # it combines outputs, which are linear in the prediction
            state.half = under_caption = torch.where(told.use == Use.HALF, output, state.half)
            output = output + guidance * (under_caption - output)
        eps = denoiser.to_noise(output, state.x, timestep)
        clean = torch.where(told.s == 0, self._x0.float(), denoiser.to_clean(output, state.x, timestep))
        visit = told.use == Use.VISIT
        state.carried = torch.where(visit, state.delta, state.carried)
        state.clean = torch.where(visit, clean, state.clean)
        state.delta = torch.where(visit, eps, state.delta)
        if takes_half_steps(self._identity):
            self._turn(told, denoiser.to_space(output, state.x, timestep))
        self._store(under_caption, timestep, calls)
        if not any(call.use is Use.ITERATE for call in calls):
            return {}
        moved = told.a.float() * (state.x_before / told.a_from.float() + told.rise.float() * eps)
        residual = rms(moved - state.x) / rms(state.x)
        iterate = told.use == Use.ITERATE
        state.residual = torch.where(iterate, residual, state.residual)
        state.x = torch.where(iterate, moved, state.x)
        # How many iterations a point takes is the one thing that numbers decide: asked for once, for the whole batch.
        # A wait costs less than the calls of images that have settled.
        return dict(zip(self._images, residual.flatten().tolist(), strict=True))

    def _turn(self, told: Any, slope: Float32[Tensor, "row c h w"]) -> None:
        """fireflow: (clean, delta) stand for a straight line through the point behind, of x / a over sigma, and for a
        flow of x over time. It gets another slope there.
        """
        state, turn, is_flow = self._state, told.use == Use.TURN, self._denoiser.levels.space == "velocity"
        former = state.delta - state.clean if is_flow else state.delta
        clean = state.clean + told.sigma.float() * (former - slope)
        delta = clean + slope if is_flow else slope
        state.clean, state.delta = torch.where(turn, clean, state.clean), torch.where(turn, delta, state.delta)

    def _store(
        self, under_caption: Float32[Tensor, "row c h w"], timestep: Int64[Tensor, " row"], calls: Sequence[Call]
    ) -> None:
        """The records that are finished with this output."""
        numbers = np.array([call.record for call in calls])
        rows = np.flatnonzero(numbers >= 0)
        if not len(rows):
            return
        index = upload(torch.from_numpy(rows), timestep.device)
        there = self._state.rows(index)
        reference = (under_caption[index], there.x, timestep[index])
        eps_ref, predicted = self._denoiser.to_noise(*reference), self._denoiser.to_space(*reference)
        self._records.add(
            np.array(self._images)[rows],
            numbers[rows],
            {
                "x_t": there.x,
                "delta": there.delta,
                "x0_t": there.clean,
                "target": there.target,
                "delta_prev": there.carried,
                "eps_ref": eps_ref,
            },
            {"reference_error": mean_square(there.target.float() - predicted), "residual": there.residual.flatten()},
        )

    def end_round_trips(self, images: Sequence[int]) -> None:
        """The way back of `images` is over."""
        if images:
            index = upload(torch.tensor([self._images.index(image) for image in images]), self._x0.device)
            self._records.add_round_trips(np.array(images), self._state.clean[index], self._x0[index])
