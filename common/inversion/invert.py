"""Inverting the images of groups: the function that precompute, verification and drift measurement share."""

import itertools
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

_IMAGES_TOGETHER = 2
"""Images of a group that walk as one, a plain pair's: whatever the batch is, fixed_point stops for the same ones."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Images that share path and noise. Everything random of a group hangs on (seed, its id) alone."""

    id: str
    num_images: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Inverted:
    """The stored tensors of a set of groups, on the CPU. Optional ones are None unless asked for."""

    timestep: Int16[Tensor, "group record"]
    x_t: Float16[Tensor, "image record c h w"]
    delta: Float16[Tensor, "image record c h w"]
    x0_t: Float16[Tensor, "image record c h w"]
    target: Float16[Tensor, "image record c h w"]
    reference_error: Float32[Tensor, "image record"]
    inversion_error: Float32[Tensor, "image"]
    """NaN where not measured."""
    delta_prev: Float16[Tensor, "image record c h w"] | None
    eps_ref: Float16[Tensor, "image record c h w"] | None
    residual: Float32[Tensor, "image record"] | None
    """fixed_point: relative RMS change of the last iteration."""
    finite: Bool[Tensor, "image"]
    """False where any stored number of the image is NaN or infinite: its pairs are to be quarantined."""


def build_path(
    identity: InverterIdentity, schedule: Levels, *, seed: int, group_id: str, timesteps_per_pair: int
) -> Path:
    """The path of one group, on the exact grid or the released code's."""
    build = released_path if identity.faithful else exact_path
    return build(identity, schedule, seed=seed, group_id=group_id, timesteps_per_pair=timesteps_per_pair)


@torch.inference_mode()
def invert(
    denoiser: Denoiser,
    x0: Float16[Tensor, "image c h w"],
    groups: Sequence[Group],
    *,
    identity: InverterIdentity,
    seed: int,
    timesteps_per_pair: int,
    caption: Condition,
    empty: Condition | None = None,
    measure_inversion: float = 0.0,
    extra: tuple[str, ...] = (),
    images_per_batch: int = 32,
) -> Inverted:
    """Invert every image with the frozen network behind `denoiser`.

    Args:
        x0: clean latents, scaled by the VAE factor, already rounded to float16 (the stored-point rule starts there),
            group after group.
        caption: the training condition, one row per image.
        empty: the empty prompt's condition likewise; needed where the guidance is not 1.
        measure_inversion: share of the groups (by hash) whose round trip is measured.
        extra: "delta_prev", "eps_ref".
        images_per_batch: how many images travel together; does not change the numbers beyond float32 rounding.
    """
    device = denoiser.device
    caption = caption.to(device)
    empty = None if empty is None or identity.guidance == 1.0 else empty.to(device)
    clean = x0.to(device)
    parts, owners = _parts(groups)

    def start(number: int) -> Generator[Asked, Tensor, Records]:
        group_id = owners[number].id
        path = build_path(
            identity, denoiser.levels, seed=seed, group_id=group_id, timesteps_per_pair=timesteps_per_pair
        )
        walk = released_trajectory if identity.faithful else trajectory
        return walk(
            clean[parts[number].start : parts[number].stop],
            path,
            identity=identity,
            denoiser=denoiser,
            seed=seed,
            group_id=group_id,
            measure=uniform(seed, group_id, "measure") < measure_inversion,
            extra=extra,
        )

    results = run_trajectories(start, parts, denoiser, caption=caption, empty=empty, images_per_batch=images_per_batch)

    def stacked(name: str) -> Tensor:
        return torch.cat([torch.stack(getattr(records, name), dim=1) for records in results]).cpu()

    inversion_error = torch.cat(
        [
            torch.full((len(part),), float("nan"), device=device)
            if records.inversion_error is None
            else records.inversion_error.float()
            for part, records in zip(parts, results, strict=True)
        ]
    ).cpu()
    tensors = {name: stacked(name) for name in ("x_t", "delta", "x0_t", "target", "reference_error")}
    optional = {name: stacked(name) for name in extra}
    residual = stacked("residual") if identity.name == "fixed_point" else None
    stored = [*tensors.values(), *optional.values(), *([] if residual is None else [residual])]
    measured = torch.cat(
        [
            torch.full((len(part),), records.inversion_error is not None)
            for part, records in zip(parts, results, strict=True)
        ]
    )
    finite = torch.stack(
        [values.isfinite().flatten(1).all(1) for values in stored] + [~measured | inversion_error.isfinite()]
    ).all(0)
    starts = set(itertools.accumulate((group.num_images for group in groups[:-1]), initial=0))
    timestep = [records.timestep for part, records in zip(parts, results, strict=True) if part.start in starts]
    return Inverted(
        timestep=torch.tensor(timestep, dtype=torch.int16),
        **tensors,
        inversion_error=inversion_error,
        delta_prev=optional.get("delta_prev"),
        eps_ref=optional.get("eps_ref"),
        residual=residual,
        finite=finite,
    )


def together(image: int, num_images: int) -> range:
    """The images that walk as one with `image` of a group of `num_images`: who inverts it again needs them all."""
    start = image - image % _IMAGES_TOGETHER
    return range(start, min(start + _IMAGES_TOGETHER, num_images))


def _parts(groups: Sequence[Group]) -> tuple[list[range], list[Group]]:
    """Rows of the images that walk together, and the group of each such part."""
    parts: list[range] = []
    owners: list[Group] = []
    first = 0
    for group in groups:
        end = first + group.num_images
        for start in range(first, end, _IMAGES_TOGETHER):
            parts.append(range(start, min(start + _IMAGES_TOGETHER, end)))
            owners.append(group)
        first = end
    return parts, owners
