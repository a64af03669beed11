"""The spread of a network: how far the error of a record moves for no other reason than rounding.

In another batch, by other kernels or compiled, a network rounds elsewhere, and the same record's error comes out a
little different. How far hangs on the network, its dtype and the size of its latents, so that it is measured: records
are evaluated again in another batch, their input moved at random by up to a quarter of a rounding of the dtype. That
begins every rounding anew, even where numbers do not depend on the batch, as on a CPU or in kernels compiled for one
shape.

A spread is a root mean square in units of the root of an error: with those, small and large errors move alike.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from inpo.common.cache.derive import mean_square
from inpo.common.conditions import Condition
from inpo.common.denoiser import Denoiser, compute_dtype
from inpo.common.inversion import Inverted

SPREAD_RECORDS = 8
"""Records of a shard's images that are evaluated again."""


def moved(
    x: Float[Tensor, "image c h w"], network_dtype: str, generator: torch.Generator
) -> Float[Tensor, "image c h w"]:
    """Every value times a random number that is 1 to a quarter of a rounding of the dtype, or to one of float32's,
    which x itself is in. The generator is a CPU's."""
    size = max(torch.finfo(compute_dtype(network_dtype)).eps / 8, torch.finfo(torch.float32).eps / 2)
    noise = torch.rand(x.shape, generator=generator).to(x.device)
    return x * (1 + size * (2 * noise - 1))


def root_shift(
    error: Float[Tensor, " *record"], reference_error: Float[Tensor, " *record"]
) -> Float[Tensor, " *record"]:
    """How far the root of each error is from the reference's."""
    return error.sqrt() - reference_error.sqrt()


def root_mean_square(values: Float[Tensor, " *record"]) -> float:
    """Of all values; NaN if there are none."""
    return float(values.double().square().mean().sqrt())


@torch.inference_mode()
def measure_spread(
    denoiser: Denoiser,
    inverted: Inverted,
    images: Sequence[int],
    *,
    group_of: Sequence[int],
    caption: Condition,
    images_per_batch: int,
) -> float | None:
    """The spread of the network that has just inverted some images, measured on a few of those that are kept.

    Args:
        images: rows of the kept ones.
        group_of: the group of each image that was inverted.
        caption: the training condition of each.

    None if the network gives a number that is not finite where its input is moved.
    """
    kept, groups = torch.tensor(images), torch.tensor(group_of)
    image = kept[torch.linspace(0, len(kept) - 1, SPREAD_RECORDS).round().long()]
    record = torch.arange(SPREAD_RECORDS) % inverted.timestep.shape[1]
    x_t = moved(inverted.x_t[image, record].float(), denoiser.network_dtype, torch.Generator().manual_seed(0))
    timestep, target = inverted.timestep[groups[image], record].long(), inverted.target[image, record].float()
    errors = []
    for chosen in torch.arange(SPREAD_RECORDS).split(images_per_batch):
        told = caption.rows(image[chosen]).to(denoiser.device)
        predicted = denoiser(x_t[chosen].to(denoiser.device), timestep[chosen].to(denoiser.device), told)
        errors.append(mean_square(target[chosen] - predicted.cpu()))
    spread = root_mean_square(root_shift(torch.cat(errors), inverted.reference_error[image, record]))
    return spread if math.isfinite(spread) else None
