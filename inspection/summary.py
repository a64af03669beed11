"""`inpo inspect summary`: a cache in figures, from its documents and small arrays; no latent is read."""

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from inpo.common.cache import Cache, open_cache
from inpo.common.cache.labels import label_sets
from inpo.common.errors import InpoError
from inpo.inspection.leftovers import Leftover, find_leftovers
from inpo.inspection.pair_table import PairTable, read_pair_table

_NUM_BINS = 10


@dataclass(frozen=True, kw_only=True)
class TimestepBin:
    """Records with low <= timestep < high. Errors are means; None in an empty bin."""

    low: int
    high: int
    num_records: int
    reference_error_win: float | None
    reference_error_lose: float | None


@dataclass(frozen=True, kw_only=True)
class InversionError:
    """Relative RMS between x0 and where DDIM lands from the last x_t, over the images where it was measured."""

    num_measured: int
    median: float | None
    p95: float | None
    largest: float | None
    largest_pair: str | None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Everything `summary` shows. Plain values: `asdict` gives the JSON document."""

    location: str
    identity: dict[str, Any]
    versions: dict[str, str]
    num_shards: int
    num_empty_shards: int
    """Committed, but no pair survived."""
    num_pairs: int
    num_groups: int
    num_images: int
    num_records: int
    """A pair at a timestep."""
    num_texts: int
    """Text shards."""
    num_prompts: int
    """Distinct captions of the readable pairs."""
    num_soft_labels: int
    num_captions_dropped: int
    label_sets: list[str]
    num_pending: int
    """Attempts younger than an hour without a commit: a writer may be at work."""
    pending_bytes: int
    num_orphaned: int
    """Older attempts that no commit names."""
    orphaned_bytes: int
    num_quarantined: int
    skipped: dict[str, int]
    counts: dict[str, int]
    seconds: dict[str, float]
    array_bytes: dict[str, int]
    """Arrays of texts begin with texts/."""
    total_bytes: int
    text_bytes: int
    """Of them those of texts."""
    timesteps: list[TimestepBin]
    inversion_error: InversionError
    spread: float | None
    """How far rounding moves the root of a reference error: root mean square over the shards; None: not measured."""
    num_nan: dict[str, int]
    """Not-finite values by small array; inversion_error's NaN means not measured and is not counted."""
    first_commit: str | None
    last_commit: str | None
    unreadable: dict[str, str]
    """What is wrong, by shard; their pairs are in num_pairs but in no statistic."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(location: str, on_shard: Callable[[], None] = lambda: None) -> Summary:
    """Summarise a cache in whatever state it is: empty, being written, with unreadable shards.

    Raises CacheMissing if there is none, CacheSchemaError if its manifest cannot be read.
    """
    bad: dict[str, Any] = {}
    cache = open_cache(location, allow_empty=True, damaged=bad)
    unreadable: dict[str, InpoError] = dict(bad)
    table = read_pair_table(cache, unreadable, on_shard)
    return summary_of(cache, table, find_leftovers(cache.store))


def summary_of(cache: Cache, table: PairTable, leftovers: list[Leftover]) -> Summary:
    """The figures of an opened cache."""
    pending = [leftover for leftover in leftovers if leftover.is_young()]
    orphaned = [leftover for leftover in leftovers if not leftover.is_young()]
    commits, texts = cache.commits.values(), [shard.commit for shard in cache.texts]
    skipped, counts, seconds, array_bytes = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for commit in commits:
        skipped.update(commit.skipped)
        counts.update(commit.counts)
        for name, value in commit.seconds.items():
            seconds[name] += value  # type: ignore[assignment]
        for path, size in commit.files.items():
            array_bytes[_array_of(path)] += size
    for text in texts:
        for path, size in text.files.items():
            array_bytes[f"texts/{_array_of(path)}"] += size
        seconds["texts"] += sum(text.seconds.values())  # type: ignore[assignment]
    spreads = [commit.spread for commit in commits if commit.spread is not None]
    created = sorted(commit.created for commit in [*commits, *texts])
    return Summary(
        location=cache.location,
        identity=cache.manifest.identity(),
        versions=dict(cache.manifest.versions),
        num_shards=len(cache.commits),
        num_empty_shards=sum(commit.num_pairs == 0 for commit in commits),
        num_pairs=cache.num_pairs,
        num_groups=sum(commit.num_groups for commit in commits),
        num_images=sum(commit.num_images for commit in commits),
        num_records=cache.num_records,
        num_texts=len(texts),
        num_prompts=len(set(table.prompt.tolist())),
        num_soft_labels=int(((table.label != 0.0) & (table.label != 1.0)).sum()),
        num_captions_dropped=int(table.caption_dropped.sum()),
        label_sets=label_sets(cache.store),
        num_pending=len(pending),
        pending_bytes=sum(leftover.num_bytes for leftover in pending),
        num_orphaned=len(orphaned),
        orphaned_bytes=sum(leftover.num_bytes for leftover in orphaned),
        num_quarantined=sum(name.endswith(".json") for name in cache.store.listing("quarantine")),
        skipped=dict(skipped.most_common()),
        counts=dict(counts.most_common()),
        seconds={name: round(float(value), 3) for name, value in sorted(seconds.items())},
        array_bytes=dict(array_bytes.most_common()),
        total_bytes=sum(array_bytes.values()),
        text_bytes=sum(sum(text.files.values()) for text in texts),
        timesteps=timestep_bins(table, cache.manifest.num_train_timesteps),
        inversion_error=_inversion_error(table),
        spread=math.sqrt(statistics.fmean(each**2 for each in spreads)) if spreads else None,
        num_nan={
            "reference_error": int((~np.isfinite(table.reference_error[table.first_seen])).sum()),
            "inversion_error": int(np.isinf(table.inversion_error[table.first_seen]).sum()),
            "label": int((~np.isfinite(table.label)).sum()),
        },
        first_commit=created[0] if created else None,
        last_commit=created[-1] if created else None,
        unreadable={name: str(error) for name, error in sorted(table.unreadable.items())},
    )


def timestep_ranges(num_train_timesteps: int) -> list[tuple[int, int]]:
    """[low, high) of ten equal bins over the model's table; fewer if it is shorter."""
    edges = np.unique(np.linspace(0, num_train_timesteps, _NUM_BINS + 1).round().astype(int))
    return list(itertools.pairwise(edges.tolist()))


def timestep_bins(table: PairTable, num_train_timesteps: int) -> list[TimestepBin]:
    """The records and their mean errors in each of the bins."""
    bins = []
    errors = np.moveaxis(table.reference_error, 1, 2)
    for low, high in timestep_ranges(num_train_timesteps):
        inside = errors[(table.timestep >= low) & (table.timestep < high)].astype(np.float64)
        win, lose = inside.mean(0).tolist() if len(inside) else (None, None)
        bins.append(
            TimestepBin(
                low=low,
                high=high,
                num_records=len(inside),
                reference_error_win=_finite(win),
                reference_error_lose=_finite(lose),
            )
        )
    return bins


def _inversion_error(table: PairTable) -> InversionError:
    measured = table.inversion_error[table.measured].astype(np.float64)
    if not len(measured):
        return InversionError(num_measured=0, median=None, p95=None, largest=None, largest_pair=None)
    worst = table.worst_inversion_error
    return InversionError(
        num_measured=len(measured),
        median=float(np.median(measured)),
        p95=float(np.quantile(measured, 0.95)),
        largest=float(measured.max()),
        largest_pair=str(table.pair_id[np.nanargmax(worst)]) if np.isfinite(worst).any() else None,
    )


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and np.isfinite(value) else None


def _array_of(path: str) -> str:
    """x_t/c/0/0 and x_t/zarr.json belong to x_t; pair/id/c/0 to pair/id."""
    if path.endswith("zarr.json"):
        return path.removesuffix("zarr.json").rstrip("/") or "(group)"
    return path.split("/c/")[0].removesuffix("/c")
