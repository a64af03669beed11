"""`inpo inspect verify`: every byte of every committed shard, and everything that follows from it."""

import itertools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from inpo.common.cache import Cache, Commit, TextCommit, open_cache
from inpo.common.cache.commits import AnyCommit
from inpo.common.cache.identity import check_components
from inpo.common.cache.labels import label_sets
from inpo.common.cache.schema import EMPTY_PROMPT, MANIFEST
from inpo.common.cache.store import CacheStore, digest
from inpo.common.denoiser import compute_name
from inpo.common.errors import CacheCorrupt, CacheError, InpoError, StorageError
from inpo.common.models import Model
from inpo.inspection.checks import CHECKS, TEXTS, Finding, ShardResult, check_shard, check_texts
from inpo.inspection.documents import check_configurations, check_labels, check_skipped, labels_without_commit
from inpo.inspection.leftovers import committed_attempt
from inpo.inspection.notes import few, notes_of
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
    num_texts: int
    """Text shards."""
    bytes_read: int
    num_checked: dict[str, int]
    """How much was looked at, by check; a check that this cache does not allow is missing."""
    findings: list[Finding]
    impossible: dict[str, str]
    """Checks that this cache, or this call, does not allow, and why."""
    attempts: dict[str, str | None]
    """The committed attempt of each shard, images and texts, as it was when the check began."""
    not_checked: dict[str, StorageError] = field(default_factory=dict)
    """Shards of which a disk or a store refused a part: they may be sound."""
    notes: list[str] = field(default_factory=list)
    """What is not a fault in itself, and what cannot be known from what lies here."""
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
    attempts: dict[str, str | None] = {name: commit.attempt for name, commit in cache.commits.items()}
    attempts |= {f"{TEXTS}{shard.name}": shard.commit.attempt for shard in cache.texts}
    attempts |= {name: _attempt_now(cache.store, name) for name in unreadable}
    if model is not None:
        check_components(
            cache,
            model.fingerprints,
            model=model.name,
            fix="pass the model (and --variant, --vae) that the cache was precomputed with; `inpo inspect drift` "
            "compares with another",
        )
    findings = [
        Finding(shard=name, check="commit", detail=f"{error.what} Got: {error.got}")
        for name, error in sorted(unreadable.items())
    ]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:

        def checked(result: ShardResult) -> ShardResult:
            on_shard()
            return result

        text_results = [
            checked(result) for result in pool.map(partial(check_texts, manifest=cache.manifest), list(cache.texts))
        ]
        results = [checked(result) for result in pool.map(check_shard, list(cache))]
    num_checked = {"commit": len(cache.commits) + len(text_results)}
    for result in [*text_results, *results]:
        findings += result.findings
        for name, count in result.num_checked.items():
            num_checked[name] = num_checked.get(name, 0) + count
    findings += _duplicates(results, cache)
    findings += _texts_lost(cache, unreadable) + _texts_unlike(cache, text_results)
    files = cache.store.listing("")
    not_checked = {result.shard: result.refusal for result in (*text_results, *results) if result.refusal is not None}
    num_checked["skipped"], skipped_findings = check_skipped(cache, not_checked)
    num_configurations, configuration_findings = check_configurations(cache, files)
    labelled, label_findings = check_labels(cache, not_checked)
    findings += skipped_findings + configuration_findings + label_findings
    findings += labels_without_commit(cache, files, unreadable)
    for name, count in (("labels", labelled), ("configurations", num_configurations)):
        if count:
            num_checked[name] = count
    verification = Verification(
        location=cache.location,
        num_shards=len(cache.commits) + sum(not name.startswith(TEXTS) for name in unreadable),
        num_pairs=cache.num_pairs,
        num_texts=len(text_results) + sum(name.startswith(TEXTS) for name in unreadable),
        bytes_read=sum(result.bytes_read for result in [*text_results, *results]),
        num_checked={name: num_checked[name] for name in CHECKS if name in num_checked},
        findings=findings,
        impossible=_impossible(cache, files, has_model=model is not None),
        attempts=attempts,
        not_checked=not_checked,
        notes=notes_of(cache, files, unreadable),
    )
    if model is not None:
        _reinvert(cache, model, num_sampled, verification)
    return verification


def _impossible(cache: Cache, files: Mapping[str, int], *, has_model: bool) -> dict[str, str]:
    """{check: why it cannot be made on a healthy cache with this manifest}."""
    manifest = cache.manifest
    reasons: dict[str, str] = {}
    if manifest.profile != "full":
        why = f"not stored ({manifest.profile})"
        reasons |= {"x_t": f"{why}: readers derive it", "x0_t": why}
    if "eps_ref" not in manifest.extra and (manifest.profile != "full" or not cache.delta_is_reference):
        reasons["reference_error"] = "needs delta as the reference's prediction, or --extra eps_ref"
    if not label_sets(cache.store):
        reasons["labels"] = "this cache has no label set"
    if not any(name.startswith("configurations/") for name in files):
        reasons["configurations"] = "this cache has none"
    if not has_model:
        reasons |= {"reference": "only with --model", "re-inversion": "only with --model"}
    return reasons


def _duplicates(results: list[ShardResult], cache: Cache) -> list[Finding]:
    """Pair ids that stand in two shards: the source repeats them, so making a shard again changes nothing. Or a file
    had changed between its shards: which of them is to go, nobody can tell from here."""

    def have_changed(a: str, b: str) -> bool:
        one, two = (cache.commits[name].source for name in (a, b))
        return one.input_shard == two.input_shard and one.fingerprint != two.fingerprint

    seen: dict[str, str] = {}
    findings = []
    for result in results:
        repeated = [name for name in dict.fromkeys(result.pair_ids) if name in seen]
        if repeated:
            others = sorted({seen[name] for name in repeated})
            why = "the source has them twice"
            if any(have_changed(result.shard, other) for other in others):
                why = "their file had changed between these shards; move the commits of all its shards aside"
            findings.append(
                Finding(
                    shard=result.shard,
                    check="rows",
                    remake=False,
                    detail=f"{len(repeated)} pair ids, {repeated[0]} first, stand in {few(others)} too: {why}",
                )
            )
        seen.update(dict.fromkeys(result.pair_ids, result.shard))
    return findings


def _texts_lost(cache: Cache, unreadable: Mapping[str, CacheError]) -> list[Finding]:
    """Text shards that committed shards need and that have no commit. There is none to move aside."""
    users: dict[str, list[str]] = {}
    for shard in cache:
        for name in {*shard.commit.texts, EMPTY_PROMPT}:
            users.setdefault(name, []).append(shard.name)
    there = {shard.name for shard in cache.texts}
    return [
        Finding(
            shard=f"{TEXTS}{name}",
            check="texts",
            detail=f"no commit, and {len(names)} shards need it ({few(names)}); the same `inpo precompute` encodes it "
            "again; where it does not, move the commits of those shards aside",
            remake=False,
        )
        for name, names in sorted(users.items())
        if name not in there and f"{TEXTS}{name}" not in unreadable
    ]


def _texts_unlike(cache: Cache, results: list[ShardResult]) -> list[Finding]:
    """Text shards whose conditions no network can take together with the empty prompt's: of another size, but for the
    tokens that are padded."""
    manifest = cache.manifest

    def sizes(result: ShardResult, path: str) -> list[int] | None:
        axes = manifest.text_specs[path].axes[1:]
        found = zip(axes, result.row_shapes.get(path, ()), strict=False)
        return [size for axis, size in found if axis != "token" or not manifest.is_padded] or None

    empty = next((result for result in results if result.shard == f"{TEXTS}{EMPTY_PROMPT}"), None)
    if empty is None:
        return []
    findings = []
    for result in results:
        for path in manifest.text_specs:
            ours, others = sizes(result, path), sizes(empty, path)
            if ours is not None and others is not None and ours != others:
                detail = f"{path} of {ours}, and of {others} for the empty prompt"
                findings.append(Finding(shard=result.shard, check="texts", detail=detail))
    return findings


def _reinvert(cache: Cache, model: Model, num_sampled: int, verification: Verification) -> None:
    """Invert a sample of the healthy shards' pairs again and compare."""
    table = read_pair_table(cache)
    bad = {*verification.bad_shards, *verification.not_checked}
    healthy = [
        index
        for index, name in enumerate(table.shard_names)
        if bad.isdisjoint({name, *(f"{TEXTS}{each}" for each in (*cache.commits[name].texts, EMPTY_PROMPT))})
    ]
    chosen = choose_pairs(table, num_sampled, among=np.isin(table.shard, healthy))
    if not len(chosen):
        return
    dtype = compute_name(cache.manifest.network_dtype)
    verification.reinverted = {"x_t": 0.0, "target": 0.0, "reference_error": 0.0}
    findings, num_checked, unreadable = verification.findings, 0, dict[str, InpoError]()
    for again in reinvert(cache, table, chosen, load_denoiser(cache, model), unreadable=unreadable):
        num_checked += len(again.pair_ids)
        if not np.array_equal(again.timestep, again.timestep_again):
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
    for name, error in sorted(unreadable.items()):  # sound a moment ago: the next verify finds what has changed
        detail = f"{error.what} In: {error.where}"
        findings.append(Finding(shard=name, check="re-inversion", detail=detail, remake=False))
    for check in ("reference", "re-inversion"):
        verification.num_checked[check] = num_checked


def quarantine(location: str, verification: Verification) -> list[str]:
    """Move the commits of shards that making again would cure to CACHE/quarantine/. Returns their names.

    A commit that is not the one checked, that was made under another manifest, or of a shard that could not be checked
    whole, stays. Raises CacheCorrupt, and moves nothing, if it is the manifest that was edited: then every commit is
    right; StorageError if not one file of any shard is there, as where a disk is not mounted.
    """
    unreadable: dict[str, CacheError] = {}
    cache = open_cache(location, allow_empty=True, damaged=unreadable)
    believed = [*cache.commits, *cache.texts]
    if not believed and any(_is_of_another_manifest(cache, name) for name in unreadable):
        raise CacheCorrupt(
            "No commit belongs to this manifest: it is the manifest that was edited or replaced. Nothing was moved.",
            where=cache.store.path("manifest.json"),
            fix="restore manifest.json from a copy",
        )
    for kind, commits in ((Commit, cache.commits), (TextCommit, {each.name: each.commit for each in cache.texts})):
        attempts = {(name, commit.attempt) for name, commit in commits.items() if commit.files}
        if attempts and attempts.isdisjoint(tuple(file.split("/")[:2]) for file in cache.store.listing(kind.arrays)):
            raise StorageError(
                "Not one file of any shard is there. Nothing was moved.",
                where=cache.store.path(kind.arrays),
                expected=f"the files of {len(attempts)} commits",
                got="none of them",
                fix=f"mount the disk or bring it back; if it is lost, move {cache.store.path(kind.folder)} away",
            )
    moved = []
    for name in sorted({each.shard for each in verification.findings if each.remake} - verification.not_checked.keys()):
        attempt = _attempt_now(cache.store, name)
        if attempt is None or attempt != verification.attempts.get(name) or _is_of_another_manifest(cache, name):
            continue
        try:
            cache.store.move(_commit_of(name)[1], f"quarantine/{_free_name(cache.store, name)}.json")
        except StorageError:
            if _attempt_now(cache.store, name) is None:  # another process moved it
                continue
            raise
        moved.append(name)
    return moved


def _attempt_now(store: CacheStore, name: str) -> str | None:
    return committed_attempt(store, _commit_of(name)[0], name.removeprefix(TEXTS))


def _free_name(store: CacheStore, name: str) -> str:
    """What no document in quarantine/ is called: a shard may be moved aside more than once."""
    names = itertools.chain([name], (f"{name}.{number}" for number in itertools.count(2)))
    return next(free for free in names if store.get(f"quarantine/{free}.json") is None)


def _commit_of(name: str) -> tuple[type[AnyCommit], str]:
    """(kind of commit, its path) of a shard, or of one of texts: texts/NAME."""
    kind: type[AnyCommit] = TextCommit if name.startswith(TEXTS) else Commit
    return kind, f"{kind.folder}/{name.removeprefix(TEXTS)}.json"


def _is_of_another_manifest(cache: Cache, name: str) -> bool:
    """True if a refused commit is intact in itself and only the manifest is another."""
    kind, path = _commit_of(name)
    try:
        commit = kind.from_json(cache.store.get(path) or b"", path)
    except CacheError:
        return False
    return commit.manifest != digest(cache.store.get(MANIFEST) or b"")
