"""Inverting the images of groups: the function that precompute, verification and drift measurement share."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float16, Float32, Int16
from torch import Tensor

from inpo.common.cache.schema import InverterIdentity
from inpo.common.conditions import Condition
from inpo.common.denoiser import Denoiser
from inpo.common.inversion.batch import ImageBatch
from inpo.common.inversion.batching import run_walks
from inpo.common.inversion.path import Part, Path, exact_path
from inpo.common.inversion.records import Records
from inpo.common.inversion.released import released_path, run_released
from inpo.common.levels import Levels
from inpo.common.seeding import uniform

_LATENTS = ("x_t", "delta", "x0_t", "target")
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
    inversion_error: Float32[Tensor, " image"]
    """NaN where not measured."""
    delta_prev: Float16[Tensor, "image record c h w"] | None = None
    eps_ref: Float16[Tensor, "image record c h w"] | None = None
    residual: Float32[Tensor, "image record"] | None = None
    """fixed_point: relative RMS change of the last iteration."""
    finite: Bool[Tensor, " image"]
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
    compact: bool = False,
    own_noise: Float32[Tensor, "image c h w"] | None = None,
    images_per_batch: int = 32,
) -> Inverted:
    """Invert every image with the frozen network behind `denoiser`. Not for `recorded`, whose points are given.

    Args:
        x0: clean latents, scaled by the VAE factor, already rounded to float16 (the stored-point rule starts there),
            group after group.
        caption: the training condition, one row per image.
        empty: the empty prompt's condition likewise; needed where the guidance is not 1.
        measure_inversion: share of the groups (by hash) whose round trip is measured.
        extra: "delta_prev", "eps_ref".
        compact: x0 is `coarse` (cache/derive.py), and targets are to be.
        own_noise: of the inverter `tracked`, on the CPU: the noise that each image was made from.
        images_per_batch: how many images travel together; does not change the numbers beyond float32 rounding.
    """
    device = denoiser.device
    caption = caption.to(device)
    empty = None if empty is None or identity.guidance == 1.0 else empty.to(device)
    clean = x0.to(device).contiguous()  # a VAE's latents may be ordered otherwise, and kernels would round otherwise
    parts: list[Part] = []
    timestep: list[list[int]] = []
    for group in groups:
        path = build_path(
            identity, denoiser.levels, seed=seed, group_id=group.id, timesteps_per_pair=timesteps_per_pair
        )
        back = uniform(seed, group.id, "measure") < measure_inversion
        first = parts[-1].images.stop if parts else 0
        parts += [
            Part(images=images, group_id=group.id, path=path, back=back)
            for images in _together(range(first, first + group.num_images))
        ]
        timestep.append([kept for point in path.points for kept in point.records])
    records = Records(
        len(x0),
        timesteps_per_pair,
        latents=(*_LATENTS, *extra),
        figures=("reference_error", *(["residual"] if identity.name == "fixed_point" else [])),
    )
    if identity.faithful:
        run_released(parts, denoiser, identity, clean, caption, records, seed=seed, images_per_batch=images_per_batch)
    else:
        batch = ImageBatch(denoiser, identity, clean, caption, empty, records, compact=compact)
        run_walks(
            parts,
            batch,
            identity=identity,
            levels=denoiser.levels,
            seed=seed,
            images_per_batch=images_per_batch,
            own_noise=own_noise if identity.name == "tracked" else None,
        )
    arrays, inversion_error, finite = records.collect(device)
    return Inverted(
        timestep=torch.tensor(timestep, dtype=torch.int16), inversion_error=inversion_error, finite=finite, **arrays
    )


def together(image: int, num_images: int) -> range:
    """The images that walk as one with `image` of a group of `num_images`: who inverts it again needs them all."""
    start = image - image % _IMAGES_TOGETHER
    return range(start, min(start + _IMAGES_TOGETHER, num_images))


def _together(images: range) -> list[range]:
    """The images of a group, split into those that walk together."""
    return [images[start : start + _IMAGES_TOGETHER] for start in range(0, len(images), _IMAGES_TOGETHER)]
