"""Records at points that are given: by a sampler's path, or by another cache. Nothing is inverted.

The network is called once per record, at the stored x_t under the training caption.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float16, Float32, Int, Int16
from torch import Tensor

from inpo.common.cache import Shard
from inpo.common.cache.derive import mean_square, point_from_target
from inpo.common.conditions import Condition
from inpo.common.denoiser import Denoiser
from inpo.common.inversion.invert import Inverted
from inpo.common.inversion.records import Records, upload


def own_noise(shard: Shard, images: Int[np.ndarray, " image"] | None = None) -> Float32[Tensor, "image c h w"]:
    """What the images of a `tracked` cache were noised with: target + x0, at any record."""
    target, x0 = (torch.from_numpy(shard.read(path, images)).float() for path in ("target", "x0"))
    return target[:, 0] + x0


@torch.inference_mode()
def evaluate_points(
    denoiser: Denoiser,
    x0: Float16[Tensor, "image c h w"],
    target: Float16[Tensor, "image record c h w"],
    timestep: Int16[Tensor, "group record"],
    *,
    group_of: Sequence[int],
    caption: Condition,
    extra: tuple[str, ...] = (),
    images_per_batch: int = 32,
) -> Inverted:
    """What `invert` gives, with x0 and targets as they are to be stored: x_t by the stored-point rule.

    Args:
        group_of: the group of each image.
        caption: the training condition, one row per image.
        extra: "eps_ref", which is delta here; no other.
    """
    device, levels = denoiser.device, denoiser.levels
    num_images, num_records = target.shape[:2]
    records = Records(
        num_images, num_records, latents=("x_t", "delta", "x0_t", "target", *extra), figures=("reference_error",)
    )
    caption, groups = caption.to(device), torch.as_tensor(group_of, dtype=torch.int64)
    signal, noise = levels.mixture(timestep.numpy())
    for first in range(0, num_images * num_records, images_per_batch):
        flat = np.arange(first, min(first + images_per_batch, num_images * num_records))
        image, record = flat // num_records, flat % num_records
        group = groups[image].numpy()
        rows = upload(torch.from_numpy(image), device)
        clean, goal = (upload(each, device) for each in (x0[image], target[image, record]))
        a, s = (
            upload(torch.from_numpy(table[group, record]), device)[:, None, None, None] for table in (signal, noise)
        )
        x_t = point_from_target(clean, goal, a, s).float()
        at = upload(timestep[group, record].long(), device)
        output = denoiser.predict(x_t, at, caption.rows(rows))
        delta = denoiser.to_noise(output, x_t, at)
        told = {
            "x_t": x_t,
            "delta": delta,
            "x0_t": denoiser.to_clean(output, x_t, at),
            "target": goal,
            "eps_ref": delta,
        }
        error = mean_square(goal.float() - denoiser.to_space(output, x_t, at))
        records.add(image, record, told, {"reference_error": error})
    arrays, inversion_error, finite = records.collect(device)
    return Inverted(timestep=timestep, inversion_error=inversion_error, finite=finite, **arrays)
