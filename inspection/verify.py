"""`inpo inspect verify`: every byte of every committed shard, and everything that follows from it."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from inpo.common.cache import Cache, Commit, open_cache
from inpo.common.cache.labels import label_sets, read_shard_labels
from inpo.common.errors import CacheCorrupt, CacheError, CacheMismatch, InpoError
from inpo.common.models import Model
from inpo.inspection.checks import CHECKS, Finding, ShardResult, check_shard
from inpo.inspection.pair_table import read_pair_table
from inpo.inspection.reinvert import choose_pairs, load_denoiser, reinvert

PREDICTION_TOLERANCE = {"float32": 2e-3, "float16": 4e-3, "bfloat16": 2e-2}
"""How far one prediction of the same weights may be off on another device or in another batch, by network dtype:
relative RMS (float32 covers the GPU's TF32). The reference error may move by what such a prediction does to it."""
PATH_TOLERANCE = {"float32": 2e-2, "float16": 5e-2, "bfloat16": 2e-1}
"""The same for a whole path (x_t and target): each step feeds on the one before, and differences grow."""


@dataclass(kw_only=True)
class Verification:
    """What was checked and what was found."""

    location: str
    num_shards: int
    num_pairs: int
    bytes_read: int
    num_checked: dict[str, int]
    """Pairs by check; a check that this cache does not allow is missing."""
    findings: list[Finding]
    impossible: dict[str, str]
    """Checks that this cache, or this call, does not allow, and why."""
    reinverted: dict[str, float] = field(default_factory=dict)
    """Largest relative change of x_t, target and reference_error, where --model was given."""

    @property
    def bad_shards(self) -> list[str]:
        return sorted({finding.shard for finding in self.findings})


def verify(
    location: str, *, model: Model | None = None, num_sampled: int = 16, on_shard: Callable[[], None] = lambda: None
) -> Verification:
    """Check a whole cache. With `model`, the one it was made with, `num_sampled` pairs are inverted again.

    Raises CacheMissing if there is no cache, CacheSchemaError if its manifest cannot be read, CacheMismatch if
    `model` is another one.
    """
    unreadable: dict[str, CacheError] = {}
    cache = open_cache(location, allow_empty=True, damaged=unreadable)
    if model is not None:
        _check_model(cache, model)
    findings = [
        Finding(shard=name, check="commit", detail=f"{error.what} Got: {error.got}")
        for name, error in sorted(unreadable.items())
    ]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:

        def checked(result: ShardResult) -> ShardResult:
            on_shard()
            return result

        results = [checked(result) for result in pool.map(check_shard, list(cache))]
    num_checked = {"commit": cache.num_pairs}
    for result in results:
        findings += result.findings
        for name, count in result.num_checked.items():
            num_checked[name] = num_checked.get(name, 0) + count
    findings += _duplicates(results)
    labelled, label_findings = _check_labels(cache)
    findings += label_findings
    if labelled:
        num_checked["labels"] = labelled
    verification = Verification(
        location=cache.location,
        num_shards=len(cache.commits) + len(unreadable),
        num_pairs=cache.num_pairs,
        bytes_read=sum(result.bytes_read for result in results),
        num_checked={name: num_checked[name] for name in CHECKS if name in num_checked},
        findings=findings,
        impossible=_impossible(cache, has_model=model is not None),
    )
    if model is not None:
        _reinvert(cache, model, num_sampled, verification)
    return verification


def _impossible(cache: Cache, *, has_model: bool) -> dict[str, str]:
    """{check: why it cannot be made on a healthy cache with this manifest}."""
    manifest = cache.manifest
    reasons = {}
    if manifest.profile == "lean":
        reasons |= {"x_t": "not stored (lean): readers derive it", "x0_t": "not stored (lean)"}
    if "eps_ref" not in manifest.extra and (manifest.profile == "lean" or not cache.delta_is_reference):
        reasons["reference_error"] = "needs delta as the reference's prediction, or --extra eps_ref"
    if not label_sets(cache.store):
        reasons["labels"] = "this cache has no label set"
    if not has_model:
        reasons |= {"reference": "only with --model", "re-inversion": "only with --model"}
    return reasons


def _duplicates(results: list[ShardResult]) -> list[Finding]:
    """Pair ids that stand in two shards: the source repeats them, so making a shard again changes nothing."""
    seen: dict[str, str] = {}
    findings = []
    for result in results:
        repeated = [name for name in dict.fromkeys(result.pair_ids) if name in seen]
        if repeated:
            others = ", ".join(sorted({seen[name] for name in repeated})[:3])
            findings.append(
                Finding(
                    shard=result.shard,
                    check="rows",
                    remake=False,
                    detail=f"{len(repeated)} pair ids, {repeated[0]} first, stand in {others} too: the source has them "
                    "twice",
                )
            )
        seen.update(dict.fromkeys(result.pair_ids, result.shard))
    return findings


def _check_labels(cache: Cache) -> tuple[int, list[Finding]]:
    """(labels looked at, findings) over every label set. Making a shard again cures no label, so none is `remake`."""
    num_checked, findings = 0, []
    for name in label_sets(cache.store):
        for shard in cache:
            try:
                labels = read_shard_labels(cache.store, name, shard.name)
                if labels is None:  # a set may be begun and not finished
                    continue
                num_checked += len(labels.pairs)
                if labels.attempt == shard.commit.attempt and set(labels.pairs) == set(shard.read("pair_id").tolist()):
                    continue
                detail = "not the labels of the committed pairs; run the same `inpo relabel` again"
            except CacheCorrupt as error:
                detail = f"{error.what} In {error.where}; {error.fix}"
            except CacheError as error:
                detail = f"{error.what} Got {error.got}, in {error.where}; {error.fix}"
            findings.append(Finding(shard=shard.name, check="labels", detail=f"set {name}: {detail}", remake=False))
    return num_checked, findings


def _check_model(cache: Cache, model: Model) -> None:
    """Only the parts that invert must be the cache's."""
    for part in ("network", "scheduler"):
        expected, got = cache.manifest.fingerprints.get(part), model.fingerprints.get(part)
        if expected != got:
            raise CacheMismatch(
                f"The model's {part} is not the one that this cache was made with.",
                where=cache.location,
                expected=f"{part} fingerprint {expected}",
                got=f"{got} ({model.name})",
                fix="pass the model that the cache was precomputed with; `inpo inspect drift` compares with another",
            )


def _reinvert(cache: Cache, model: Model, num_sampled: int, verification: Verification) -> None:
    """Invert a sample of the healthy shards' pairs again and compare."""
    table = read_pair_table(cache)
    bad = set(verification.bad_shards)
    healthy = [index for index, name in enumerate(table.shard_names) if name not in bad]
    chosen = choose_pairs(table, num_sampled, among=np.isin(table.shard, healthy))
    if not len(chosen):
        return
    dtype = cache.manifest.network_dtype
    verification.reinverted = {"x_t": 0.0, "target": 0.0, "reference_error": 0.0}
    for again in reinvert(cache, table, chosen, load_denoiser(cache, model)):
        findings = verification.findings
        if not np.array_equal(again.timestep, again.inverted.timestep.numpy()):
            detail = "other timesteps than seed and pair ids give"
            findings.append(Finding(shard=again.shard, check="re-inversion", detail=detail))
            continue
        for check, name, values, limit in (
            ("reference", "reference_error", again.error_change, again.error_change_limit(PREDICTION_TOLERANCE[dtype])),
            ("re-inversion", "x_t", again.change("x_t"), PATH_TOLERANCE[dtype]),
            ("re-inversion", "target", again.change("target"), PATH_TOLERANCE[dtype]),
        ):
            largest = float(values.max())
            verification.reinverted[name] = max(verification.reinverted[name], largest)
            wrong = ~(values <= limit)
            if wrong.any():
                pair = again.pair_ids[int(np.flatnonzero(wrong.reshape(len(wrong), -1).any(1))[0])]
                change = f"changes by {values[wrong].max():.3g} (relative), more than {dtype} allows"
                detail = f"{name} of pair {pair} {change}"
                findings.append(Finding(shard=again.shard, check=check, detail=detail))
    for check in ("reference", "re-inversion"):
        verification.num_checked[check] = len(chosen)


def quarantine(location: str, verification: Verification) -> list[str]:
    """Move the commits of shards that making again would cure to CACHE/quarantine/. Returns their names.

    Raises CacheCorrupt, and moves nothing, if it is the manifest that was edited: then every commit is right.
    """
    unreadable: dict[str, CacheError] = {}
    cache = open_cache(location, allow_empty=True, damaged=unreadable)
    if not cache.commits and any(_is_whole(cache, name) for name in unreadable):
        raise CacheCorrupt(
            "No commit belongs to this manifest: it is the manifest that was edited or replaced. Nothing was moved.",
            where=cache.store.path("manifest.json"),
            fix="restore manifest.json from a copy",
        )
    names = sorted({finding.shard for finding in verification.findings if finding.remake})
    for name in names:
        cache.store.move(f"commits/{name}.json", f"quarantine/{name}.json")
    return names


def _is_whole(cache: Cache, shard: str) -> bool:
    """True if a refused commit is intact in itself."""
    path = f"commits/{shard}.json"
    try:
        Commit.from_json(cache.store.get(path) or b"", path)
    except InpoError:
        return False
    return True
