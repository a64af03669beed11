"""Continuous batching: many walks through one network, each at its own point.

A walk that ends makes room for the next one at once, so that early stopping never leaves the device idle and the batch
stays full until the last images of a shard.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

from inpo.common.cache.schema import InverterIdentity
from inpo.common.inversion.batch import ImageBatch
from inpo.common.inversion.inverters import Call
from inpo.common.inversion.path import Part
from inpo.common.inversion.walk import Calls, walk
from inpo.common.levels import Levels
from inpo.common.seeding import normal


@dataclass(kw_only=True)
class _Walking:
    part: Part
    calls: Calls
    call: Call
    """What is to be done next."""


def run_walks(
    parts: Sequence[Part],
    batch: ImageBatch,
    *,
    identity: InverterIdentity,
    levels: Levels,
    seed: int,
    images_per_batch: int,
    own_noise: Float32[Tensor, "image c h w"] | None = None,
) -> None:
    """Walk every part to its end, at most `images_per_batch` images at a time, one part at least. `own_noise`: what
    noised points of each image take, in place of a noise that a group shares."""
    latent_shape = batch.latent_shape
    no_noise = torch.zeros(latent_shape)

    def noise(each: _Walking) -> list[Float32[Tensor, "c h w"]]:
        if each.call.is_noised and own_noise is not None:
            return [own_noise[image] for image in each.part.images]
        shared = no_noise
        if each.call.is_noised:
            shared = normal(latent_shape, seed, each.part.group_id, "noise", each.call.timestep)
        return [shared] * len(each.part.images)

    waiting = list(reversed(parts))
    longest = max((len(part.images) for part in parts), default=0)
    under_way: list[_Walking] = []
    while True:
        while waiting and (
            not under_way or sum(len(each.part.images) for each in under_way) + longest <= images_per_batch
        ):
            part = waiting.pop()
            calls = walk(part.path, identity, levels, back=part.back)
            under_way.append(_Walking(part=part, calls=calls, call=next(calls)))
        if not under_way:
            return
        batch.seat([image for each in under_way for image in each.part.images])
        residual = batch.call(
            [each.call for each in under_way for _ in each.part.images],
            [drawn for each in under_way for drawn in noise(each)],
        )
        still: list[_Walking] = []
        ended: list[Part] = []
        for each in under_way:
            # A residual that is NaN settles nothing.
            settled = all(residual.get(image, 0.0) <= (identity.tolerance or 0.0) for image in each.part.images)
            try:
                each.call = each.calls.send(settled)
                still.append(each)
            except StopIteration:
                ended.append(each.part)
        batch.end_round_trips([image for part in ended if part.back for image in part.images])
        under_way = still
