"""The zero-step proof: do the errors of this cache belong to this network?

At theta = reference E_theta = E_ref, record by record, because the reference error was stored for the very point that
the trainer sees. So before the first update the trainer computes E_theta on a few records and compares. The two differ
by how their kernels round, which is measured: the cache says how far rounding moved its errors, and the trainer
measures the same on its own (common/spread.py). What they do not explain is refused.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from inpo.common.cache import Cache
from inpo.common.cache.derive import mean_square
from inpo.common.cache.identity import check_components
from inpo.common.choices import Space
from inpo.common.denoiser import Denoiser
from inpo.common.errors import CacheMismatch, command
from inpo.common.models import Model
from inpo.common.spread import moved, root_mean_square, root_shift
from inpo.train.index import Index
from inpo.train.records import Batch, LoadedRecord, LoadedShard, Needs, gather
from inpo.train.selection import IndexedShard

_RECORDS = 32
"""Records that are looked at, at least, if there are so many."""
_SHARDS = 64
"""Most shards that are looked at."""
_MOVES = 32
"""Errors that are computed again, at least, to measure this run's spread."""
_NEGLIGIBLE = 1e-6
"""Of an error: a thousandth of a logit at beta 2000. In float32 other kernels may differ by more than rounding does."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What the proof found. Shift, spreads and limit are of the root of an error, as in common/spread.py."""

    shift: float
    """How far E_theta is from E_ref, where that is furthest beyond its limit."""
    limit: float
    """What the spreads explain there."""
    what: str
    """What is there, in words."""
    spread: float
    """Of this run."""
    cache_spread: float | None
    """Of the cache; None: not measured."""
    error: float
    reference_error: float
    slope: float
    """Root mean square of w sqrt(E_ref), w the weight of an error in the loss (train/loss_space.py)."""
    num_records: int

    @property
    def holds(self) -> bool:
        # NaN fails too.
        return self.shift <= self.limit

    def on_logit(self, shift: float, beta: float) -> str:
        """How far a shift of an image's root error moves the preference logit: (beta / 2) 2 w sqrt(E) shift."""
        return f"{beta * self.slope * shift:.2g}"

    def spreads(self, beta: float) -> str:
        """How far rounding moves the logit, here and in the cache."""
        cache = "not measured" if self.cache_spread is None else self.on_logit(self.cache_spread, beta)
        return f"rounding moves it by {self.on_logit(self.spread, beta)} in this run, in the cache's by {cache}"


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


def check_dtype(cache: Cache, dtype: str | None) -> None:
    """Raise CacheMismatch unless the network is to run in the cache's dtype: its errors are of no other network."""
    made = cache.manifest.network_dtype
    if dtype not in (None, made):
        raise CacheMismatch(
            "The cache's reference errors were made in another dtype than this run's.",
            where=cache.location,
            expected=f"network_dtype {made} (in the cache)",
            got=f"--dtype {dtype}",
            fix=f"leave --dtype out: a run takes the cache's; or `{command('precompute', '--dtype', dtype)}` into a "
            "cache of its own",
        )


def run_proof(
    denoiser: Denoiser, index: Index, *, batch_size: int, weights: Float[Tensor, " timestep"] | None = None
) -> Proof:
    """Compare E_theta with the stored E_ref, record by record, on a sample from the whole index.

    Up to 64 shards give a record at least; of more, 64 that lie evenly among them. The network must be in eval mode
    with its initial weights. `batch_size` records go through it together, as in training. `weights`: of errors in the
    loss, by timestep; they scale what is said of the logit, not the verdict.
    """
    sample = _sample(index)
    records = [record for _, of_shard in sample for record in of_shard]
    error, stored, timestep = _errors(denoiser, records, batch_size)
    weight = 1.0 if weights is None else weights.cpu()[timestep, None]
    shift = root_shift(error, stored)
    spread = _measure_spread(denoiser, records, batch_size, error)
    known = [found for shard, _ in sample if (found := shard.shard.commit.spread) is not None]
    cache_spread = root_mean_square(torch.tensor(known, dtype=torch.float64)) if known else None
    mean = float(stored.mean())
    scale = spread if cache_spread is None else math.hypot(spread, cache_spread) / math.sqrt(2)
    findings = [_judge(shift, scale, "of all records")]
    for (shard, of_shard), values in zip(sample, shift.split([len(of_shard) for _, of_shard in sample]), strict=True):
        findings.append(_judge(values, scale, f"of {len(of_shard)} records of shard {shard.shard.name}"))
    negligible = math.sqrt(mean + _NEGLIGIBLE) - math.sqrt(mean)
    found, limit, what = max(findings, key=lambda each: each[0] - each[1] if math.isfinite(each[0]) else math.inf)
    return Proof(
        shift=found,
        limit=max(limit, negligible),
        what=what,
        spread=spread,
        cache_spread=cache_spread,
        error=float(error.mean()),
        reference_error=mean,
        slope=math.sqrt(float((weight**2 * stored).mean())),
        num_records=len(error),
    )


def refuse(proof: Proof, cache: Cache, *, beta: float) -> CacheMismatch:
    """The error for a proof that does not hold."""
    return CacheMismatch(
        "Zero-step proof failed: before any update the model does not reproduce the cache's reference errors.",
        where=cache.location,
        expected=f"mean E_ref {proof.reference_error:.6g}; the logit at beta {beta:g} off by at most "
        f"{proof.on_logit(proof.limit, beta)}: {proof.spreads(beta)}",
        got=f"mean E_theta {proof.error:.6g}; the logit off by {proof.on_logit(proof.shift, beta)}, {proof.what}",
        fix="likely reasons: other weights or variant, other library versions "
        f"({', '.join(f'{name} {value}' for name, value in cache.manifest.versions.items())} made the cache), "
        "or damage: run `inpo inspect verify`",
    )


def residuals(
    denoiser: Denoiser, batch: Batch, space: Space | None = None, *, x_t: Float[Tensor, "slot c h w"] | None = None
) -> Float[Tensor, "slot c h w"]:
    """target - prediction at (x_t, t, c), in one network call for all images.

    `space`: what the target is of; None: what the levels' targets are of. `x_t`: points of one's own.
    """
    point = batch.x_t.float() if x_t is None else x_t
    return batch.target.float() - denoiser(point, batch.timestep, batch.condition, space)


def record_errors(denoiser: Denoiser, batch: Batch, space: Space | None = None) -> Float[Tensor, "record side"]:
    """E = mean square of the residuals, of both sides of every record."""
    return batch.by_side(mean_square(residuals(denoiser, batch, space)))


def _judge(shift: Float[Tensor, "record side"], scale: float, where: str) -> tuple[float, float, str]:
    """(shift, limit, what) of some records: of their mean or their root mean square, whichever is further off.

    Two networks that round like those of the spreads are `scale` apart, up and down alike, so that the mean is nearer
    to 0. The smaller the sample, the wider both scatter. Half a scale of the mean is for kernels that round otherwise.
    """
    scatter = 4 / math.sqrt(shift.numel())
    noise, mean = root_mean_square(shift), abs(float(shift.double().mean()))
    all_limit, mean_limit = (1 + scatter) * scale, (0.5 + scatter) * scale
    if mean - mean_limit > noise - all_limit:
        return mean, mean_limit, f"mean {where}"
    return noise, all_limit, f"root mean square {where}"


@torch.no_grad()
def _errors(
    denoiser: Denoiser, records: Sequence[LoadedRecord], batch_size: int, generator: torch.Generator | None = None
) -> tuple[Float[Tensor, "record side"], Float[Tensor, "record side"], Int[Tensor, " record"]]:
    """(E_theta, E_ref, timestep) on the CPU; with a generator E_theta at points that are moved by a rounding."""
    errors, stored, timesteps = [], [], []
    for start in range(0, len(records), batch_size):
        batch = gather(records[start : start + batch_size])
        there = batch.to(denoiser.device)
        x_t = there.x_t.float()
        x_t = x_t if generator is None else moved(x_t, denoiser.network_dtype, generator)
        errors.append(batch.by_side(mean_square(residuals(denoiser, there, x_t=x_t)).cpu()))
        stored.append(batch.by_side(batch.reference_error))
        timesteps.append(batch.record_timestep)
    return torch.cat(errors), torch.cat(stored), torch.cat(timesteps)


def _measure_spread(
    denoiser: Denoiser, records: Sequence[LoadedRecord], batch_size: int, error: Float[Tensor, "record side"]
) -> float:
    """This run's spread: the records again, in batches of another size, among other neighbours.

    Of twice the size, which holds less than a step that keeps gradients: by the count of common/memory.py some six
    tenths of it even where layers are computed again. Records that were one batch are two.
    """
    num_records = len(records)
    other_size = 2 * batch_size if batch_size < num_records else math.ceil(num_records / 2)
    generator = torch.Generator().manual_seed(0)
    shifts = []
    for _ in range(math.ceil(_MOVES / error.numel())):
        again, _, _ = _errors(denoiser, records[::-1], other_size, generator)
        shifts.append(root_shift(again.flip(0), error))
    return root_mean_square(torch.cat(shifts))


def _sample(index: Index) -> list[tuple[IndexedShard, list[LoadedRecord]]]:
    """A bounded number of records, spread over the shards and over each shard's records."""
    trained = {id(each.shard) for each in index.training}
    shards = [*index.training, *(each for each in index.held_out if id(each.shard) not in trained)]
    chosen = np.unique(np.linspace(0, len(shards) - 1, min(len(shards), _SHARDS)).round().astype(np.int64))
    sizes = [len(shards[number].rows) * shards[number].num_kept for number in chosen]
    shares = _shares(sizes, max(_RECORDS, len(chosen)))
    found = []
    for turn, number in enumerate(chosen.tolist()):
        shard = shards[number]
        evenly = np.linspace(0, sizes[turn] - 1, shares[turn]).astype(np.int64)
        pairs = evenly // shard.num_kept
        # A stride through the records would meet few of a pair's; walk through them instead.
        records = (sum(shares[:turn]) + np.arange(len(evenly))) % shard.num_kept
        loaded = LoadedShard(shard.first_two, pairs, records, Needs())
        found.append((shard, [loaded.record(*each) for each in zip(pairs.tolist(), records.tolist(), strict=True)]))
    return found


def _shares(sizes: Sequence[int], wanted: int) -> list[int]:
    """`wanted` records as so many of each shard: alike, and where a shard has fewer, more of the others."""
    shares = [0] * len(sizes)
    for done, number in enumerate(sorted(range(len(sizes)), key=lambda each: sizes[each])):
        shares[number] = min(sizes[number], (wanted - sum(shares)) // (len(sizes) - done))
    return shares
