"""Writing a cache: the manifest once, then shards, each as a fresh attempt that a commit makes visible.

Order on disk: attempt folder (arrays, fsync) -> list of skipped pairs -> a look at what lies there -> commit
(put-if-absent) -> the same look again. Whoever dies in between leaves an orphan that no reader sees. Two writers of one
shard: one commit wins, the other learns that it lost.

A commit says only what is there. An attempt may vanish under its writer: `inpo inspect clean` may take it for a dead
one's, and a listing may lag. `clean` leaves a mark beside an attempt before it looks for a commit, and removes the mark
last; the writer commits before it looks for the mark. So at least one of the two sees the other, and a commit of what
is being removed is taken back.
"""

import contextlib
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

import numpy as np

from inpo.common.cache.arrays import WrittenStore, write_group
from inpo.common.cache.commits import AnyCommit, Commit, ShardSource, SkippedRow, TextCommit, check_made_under
from inpo.common.cache.document import MAX_PAIRS_PER_SHARD
from inpo.common.cache.identity import check_identity
from inpo.common.cache.schema import CONFIGURATION_SEAL, MANIFEST, REMOVING, Manifest
from inpo.common.cache.specs import TEXT, ArraySpec
from inpo.common.cache.store import CacheStore, digest
from inpo.common.durable import storage_errors
from inpo.common.errors import CacheCorrupt, InpoError, StorageError

_TRIES = 2
_C = TypeVar("_C", bound=AnyCommit)


@dataclass(frozen=True, kw_only=True)
class ShardData:
    """Everything of a shard of images: arrays by path (empty if no pair survived) and what happened on the way."""

    arrays: Mapping[str, np.ndarray]
    source: ShardSource
    texts: Sequence[str] = ()
    """The text shards that group/prompt counts places of."""
    skipped: Sequence[Mapping[str, Any]] = ()
    """One {pair_id, reason, detail, row} per row that gave no pair."""
    counts: Mapping[str, int] = field(default_factory=dict)
    spread: float | None = None
    """How far rounding moves the root of a reference error; None: not measured, or no pair."""
    seconds: Mapping[str, float] = field(default_factory=dict)

    def length(self, path: str) -> int:
        """Rows of an array; 0 if there are no arrays."""
        return len(self.arrays[path]) if self.arrays else 0

    @property
    def num_pairs(self) -> int:
        return self.length("pair/id")


@dataclass(frozen=True, kw_only=True)
class TextData:
    """Everything of a shard of texts: arrays by path."""

    arrays: Mapping[str, np.ndarray]
    cut: Sequence[int] = ()
    """Rows of prompts of which the model sees only the beginning."""
    not_finite: Sequence[int] = ()
    """Rows of prompts for which the encoder gave NaN or infinity: 0 stands there."""
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_prompts(self) -> int:
        return len(self.arrays[TEXT.path])


class CacheWriter:
    """Writes shards into a cache of one identity."""

    def __init__(self, store: CacheStore, manifest: Manifest, data: bytes | None = None) -> None:
        """`data`: manifest.json as it lies in the store, if it is not this version's own rendering."""
        self.store = store
        self.manifest = manifest
        self.manifest_digest = digest(manifest.to_json() if data is None else data)
        self._written: dict[str, dict[str, tuple[int, str]]] = {}
        """{folder of an attempt: {file: (bytes, digest)}}: what was handed to the store."""

    @classmethod
    def open(cls, location: str, manifest: Manifest) -> "CacheWriter":
        """Create the cache at `location`, or go on with the one there if it has the same identity.

        Raises CacheMismatch, showing every differing value, if it has another, and CacheCorrupt if shards are
        committed but their manifest is gone, or is not byte by byte the one that they were made under.
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
        check_made_under(store, digest(data))
        return cls(store, existing, data)

    def committed(self, kind: type[AnyCommit] = Commit) -> set[str]:
        """Names of the committed shards, by one listing."""
        return {name.removesuffix(".json") for name in self.store.listing(kind.folder) if name.endswith(".json")}

    def is_committed(self, name: str, kind: type[AnyCommit] = Commit) -> bool:
        return self.store.get(f"{kind.folder}/{name}.json") is not None

    def commit(self, name: str) -> Commit | None:
        """The commit of a shard of images; None if it is not committed."""
        path = f"{Commit.folder}/{name}.json"
        data = self.store.get(path)
        return None if data is None else Commit.from_json(data, self.store.path(path))

    def write_configuration(self, toml: str) -> None:
        """Keep what a run was told, for people; the last line seals the others."""
        data = toml.encode()
        seal = f"{CONFIGURATION_SEAL}{digest(data)}\n".encode()
        self.store.put_new(f"configurations/{time.time_ns() // 1_000_000}.toml", data + seal)

    def write(self, name: str, data: ShardData) -> Commit | None:
        """Write and commit one shard of images. Returns its commit, or None if another writer committed it first.

        Raises StorageError if what was written did not stay where it was written to.
        """
        self._check(name, data)
        reasons: dict[str, int] = {}
        for row in data.skipped:
            reasons[str(row["reason"])] = reasons.get(str(row["reason"]), 0) + 1
        lines = _lines(data.skipped)
        values = {
            "num_pairs": data.num_pairs,
            "num_groups": data.length("group/id"),
            "num_images": data.length("image/id"),
            "texts": tuple(data.texts),
            "skipped": dict(sorted(reasons.items())),
            "skipped_digest": digest(lines) if lines else None,
            "source": data.source,
            "counts": dict(sorted(data.counts.items())),
            "spread": data.spread,
        }
        return self._write(Commit, name, data.arrays, self.manifest.specs, values, data.seconds, lines)

    def write_texts(self, name: str, data: TextData) -> TextCommit | None:
        """Write and commit one shard of texts; as `write`."""
        _check_arrays(f"texts {name}", data.arrays, self.manifest.text_specs, {})
        values = {"num_prompts": data.num_prompts, "cut": tuple(data.cut), "not_finite": tuple(data.not_finite)}
        return self._write(TextCommit, name, data.arrays, self.manifest.text_specs, values, data.seconds, b"")

    def _write(
        self,
        kind: type[_C],
        name: str,
        arrays: Mapping[str, np.ndarray],
        specs: Mapping[str, ArraySpec],
        values: Mapping[str, Any],
        seconds: Mapping[str, float],
        lines: bytes,
    ) -> _C | None:
        """`lines`: the list of skipped rows."""
        problem: str | None = None
        for _ in range(_TRIES):
            attempt = uuid.uuid4().hex[:16]
            folder = f"{kind.arrays}/{name}/{attempt}"
            path = f"{kind.folder}/{name}.json"
            may_be_committed = False
            try:
                if arrays:
                    self._write_arrays(folder, arrays, specs)
                if lines:
                    self.store.put_new(f"skipped/{name}/{attempt}.jsonl", lines)
                problem = self._difference(folder, name, attempt, lines, digests=True)
                if problem is None:
                    written = self._written.get(folder, {})
                    commit = kind(
                        attempt=attempt,
                        manifest=self.manifest_digest,
                        files={path: size for path, (size, _) in sorted(written.items())},
                        digests={path: value for path, (_, value) in sorted(written.items())},
                        seconds={key: round(value, 3) for key, value in seconds.items()},
                        created=datetime.now(UTC).isoformat(timespec="seconds"),
                        **values,
                    )
                    may_be_committed = True
                    if not self.store.put_new(path, commit.to_json()):
                        return None
                    problem = self._difference(folder, name, attempt, lines, digests=False)
                    if problem is None:
                        return commit
                    self.store.remove(path)
            except InpoError:
                # It may be what fills the disk. What an object store has not answered may still arrive there.
                with contextlib.suppress(InpoError):
                    if not may_be_committed or not (self.store.remote or self.is_committed(name, kind)):
                        self.store.remove(folder)
                        self.store.remove(f"skipped/{name}/{attempt}.jsonl")
                raise
            finally:
                self._written.pop(folder, None)
        raise StorageError(
            f"An attempt at shard {name} did not stay as it was written; nothing is committed.",
            where=self.store.path(f"{kind.arrays}/{name}"),
            expected="the files that were written",
            got=problem,
            fix="run `inpo inspect clean --all` only while nothing writes; then the same command again: what is "
            "committed stays",
        )

    def _difference(self, folder: str, name: str, attempt: str, lines: bytes, *, digests: bool) -> str | None:
        """What of an attempt is not in the store as it was handed over, or None."""
        # Marks first: a mark goes after the files, so that who comes too late for it finds them gone.
        for beside in self.store.listing(folder.rpartition("/")[0]):
            if beside.startswith(f"{attempt}.") and beside.endswith(REMOVING):
                return "`inpo inspect clean` is removing it"
        written = self._written.get(folder, {})
        there = self.store.listing(folder)
        for path in sorted({*written, *there}):
            if path not in there:
                return f"{path}: no such file"
            if path not in written:
                return f"{path}: a file that was not written"
            size, expected = written[path]
            if there[path] != size:
                return f"{path}: {there[path]} bytes instead of {size}"
            if digests and self.store.sample_digest(f"{folder}/{path}", size) != expected:
                return f"{path}: other bytes than were written"
        if lines and self.store.get(f"skipped/{name}/{attempt}.jsonl") != lines:
            return "the list of skipped rows is not what was written"
        return None

    def _write_arrays(self, folder: str, arrays: Mapping[str, np.ndarray], specs: Mapping[str, ArraySpec]) -> None:
        """Write and flush."""
        with storage_errors("write a shard", self.store.path(folder)):
            written = self._written.setdefault(folder, {})
            store = WrittenStore(self.store.zarr(folder, read_only=False), written)
            write_group(store, arrays, specs)
        self.store.sync_folder(folder)

    def _check(self, name: str, data: ShardData) -> None:
        """Our own bugs, caught before they reach a disk: names, dtypes, shapes and references follow the contract."""
        if not data.arrays:
            return
        if not 0 < data.num_pairs <= MAX_PAIRS_PER_SHARD:
            raise AssertionError(f"shard {name}: {data.num_pairs} pairs")
        arrays = data.arrays
        lengths = self.manifest.lengths(data.length("image/id"), data.length("group/id"), data.num_pairs)
        _check_arrays(f"shard {name}", arrays, self.manifest.specs, lengths)
        group, win, lose = arrays["image/group"], arrays["pair/win"], arrays["pair/lose"]
        if (np.diff(group) < 0).any() or set(group.tolist()) != set(range(data.length("group/id"))):
            raise AssertionError(f"shard {name}: image/group {group.tolist()[:9]}")
        if set(win.tolist()) | set(lose.tolist()) != set(range(data.length("image/id"))):
            raise AssertionError(f"shard {name}: an image that is of no pair, or a pair of no image")
        if (group[win] != group[lose]).any() or (win == lose).any():
            raise AssertionError(f"shard {name}: a pair of images of two groups, or of one image")
        prompt = arrays["group/prompt"]
        if prompt.min() < 0 or prompt[:, 0].max() >= len(data.texts):
            raise AssertionError(f"shard {name}: a place beyond its {len(data.texts)} texts")


def _check_arrays(
    where: str, arrays: Mapping[str, np.ndarray], specs: Mapping[str, ArraySpec], lengths: Mapping[str, int]
) -> None:
    if specs.keys() != set(arrays):
        raise AssertionError(f"{where}: arrays {sorted(arrays)} instead of {sorted(specs)}")
    for path, values in arrays.items():
        spec = specs[path]
        problem = spec.problem(values.shape, values.dtype, lengths)
        if problem is None and spec.is_text and values.dtype.kind not in "OT":
            problem = f"{values.dtype} instead of text"
        may_be_nan = values.dtype.kind != "f" or path in ("inversion_error", "image/score")
        if problem is None and not may_be_nan and not np.isfinite(values).all():
            problem = "NaN or infinity"
        if problem is not None:
            raise AssertionError(f"{where}, {path}: {problem}")
        # Free axes (prompt, token) are fixed by the first array that has them; width differs between encoders.
        free = {axis: size for axis, size in zip(spec.axes, values.shape, strict=True) if axis != "width"}
        lengths = {**free, **lengths}


def _lines(skipped: Sequence[Mapping[str, Any]]) -> bytes:
    rows = [SkippedRow.model_validate(row).model_dump() for row in skipped]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
