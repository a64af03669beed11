"""Reading a cache: committed shards only, checked against their commits before the first byte is trusted."""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from jaxtyping import Float, Int, Shaped
from zarr.core.buffer.cpu import NDBuffer

from inpo.common.cache.arrays import CommittedStore, metadata_problem, open_array
from inpo.common.cache.commits import read_commits
from inpo.common.cache.document import MAX_PAIRS_PER_SHARD, load
from inpo.common.cache.schema import MANIFEST, Commit, Manifest
from inpo.common.cache.specs import ArraySpec
from inpo.common.cache.store import CacheStore, digest
from inpo.common.durable import storage_errors
from inpo.common.errors import (
    CacheCorrupt,
    CacheError,
    CacheIncomplete,
    CacheMissing,
    CacheSchemaError,
    InpoError,
    command,
)

if TYPE_CHECKING:
    from inpo.common.levels import Levels

_Unreadable = (ValueError, KeyError, TypeError, AttributeError, EOFError, RuntimeError)
"""What zarr raises for bytes that it cannot decode and for metadata that it cannot read."""


class Shard:
    """One committed shard. Arrays are read on demand, whole or for some pairs; nothing is kept."""

    def __init__(self, cache: "Cache", name: str, commit: Commit) -> None:
        self.cache = cache
        self.name = name
        self.commit = commit
        self.folder = f"shards/{name}/{commit.attempt}"
        self._arrays: dict[str, zarr.Array[Any]] = {}

    @property
    def num_pairs(self) -> int:
        return self.commit.num_pairs

    @property
    def location(self) -> str:
        """Address of the committed attempt: a plain zarr v3 group."""
        return self.cache.store.path(self.folder)

    @cached_property
    def _verified(self) -> bool:
        """Names and sizes in the store equal the commit's, or CacheCorrupt is raised.

        zarr returns silent zeros for a missing chunk file, and for an empty one, so this comes before the first read.
        """
        present = self.cache.store.listing(self.folder)
        for path, size in self.commit.files.items():
            if path not in present:
                raise self._corrupt("A committed file is missing", path, expected=f"{size} bytes", got="no such file")
            if present[path] != size:
                raise self._corrupt(
                    "A committed file has another size", path, expected=f"{size} bytes", got=f"{present[path]} bytes"
                )
        return True

    def _corrupt(self, what: str, file: str, *, expected: object, got: object) -> CacheCorrupt:
        """`file` is a path below the shard's folder; its array is named."""
        array = file.split("/c/")[0].removesuffix("/zarr.json")
        part = f"array {array}" if array in self.cache.manifest.specs else "a group's metadata"
        return CacheCorrupt(
            f"{what}: {part} of shard {self.name}.",
            where=f"{self.location}/{file}",
            expected=expected,
            got=got,
            fix=self._advice(),
        )

    def _open(self, path: str) -> zarr.Array[Any]:
        """Open an array after checking that its files are the committed ones and not another's."""
        store = self.cache.store
        for file in self.commit.files:
            folder = file.removesuffix("zarr.json")  # the array's own metadata, and that of the groups above it
            if file.startswith(f"{path}/c") or (folder != file and f"{path}/".startswith(folder)):
                expected = self.commit.digests.get(file)
                found = store.sample_digest(f"{self.folder}/{file}", self.commit.files[file])
                if found != expected:
                    raise self._corrupt(
                        "A file is not the committed one", file, expected=f"digest {expected}", got=found
                    )
        spec = self.cache.manifest.specs[path]
        self._check_metadata(spec)
        committed = CommittedStore(store.zarr(self.folder), self.commit.files, remote=store.remote)
        array = open_array(committed, path)
        problem = metadata_problem(array, spec)
        if problem is not None:
            raise self._misfit(path, problem)
        return array

    def _array(self, path: str) -> zarr.Array[Any]:
        if path not in self._arrays:
            self._arrays[path] = self._open(path)
        return self._arrays[path]

    def _check_metadata(self, spec: ArraySpec) -> None:
        """Shape and dtype are the contract's and the array's file has just the bytes that they take.

        Looked at before zarr sees the metadata: what it says is how much memory is asked for.
        """
        path, files = spec.path, self.commit.files
        document = load(self.cache.store.get(f"{self.folder}/{path}/zarr.json") or b"", f"{self.location}/{path}")
        shape, dtype = document.get("shape"), document.get("data_type")
        if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
            raise self._misfit(path, f"shape {ascii(shape)[:100]}")
        if dtype != spec.dtype:
            raise self._misfit(path, f"{ascii(dtype)[:100]} instead of {spec.dtype}")
        lengths = self.cache.manifest.lengths(self.num_pairs)
        if spec.axes[0] == "prompt" and path != "prompt/text":
            lengths["prompt"] = self._array("prompt/text").shape[0]
        problem = spec.problem(tuple(shape), spec.numpy_dtype, lengths)
        if problem is None and spec.axes[0] == "prompt" and shape[0] > MAX_PAIRS_PER_SHARD + 1:
            problem = f"{shape[0]} prompts"
        size, wanted = files[spec.chunk_file], spec.chunk_bytes(shape)
        if problem is None and wanted is not None and size != wanted:
            problem = f"{size} bytes instead of the {wanted} of {spec.dtype} {shape}"
        if problem is None and spec.is_text:
            count = int.from_bytes(self.cache.store.head(f"{self.folder}/{spec.chunk_file}", min(size, 4)), "little")
            if count != shape[0]:
                problem = f"{count} texts instead of {shape[0]}"
        if problem is not None:
            raise self._misfit(path, problem)

    def _misfit(self, path: str, problem: str) -> CacheSchemaError:
        return CacheSchemaError(
            f"Array {path} of shard {self.name} does not fit the manifest.",
            where=f"{self.location}/{path}",
            got=problem,
            fix=self._advice(),
        )

    def _check_values(self, path: str, values: np.ndarray) -> None:
        """Numbers that are used as positions lie where there is something."""
        if path not in ("prompt_index", "timestep") or not values.size:
            return
        stop = self.cache.manifest.num_train_timesteps
        if path == "prompt_index":
            stop = self._array("prompt/text").shape[0]
        if values.min() < 0 or values.max() >= stop:
            raise self._misfit(path, f"{values.min()}..{values.max()} outside 0..{stop - 1}")

    def _advice(self) -> str:
        return (
            f"`{command('inspect', 'verify', self.cache.location, '--quarantine')}` moves the damaged shard's "
            "commit aside; the next `inpo precompute` makes it again"
        )

    def __contains__(self, path: str) -> bool:
        return path in self.stored or (path == "x_t" and "target" in self.stored) or self._is_delta(path)

    @cached_property
    def stored(self) -> frozenset[str]:
        """Paths of the arrays in the store, from the commit."""
        return frozenset(path.removesuffix("/zarr.json") for path in self.commit.files if path.count("/zarr.json"))

    def _is_delta(self, path: str) -> bool:
        return path == "eps_ref" and self.cache.delta_is_reference and "delta" in self.stored

    def read(
        self,
        path: str,
        pairs: "Int[np.ndarray, 'pair'] | slice | None" = None,
        *,
        allocate: Callable[[tuple[int, ...], np.dtype[Any]], np.ndarray] | None = None,
    ) -> Shaped[np.ndarray, "..."]:
        """Array `path` as numpy, whole or for some pairs (the first axis).

        `allocate` gives the memory (by shape and dtype) that a whole stored array is read into.

        What is not stored but follows from what is stored is derived: x_t of a lean cache (bit-identical to a full
        one's), eps_ref where it is delta. Raises CacheIncomplete, naming the option that would store it, for the
        rest, and CacheCorrupt, naming shard, array and pairs, for damaged bytes.
        """
        if path not in self.stored or path not in self.cache.manifest.specs:
            if path == "x_t" and "target" in self.stored:
                return self._derive_x_t(pairs)
            if self._is_delta(path):
                return self.read("delta", pairs)
            raise self._incomplete(path)
        self._verified  # noqa: B018  (a cached check, not a value)
        selection = slice(None) if pairs is None else pairs
        values: Any
        with storage_errors("read the cache", f"{self.location}/{path}"):
            try:
                array = self._array(path)
                if allocate is not None and pairs is None:
                    values = allocate(array.shape, array.dtype)
                    array.get_basic_selection(..., out=NDBuffer.from_numpy_array(values))
                elif isinstance(selection, slice):
                    values = array[selection]
                else:
                    values = _read_rows(array, selection, path)
                self._check_values(path, np.asarray(values))
            except InpoError:
                raise
            except _Unreadable as error:
                raise CacheCorrupt(
                    f"Array {path} of shard {self.name} cannot be read: its bytes are not the committed ones.",
                    where=f"{self.location}/{path}" + self._culprits(path, pairs),
                    got=str(error).splitlines()[0][:200] if str(error) else type(error).__name__,
                    fix=self._advice(),
                ) from error
        return np.asarray(values)

    def _culprits(self, path: str, pairs: "Int[np.ndarray, 'pair'] | slice | None") -> str:
        """The pairs whose chunks fail, found one by one; only after a failure, so its cost does not matter."""
        if path not in self._arrays or self.cache.manifest.specs[path].chunking == "whole":
            return ""
        array = self._arrays[path]
        bad = []
        for row in np.arange(self.num_pairs)[pairs if pairs is not None else slice(None)]:
            try:
                array[int(row)]
            except _Unreadable:
                bad.append(int(row))
        if not bad:
            return ""
        try:
            names = [str(name) for name in self.read("pair_id")[bad[:5]]]
        except InpoError:
            names = [f"in row {row}" for row in bad[:5]]
        return f" (pair{'s' if len(bad) > 1 else ''} {', '.join(names)}{', ...' if len(bad) > 5 else ''})"

    def _derive_x_t(self, pairs: "Int[np.ndarray, 'pair'] | slice | None") -> Float[np.ndarray, "pair step side c h w"]:
        from inpo.common.cache.derive import derive_x_t  # torch, which takes seconds

        a, s = self.cache.levels.at(self.read("timestep", pairs))
        return derive_x_t(self.read("x0", pairs), self.read("target", pairs), a, s)

    def _incomplete(self, path: str) -> CacheIncomplete:
        manifest = self.cache.manifest
        if path in ("delta", "x0_t"):
            fix = "precompute a cache with --profile full"
        elif path in ("delta_prev", "eps_ref"):
            fix = f"precompute a cache with --extra {path}"
        else:
            fix = f"stored here: {', '.join(sorted(self.stored & manifest.specs.keys()))}"
        return CacheIncomplete(
            f"This cache does not hold {path!r}.", where=self.cache.location, got=f"profile {manifest.profile}", fix=fix
        )


def _read_rows(array: zarr.Array[Any], rows: Int[np.ndarray, "pair"], path: str) -> Any:
    """Some rows in their order, read as runs of neighbours.

    zarr's own selection by a list moves every element by six indices, four times slower. Only what was asked for is
    touched: damage elsewhere in the array does not matter here.
    """
    length = array.shape[0]
    if len(rows) == 0:
        return array[:0]
    if rows.min() < 0 or rows.max() >= length:
        raise IndexError(f"rows {rows.min()}..{rows.max()} of {path}, which has {length}")
    if array.shards is None:  # one chunk
        return np.asarray(array[...])[rows]
    distinct, place = np.unique(rows, return_inverse=True)
    runs = np.split(distinct, np.flatnonzero(np.diff(distinct) > 1) + 1)
    return np.concatenate([array[int(run[0]) : int(run[-1]) + 1] for run in runs])[place]


class Cache:
    """A cache as its commits show it. Opening reads the manifest and every commit, and no array."""

    def __init__(self, store: CacheStore, manifest: Manifest, commits: dict[str, Commit]) -> None:
        self.store = store
        self.manifest = manifest
        self.commits = commits
        self.shards: dict[str, Shard] = {
            name: Shard(self, name, commit) for name, commit in commits.items() if commit.num_pairs
        }

    @property
    def location(self) -> str:
        return self.store.location

    @cached_property
    def levels(self) -> "Levels":
        """The reference's levels, from the manifest."""
        return self.manifest.levels.levels()

    @property
    def num_pairs(self) -> int:
        return sum(commit.num_pairs for commit in self.commits.values())

    @property
    def num_records(self) -> int:
        return self.num_pairs * self.manifest.timesteps_per_pair

    @property
    def delta_is_reference(self) -> bool:
        """True if the inverting prediction is the reference prediction under the training caption (guidance 1)."""
        return self.manifest.inverter.guidance == 1.0

    def __iter__(self) -> Iterator[Shard]:
        return iter(self.shards.values())

    def find(self, pair_id: str) -> tuple[Shard, int]:
        """The shard and the row of a pair. Raises CacheIncomplete if no committed shard has it."""
        for shard in self:
            rows = np.flatnonzero(shard.read("pair_id") == pair_id)
            if len(rows):
                return shard, int(rows[0])
        example = next((str(shard.read("pair_id")[0]) for shard in self), None)
        raise CacheIncomplete(
            f"No committed pair has the id {pair_id!r}.",
            where=self.location,
            expected=f"an id like {example!r}" if example else "at least one committed pair",
            fix="`inpo inspect summary` shows what is committed and what was skipped",
        )


def open_cache(location: str, *, allow_empty: bool = False, damaged: dict[str, CacheError] | None = None) -> Cache:
    """Open a cache for reading.

    Raises CacheMissing if there is no manifest, or (unless `allow_empty`) no committed pair yet, CacheSchemaError if
    a document cannot be read or is of another version, and CacheCorrupt if one was edited. With `damaged` a bad
    commit is put there under its shard's name, and the shard left out, instead.
    """
    store = CacheStore(location)
    data = store.get(MANIFEST)
    if data is None:
        commits_left = [name for name in store.listing("commits") if name.endswith(".json")]
        if commits_left:
            raise CacheMissing(
                "The cache has lost its manifest.",
                where=store.path(MANIFEST),
                expected="the file that its shards were committed under",
                got=f"no such file beside {len(commits_left)} commits",
                fix="restore it from a copy of the cache; without one, `inpo precompute` into another folder",
            )
        raise CacheMissing(
            "There is no cache here.",
            where=store.location,
            expected=MANIFEST,
            got="no such file",
            fix="run `inpo precompute --cache` with this path first, or correct the path",
        )
    manifest = Manifest.from_json(data, store.path(MANIFEST))
    commits, bad = read_commits(store, manifest, digest(data))
    if damaged is None and bad:
        raise next(iter(bad.values()))
    if damaged is not None:
        damaged.update(bad)
    cache = Cache(store, manifest, commits)
    if not allow_empty and cache.num_pairs == 0:
        raise CacheMissing(
            "This cache has no committed pair yet.",
            where=store.location,
            got=f"{len(commits)} commits, 0 pairs",
            fix="wait for `inpo precompute` to commit its first shard, or look at the skipped pairs with "
            "`inpo inspect summary`",
        )
    return cache
