"""Inverting a set of pairs: the function that precompute, verification and drift measurement share."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float16, Float32, Int16
from torch import Tensor

from inpo.common.cache.schema import InverterIdentity
from inpo.common.conditions import Condition
from inpo.common.denoiser import Denoiser
from inpo.common.inversion.batching import run_trajectories
from inpo.common.inversion.inverters import Asked
from inpo.common.inversion.path import Path, exact_path
from inpo.common.inversion.released import released_path, released_trajectory
from inpo.common.inversion.trajectory import Records, trajectory
from inpo.common.levels import Levels
from inpo.common.seeding import uniform


@dataclass(frozen=True, kw_only=True, eq=False)
class Inverted:
    """The stored tensors of a set of pairs, on the CPU. Optional ones are None unless asked for."""

    timestep: Int16[Tensor, "pair step"]
    x_t: Float16[Tensor, "pair step side c h w"]
    delta: Float16[Tensor, "pair step side c h w"]
    x0_t: Float16[Tensor, "pair step side c h w"]
    target: Float16[Tensor, "pair step side c h w"]
    reference_error: Float32[Tensor, "pair step side"]
    inversion_error: Float32[Tensor, "pair side"]
    """NaN where not measured."""
    delta_prev: Float16[Tensor, "pair step side c h w"] | None
    eps_ref: Float16[Tensor, "pair step side c h w"] | None
    residual: Float32[Tensor, "pair step side"] | None
    """fixed_point: relative RMS change of the last iteration."""
    finite: Bool[Tensor, "pair"]
    """False where any stored number of the pair is NaN or infinite: to be quarantined."""


def build_path(
    identity: InverterIdentity, schedule: Levels, *, seed: int, pair_id: str, timesteps_per_pair: int
) -> Path:
    """The path of one pair, on the exact grid or the released code's."""
    build = released_path if identity.faithful else exact_path
    return build(identity, schedule, seed=seed, pair_id=pair_id, timesteps_per_pair=timesteps_per_pair)


@torch.inference_mode()
def invert(
    denoiser: Denoiser,
    x0: Float16[Tensor, "pair side c h w"],
    pair_ids: Sequence[str],
    *,
    identity: InverterIdentity,
    seed: int,
    timesteps_per_pair: int,
    caption: Condition,
    empty: Condition | None = None,
    measure_inversion: float = 0.0,
    extra: tuple[str, ...] = (),
    pairs_per_batch: int = 16,
) -> Inverted:
    """Invert every pair with the frozen network behind `denoiser`.

    Args:
        x0: clean latents, scaled by the VAE factor, already rounded to float16 (the stored-point rule starts there).
        pair_ids: everything random of a pair hangs on (seed, pair id) alone.
        caption: the training condition, one row per image in the order win, lose, win, lose, ...
        empty: the empty prompt's condition in the same order; needed where the guidance is not 1.
        measure_inversion: share of the pairs (by hash) whose round trip is measured.
        extra: "delta_prev", "eps_ref".
        pairs_per_batch: how many pairs travel together; does not change the numbers beyond float32 rounding.
    """
    device = denoiser.device
    caption = caption.to(device)
    empty = None if empty is None or identity.guidance == 1.0 else empty.to(device)
    clean = x0.to(device)

    def start(pair: int) -> Generator[Asked, Tensor, Records]:
        pair_id = pair_ids[pair]
        path = build_path(identity, denoiser.levels, seed=seed, pair_id=pair_id, timesteps_per_pair=timesteps_per_pair)
        walk = released_trajectory if identity.faithful else trajectory
        return walk(
            clean[pair],
            path,
            identity=identity,
            denoiser=denoiser,
            seed=seed,
            pair_id=pair_id,
            measure=uniform(seed, pair_id, "measure") < measure_inversion,
            extra=extra,
        )

    results = run_trajectories(
        start, len(pair_ids), denoiser, caption=caption, empty=empty, pairs_per_batch=pairs_per_batch
    )

    def stacked(name: str) -> Tensor:
        return torch.stack([torch.stack(getattr(records, name)) for records in results]).cpu()

    unmeasured = torch.full((2,), float("nan"), device=device)
    inversion_error = torch.stack(
        [unmeasured if records.inversion_error is None else records.inversion_error.float() for records in results]
    ).cpu()
    tensors = {name: stacked(name) for name in ("x_t", "delta", "x0_t", "target", "reference_error")}
    optional = {name: stacked(name) for name in extra}
    residual = stacked("residual") if identity.name == "fixed_point" else None
    stored = [*tensors.values(), *optional.values(), *([] if residual is None else [residual])]
    measured = torch.tensor([records.inversion_error is not None for records in results])
    finite = torch.stack(
        [values.isfinite().flatten(1).all(1) for values in stored] + [~measured | inversion_error.isfinite().all(1)]
    ).all(0)
    return Inverted(
        timestep=torch.tensor([records.timestep for records in results], dtype=torch.int16),
        **tensors,
        inversion_error=inversion_error,
        delta_prev=optional.get("delta_prev"),
        eps_ref=optional.get("eps_ref"),
        residual=residual,
        finite=finite,
    )
