"""Writing a cache: the manifest once, then shards, each as a fresh attempt that a commit makes visible.

Order on disk: attempt folder (arrays, fsync) -> list of skipped pairs -> commit (put-if-absent). Whoever dies in
between leaves an orphan that no reader sees. Two writers of one shard: one commit wins, the other learns that it lost.
"""

import contextlib
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from inpo.common.cache.arrays import write_group
from inpo.common.cache.schema import MAX_PAIRS_PER_SHARD, Commit, LevelTables, Manifest, ShardSource
from inpo.common.cache.store import CacheStore, digest
from inpo.common.durable import storage_errors
from inpo.common.errors import CacheCorrupt, CacheMismatch, InpoError

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class ShardData:
    """Everything of one shard: arrays by path (empty if no pair survived) and what happened on the way."""

    arrays: Mapping[str, np.ndarray]
    source: ShardSource
    skipped: Sequence[Mapping[str, Any]] = ()
    """One {pair_id, reason, detail, row} per row that gave no pair."""
    counts: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_pairs(self) -> int:
        return len(self.arrays["pair_id"]) if self.arrays else 0


class CacheWriter:
    """Writes shards into a cache of one identity."""

    def __init__(self, store: CacheStore, manifest: Manifest, data: bytes | None = None) -> None:
        """`data`: manifest.json as it lies in the store, if it is not this version's own rendering."""
        self.store = store
        self.manifest = manifest
        self._manifest_digest = digest(manifest.to_json() if data is None else data)

    @classmethod
    def open(cls, location: str, manifest: Manifest) -> "CacheWriter":
        """Create the cache at `location`, or go on with the one there if it has the same identity.

        Raises CacheMismatch, showing every differing value, if it has another, and CacheCorrupt if shards are
        committed but their manifest is gone.
        """
        store = CacheStore(location, create=True)
        data = store.get(MANIFEST)
        if data is None and store.listing("commits") and store.get(MANIFEST) is None:
            raise CacheCorrupt(
                "The cache has committed shards but no manifest.",
                where=store.path(MANIFEST),
                expected="the manifest that the shards were made under",
                got="no such file",
                fix="restore manifest.json from a copy, or precompute into a new folder",
            )
        if data is None:
            if store.put_new(MANIFEST, manifest.to_json()):
                return cls(store, manifest)
            data = store.get(MANIFEST) or b""
        existing = Manifest.from_json(data, store.path(MANIFEST))
        check_identity(existing, manifest, location)
        return cls(store, existing, data)

    def committed(self) -> set[str]:
        """Names of the committed shards, by one listing."""
        return {name.removesuffix(".json") for name in self.store.listing("commits") if name.endswith(".json")}

    def is_committed(self, name: str) -> bool:
        return self.store.get(f"commits/{name}.json") is not None

    def write(self, name: str, data: ShardData) -> Commit | None:
        """Write and commit one shard. Returns its commit, or None if another writer committed it first."""
        self._check(name, data)
        attempt = uuid.uuid4().hex[:16]
        folder = f"shards/{name}/{attempt}"
        files: dict[str, int] = {}
        if data.num_pairs:
            self._write_arrays(folder, data.arrays)
            files = self.store.listing(folder)
        if data.skipped:
            lines = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in data.skipped)
            self.store.put_new(f"skipped/{name}/{attempt}.jsonl", lines.encode())
        reasons: dict[str, int] = {}
        for row in data.skipped:
            reasons[str(row["reason"])] = reasons.get(str(row["reason"]), 0) + 1
        commit = Commit(
            attempt=attempt,
            num_pairs=data.num_pairs,
            manifest=self._manifest_digest,
            files=files,
            digests={path: self.store.sample_digest(f"{folder}/{path}", size) for path, size in files.items()},
            skipped=dict(sorted(reasons.items())),
            source=data.source,
            counts=dict(sorted(data.counts.items())),
            seconds={key: round(value, 3) for key, value in data.seconds.items()},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        return commit if self.store.put_new(f"commits/{name}.json", commit.to_json()) else None

    def _write_arrays(self, folder: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write and flush. What a refusing disk leaves behind is removed at once: it may be what fills the disk."""
        try:
            with storage_errors("write a shard", self.store.path(folder)):
                write_group(self.store.zarr(folder, read_only=False), arrays, self.manifest.specs)
            self.store.sync_folder(folder)
        except InpoError:
            with contextlib.suppress(InpoError):
                self.store.remove(folder)
            raise

    def _check(self, name: str, data: ShardData) -> None:
        """Our own bugs, caught before they reach a disk: names, dtypes, shapes and references follow the contract."""
        if not data.arrays:
            return
        expected = self.manifest.specs.keys()
        if expected != set(data.arrays):
            raise AssertionError(f"shard {name}: arrays {sorted(data.arrays)} instead of {sorted(expected)}")
        if not 0 < data.num_pairs <= MAX_PAIRS_PER_SHARD:
            raise AssertionError(f"shard {name}: {data.num_pairs} pairs")
        lengths = self.manifest.lengths(data.num_pairs)
        for path, values in data.arrays.items():
            spec = self.manifest.specs[path]
            problem = spec.problem(values.shape, values.dtype, lengths)
            if problem is None and spec.is_text and values.dtype.kind not in "OT":
                problem = f"{values.dtype} instead of text"
            may_be_nan = values.dtype.kind != "f" or path == "inversion_error"
            if problem is None and not may_be_nan and not np.isfinite(values).all():
                problem = "NaN or infinity"
            if problem is not None:
                raise AssertionError(f"shard {name}, {path}: {problem}")
            # Free axes (prompt, token) are fixed by the first array that has them; width differs between encoders.
            free = {axis: size for axis, size in zip(spec.axes, values.shape, strict=True) if axis != "width"}
            lengths = {**free, **lengths}
        self._check_prompts(name, data.arrays)

    @staticmethod
    def _check_prompts(name: str, arrays: Mapping[str, np.ndarray]) -> None:
        text, index = arrays["prompt/text"], arrays["prompt_index"]
        if text[0] != "" or index.min() < 0 or index.max() >= len(text):
            raise AssertionError(f"shard {name}: row 0 must be the empty prompt and prompt_index in 0..{len(text) - 1}")


def check_identity(existing: Manifest, wanted: Manifest, location: object) -> None:
    """Raise CacheMismatch, with both values of every difference, unless the two manifests are one identity."""
    have, want = existing.identity(), wanted.identity()
    if not same_levels(existing.levels, wanted.levels):
        # One fingerprint of the scheduler, two tables: another version of the library reads its settings otherwise.
        have["levels"], want["levels"] = map(_ends, (existing.levels, wanted.levels))
    names = [name for name in sorted({*have, *want}) if have.get(name) != want.get(name)]
    if names:
        raise CacheMismatch(
            f"The cache here was made with other settings or another model ({', '.join(names)}).",
            where=location,
            expected="; ".join(f"{name} = {have.get(name)!r} (in the cache)" for name in names),
            got="; ".join(f"{name} = {want.get(name)!r} (this run)" for name in names),
            fix="give this run its own --cache folder, or repeat the cache's settings",
        )


_TABLE_TOLERANCE = 1e-6
"""Of a squared table. The tables are float32 in their library; writers take the cache's own, to the last bit."""


def same_levels(left: LevelTables, right: LevelTables) -> bool:
    """Whether two sets of tables are one, to the rounding of the libraries."""
    if (left.space, len(left.signal)) != (right.space, len(right.signal)):
        return False

    def close(one: Sequence[float], other: Sequence[float], *, relative: float, absolute: float) -> bool:
        return np.allclose(np.square(one), np.square(other), rtol=relative, atol=absolute)

    return (
        close(left.signal, right.signal, relative=_TABLE_TOLERANCE, absolute=0.0)
        # Near the clean end noise^2 = 1 - signal^2 is small, and signal's rounding large beside it.
        and close(left.noise, right.noise, relative=_TABLE_TOLERANCE, absolute=_TABLE_TOLERANCE)
        and close(left.label, right.label, relative=_TABLE_TOLERANCE, absolute=0.0)
        and close([left.floor], [right.floor], relative=0.0, absolute=_TABLE_TOLERANCE)
    )


def _ends(levels: LevelTables) -> str:
    signal, digits = levels.signal, digest(levels.to_json())[:8]
    return f"{levels.space}, signal {signal[0]:.9g} to {signal[-1]:.9g}, {len(signal)} values, digest {digits}"
