"""Writing a cache: the manifest once, then shards, each as a fresh attempt that a commit makes visible.

Order on disk: attempt folder (arrays, fsync) -> list of skipped pairs -> commit (put-if-absent). Whoever dies in
between leaves an orphan that no reader sees. Two writers of one shard: one commit wins, the other learns that it lost.
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from common.cache.arrays import write_group
from common.cache.schema import MAX_PAIRS_PER_SHARD, SPECS, Commit, Manifest, ShardSource
from common.cache.store import CacheStore, digest, storage_errors
from common.errors import CacheMismatch

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

    def __init__(self, store: CacheStore, manifest: Manifest) -> None:
        self.store = store
        self.manifest = manifest

    @classmethod
    def open(cls, location: str, manifest: Manifest) -> "CacheWriter":
        """Create the cache at `location`, or go on with the one there if it has the same identity.

        Raises CacheMismatch, showing every differing value, if it has another.
        """
        store = CacheStore(location, create=True)
        if store.put_new(MANIFEST, manifest.to_json()):
            return cls(store, manifest)
        data = store.get(MANIFEST)
        existing: Manifest = Manifest.from_json(data or b"", store.path(MANIFEST))
        check_identity(existing, manifest, location)
        return cls(store, existing)

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
            with storage_errors("write a shard", self.store.path(folder)):
                write_group(self.store.zarr(folder, read_only=False), data.arrays)
            self.store.sync_folder(folder)
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
            manifest=digest(self.manifest.to_json()),
            files=files,
            digests={path: self.store.edge_digest(f"{folder}/{path}", size) for path, size in files.items()},
            skipped=dict(sorted(reasons.items())),
            source=data.source,
            counts=dict(sorted(data.counts.items())),
            seconds={key: round(value, 3) for key, value in data.seconds.items()},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        return commit if self.store.put_new(f"commits/{name}.json", commit.to_json()) else None

    def _check(self, name: str, data: ShardData) -> None:
        """Our own bugs, caught before they reach a disk: names, dtypes, ranks and lengths follow the contract."""
        if not data.arrays:
            return
        expected = {spec.path for spec in self.manifest.arrays}
        if expected != set(data.arrays):
            raise AssertionError(f"shard {name}: arrays {sorted(data.arrays)} instead of {sorted(expected)}")
        num_pairs = data.num_pairs
        if not 0 < num_pairs <= MAX_PAIRS_PER_SHARD:
            raise AssertionError(f"shard {name}: {num_pairs} pairs")
        for path, values in data.arrays.items():
            spec = SPECS[path]
            lengths = {"pair": num_pairs, "side": 2, "step": self.manifest.timesteps_per_pair, "time_id": 6}
            lengths |= dict(zip(("C", "H", "W"), self.manifest.latent_shape, strict=True))
            wrong_axis = len(spec.axes) != values.ndim or any(
                lengths.get(axis, size) != size for axis, size in zip(spec.axes, values.shape, strict=True)
            )
            if wrong_axis or values.dtype != spec.numpy_dtype:
                raise AssertionError(f"shard {name}, {path}: {values.dtype} {values.shape} is not {spec}")


def check_identity(existing: Manifest, wanted: Manifest, location: object) -> None:
    """Raise CacheMismatch, with both values of every difference, unless the two manifests are one identity."""
    have, want = existing.identity(), wanted.identity()
    names = [name for name in sorted({*have, *want}) if have.get(name) != want.get(name)]
    if names:
        raise CacheMismatch(
            f"The cache here was made with other settings or another model ({', '.join(names)}).",
            where=location,
            expected="; ".join(f"{name} = {have.get(name)!r} (in the cache)" for name in names),
            got="; ".join(f"{name} = {want.get(name)!r} (this run)" for name in names),
            fix="give this run its own --cache folder, or repeat the cache's settings",
        )
