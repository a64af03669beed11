"""The zero-step proof: does this cache belong to this model, in this dtype?

At theta = reference E_theta = E_ref, record by record, because the reference error was stored for the very point that
the trainer sees. So before the first update the trainer computes E_theta on a few records and compares. Stated on the
logit: at beta 2000 an image's error moves the preference logit by 1000 * |E_theta - E_ref|.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from inpo.common.cache import Cache
from inpo.common.cache.derive import mean_square
from inpo.common.cache.identity import check_components
from inpo.common.choices import Space
from inpo.common.denoiser import Denoiser
from inpo.common.errors import CacheMismatch
from inpo.common.models import Model
from inpo.train.index import Index
from inpo.train.records import Batch, LoadedShard, Needs, RecordPlace, gather

PROOF_BETA = 2000.0
TOLERANCE = {"float32": 0.02, "bfloat16": 0.2, "float16": 0.1}
"""Largest error of a record's logit at beta 2000 if cache and run share a dtype; other kernels and batch sizes round
differently. If they do not share it, float32's tolerance counts: such a run is off by 0.1 to 0.6 as a rule."""
_RECORDS = 16
"""Looked at in one call, and at least."""
_SHARDS = 64
"""Most shards that are looked at: one call of the network for 16 of them."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What the proof found: the largest error of a logit at beta 2000, and both mean errors."""

    logit_error: float
    tolerance: float
    error: float
    reference_error: float
    num_records: int

    @property
    def holds(self) -> bool:
        # NaN fails too.
        return self.logit_error <= self.tolerance


def check_fingerprints(cache: Cache, model: Model) -> None:
    """Raise CacheMismatch unless this model made the cache, by the content of every component: what is trained here is
    written beside the model's VAE and text encoders."""
    check_components(
        cache,
        model.fingerprints,
        model=model.name,
        fix="train with the model (and --variant, --vae) that precompute used; to start from other weights on purpose, "
        "pass the reference as --model and the start as --init-from",
    )


def run_proof(denoiser: Denoiser, index: Index) -> Proof:
    """Compare E_theta with the stored E_ref, record by record, on a sample from the whole index.

    Up to 64 shards give a record at least; of more, 64 that lie evenly among them. The network must be in eval mode
    with its initial weights.
    """
    errors, stored = [], []
    with torch.no_grad():
        for batch in _sample(index):
            errors.append(record_errors(denoiser, batch.to(denoiser.device)).cpu())
            stored.append(batch.by_side(batch.reference_error))
    error, reference_error = torch.cat(errors), torch.cat(stored)
    # Side by side: their difference, which the logit is made of, would hide an error that both share.
    logit_error = 0.5 * PROOF_BETA * (error - reference_error).abs().max()
    cache_dtype = index.training[0].shard.cache.manifest.network_dtype
    return Proof(
        logit_error=float(logit_error),
        tolerance=TOLERANCE[denoiser.network_dtype if denoiser.network_dtype == cache_dtype else "float32"],
        error=float(error.mean()),
        reference_error=float(reference_error.mean()),
        num_records=len(error),
    )


def refuse(proof: Proof, cache: Cache, denoiser: Denoiser) -> CacheMismatch:
    """The error for a proof that does not hold."""
    return CacheMismatch(
        "Zero-step proof failed: before any update the model does not reproduce the cache's reference errors.",
        where=cache.location,
        expected=f"mean E_ref {proof.reference_error:.6g}; logit off by at most {proof.tolerance} at beta 2000",
        got=f"mean E_theta {proof.error:.6g}; logit off by {proof.logit_error:.4g} on {proof.num_records} records",
        fix=f"likely reasons: another dtype (cache {cache.manifest.network_dtype}, here {denoiser.network_dtype}), "
        "other weights or variant, other library versions "
        f"({', '.join(f'{name} {value}' for name, value in cache.manifest.versions.items())} made the cache), "
        "or damage: run `inpo inspect verify`",
    )


def record_errors(denoiser: Denoiser, batch: Batch, space: Space | None = None) -> Float[Tensor, "record side"]:
    """E = MSE(aim - prediction at (x_t, t, c)) of both sides of every record, in one network call for all images.

    `space`: what the aim is of; None: what the levels' targets are of.
    """
    predicted = denoiser(batch.x_t.float(), batch.timestep, batch.condition, space)
    return batch.by_side(mean_square(batch.aim.float() - predicted))


def _sample(index: Index) -> Iterator[Batch]:
    """A bounded number of records, spread over the shards and over each shard's records, in batches."""
    trained = {id(each.shard) for each in index.training}
    shards = [*index.training, *(each for each in index.held_out if id(each.shard) not in trained)]
    chosen = np.unique(np.linspace(0, len(shards) - 1, min(len(shards), _SHARDS)).round().astype(np.int64))
    ends = np.linspace(0, max(_RECORDS, len(chosen)), len(chosen) + 1).round().astype(np.int64)
    places: list[RecordPlace] = []
    for turn, number in enumerate(chosen.tolist()):
        shard = shards[number]
        of_pair = shard.shard.cache.manifest.timesteps_per_pair
        records = np.unique(np.linspace(0, shard.num_records - 1, ends[turn + 1] - ends[turn]).astype(np.int64))
        pairs = records // of_pair
        # A stride through the records would meet few of a pair's; walk through them instead.
        step = (ends[turn] + np.arange(len(records))) % of_pair
        loaded = LoadedShard(shard, pairs, step, Needs())
        places += [loaded.record(*each) for each in zip(pairs.tolist(), step.tolist(), strict=True)]
    for start in range(0, len(places), _RECORDS):
        yield gather(places[start : start + _RECORDS])
