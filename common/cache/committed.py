"""A committed attempt: a plain zarr v3 group, checked against its commit before the first byte is trusted."""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped
from obstore.exceptions import NotFoundError

from inpo.common.cache.arrays import decode, decode_texts, metadata_problem, without_checksum
from inpo.common.cache.commits import AnyCommit
from inpo.common.cache.document import load
from inpo.common.cache.specs import CRC_BYTES, INDEX_BYTES, ArraySpec
from inpo.common.cache.store import CacheStore, digest_of_sample
from inpo.common.durable import storage_errors
from inpo.common.errors import CacheCorrupt, CacheSchemaError, InpoError, command

_Unreadable = (ValueError, KeyError, TypeError, AttributeError, EOFError, RuntimeError)
"""What is raised for bytes that cannot be decoded, and by zarr for metadata that it cannot read."""

Rows = Int[np.ndarray, " row"] | slice | None


class LostBytes(EOFError):
    """A committed file is gone or shorter than committed."""


class CommittedArrays:
    """The arrays of one committed attempt. Read on demand, whole or some rows; none is kept."""

    def __init__(self, store: CacheStore, folder: str, commit: AnyCommit, specs: Mapping[str, ArraySpec]) -> None:
        self.store = store
        self.folder = folder
        self.specs = specs
        self._files = commit.files
        self._digests = commit.digests
        self._shapes: dict[str, tuple[int, ...]] = {}
        """Of the arrays that have been looked at."""
        self._indexes: dict[str, Int[np.ndarray, "chunk 2"] | None] = {}
        """Of the arrays whose chunks have been read; None: one after the other, all of one size."""

    @property
    @abstractmethod
    def title(self) -> str:
        """What the attempt is of, for messages: `shard 0-00000000`."""

    @abstractmethod
    def lengths(self) -> dict[str, int]:
        """Known lengths of axes."""

    def row_names(self, spec: ArraySpec, rows: list[int]) -> list[str]:
        """Names of rows of an array's first axis, for messages."""
        return [f"{spec.axes[0]} {row}" for row in rows]

    @property
    def location(self) -> str:
        """Address of the committed attempt: a plain zarr v3 group."""
        return self.store.path(self.folder)

    @cached_property
    def stored(self) -> frozenset[str]:
        """Paths of the arrays in the store, from the commit."""
        return frozenset(path.removesuffix("/zarr.json") for path in self._files if path.count("/zarr.json"))

    @cached_property
    def _verified(self) -> bool:
        """Names and sizes in the store equal the commit's, or CacheCorrupt is raised.

        Other programs read a missing chunk file as zeros, and an empty one.
        """
        present = self.store.listing(self.folder)
        for path, size in self._files.items():
            if path not in present:
                raise self._corrupt("A committed file is missing", path, expected=f"{size} bytes", got="no such file")
            if present[path] != size:
                raise self._corrupt(
                    "A committed file has another size", path, expected=f"{size} bytes", got=f"{present[path]} bytes"
                )
        return True

    def _corrupt(self, what: str, file: str, *, expected: object, got: object) -> CacheCorrupt:
        """`file` is a path below the attempt's folder; its array is named."""
        array = file.split("/c/")[0].removesuffix("/zarr.json")
        part = f"array {array}" if array in self.specs else "a group's metadata"
        return CacheCorrupt(
            f"{what}: {part} of {self.title}.",
            where=f"{self.location}/{file}",
            expected=expected,
            got=got,
            fix=self.advice(),
        )

    def _shape(self, path: str) -> tuple[int, ...]:
        """An array's shape, after checking that its metadata are the committed ones and the contract's."""
        if path not in self._shapes:
            self._verified  # noqa: B018  (a cached check, not a value)
            spec, file = self.specs[path], f"{path}/zarr.json"
            document = load(self._file(file), f"{self.location}/{file}")
            self._check_metadata(spec, document)
            if spec.chunking != "whole":
                self._compare_sample(spec.chunk_file)
            self._shapes[path] = tuple(document["shape"])
        return self._shapes[path]

    def _file(self, file: str) -> bytes:
        """A file, whole, after checking that it is the committed one."""
        (data,) = self._ranges(file, [(0, self._files[file])])
        self._compare(file, digest_of_sample(memoryview(data)))
        return data

    def _compare_sample(self, file: str) -> None:
        self._compare(file, self.store.sample_digest(f"{self.folder}/{file}", self._files[file]))

    def _compare(self, file: str, found: str) -> None:
        """CacheCorrupt where a file's digest is not the committed one: it may be whole, and another's."""
        expected = self._digests.get(file)
        if found != expected:
            raise self._corrupt("A file is not the committed one", file, expected=f"digest {expected}", got=found)

    def check_groups(self) -> None:
        """Raise CacheCorrupt where the metadata of a zarr group are not the committed ones. No array is read by them
        here, but by other programs."""
        self._verified  # noqa: B018  (a cached check, not a value)
        for file in self._files:
            if file.removesuffix("/zarr.json") not in self.specs and "/c/" not in file:
                self._compare_sample(file)

    def _check_metadata(self, spec: ArraySpec, document: dict[str, Any]) -> None:
        """Shape and dtype are the contract's and the array's file has just the bytes that they take.

        Looked at before zarr sees the metadata: what they say is how much memory is asked for.
        """
        shape, dtype = document.get("shape"), document.get("data_type")
        if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
            raise self.misfit(spec.path, f"shape {ascii(shape)[:100]}")
        if dtype != spec.dtype:
            raise self.misfit(spec.path, f"{ascii(dtype)[:100]} instead of {spec.dtype}")
        problem = spec.problem(tuple(shape), spec.numpy_dtype, self.lengths())
        size, wanted = self._files[spec.chunk_file], spec.chunk_bytes(shape)
        if problem is None and wanted is not None and size != wanted:
            problem = f"{size} bytes instead of the {wanted} of {spec.dtype} {shape}"
        if problem is None and spec.compressed:
            problem = spec.too_large(shape)
        problem = problem or metadata_problem(document, spec)
        if problem is not None:
            raise self.misfit(spec.path, problem)

    def misfit(self, path: str, problem: str) -> CacheSchemaError:
        """The error for an array that is not what its commit and the manifest make it."""
        return CacheSchemaError(
            f"Array {path} of {self.title} does not fit the manifest.",
            where=f"{self.location}/{path}",
            got=problem,
            fix=self.advice(),
        )

    def check_values(self, path: str, values: np.ndarray) -> None:
        """Raise CacheSchemaError for numbers that are used as positions where there is nothing."""

    def advice(self) -> str:
        """What to do about damage."""
        return (
            f"`{command('inspect', 'verify', self.store.location, '--quarantine')}` moves the damaged shard's "
            "commit aside; the next `inpo precompute` makes it again"
        )

    def read_stored(self, path: str, rows: Rows = None) -> Shaped[np.ndarray, "row ..."]:
        """A stored array as numpy, whole or some rows of its first axis; see `Shard.read`. Only the chunks of what was
        asked for are read: damage elsewhere in the array does not matter here. IndexError for rows that it lacks."""
        with self._reading(path, rows):
            shape = self._shape(path)
            chosen = _chosen(path, rows, shape[0])
            values: np.ndarray
            if self.specs[path].chunking == "whole":
                values = self._whole(path, shape)[chosen]
            else:
                distinct, order = np.unique(chosen, return_inverse=True)
                values = self._chunks(path, self._of_rows(path, distinct)).reshape(len(distinct), *shape[1:])
                if not np.array_equal(distinct, chosen):
                    values = values[order]
            self.check_values(path, values)
        return values

    def read_chunks(self, path: str, places: Int[np.ndarray, "chunk axis"]) -> Shaped[np.ndarray, "chunk ..."]:
        """Single inner chunks of an array that is cut by prompt, by image, or by image and record, as `places` say.
        Raises as `read_stored`."""
        with self._reading(path, places[:, 0]):
            grid = self._shape(path)[: self.specs[path].num_cut]
            if (places < 0).any() or (places >= grid).any():
                raise IndexError(f"chunks {places.min(0)}..{places.max(0)} of {path}, which has {list(grid)}")
            return self._chunks(path, np.ravel_multi_index(tuple(places.T), grid))

    @contextmanager
    def _reading(self, path: str, rows: Rows) -> Iterator[None]:
        """Errors of what the cache's own words do not cover, in its words."""
        with storage_errors("read the cache", f"{self.location}/{path}"):
            try:
                yield
            except InpoError:
                raise
            except _Unreadable as error:
                raise self._unreadable(path, rows, error) from error

    def _whole(self, path: str, shape: tuple[int, ...]) -> np.ndarray:
        """An array that is a single chunk."""
        spec = self.specs[path]
        data = self._file(spec.chunk_file)
        if spec.is_text:
            return decode_texts(data, shape[0], compressed=spec.compressed)
        values: np.ndarray = np.empty(shape, spec.numpy_dtype)
        decode(data, values, compressed=spec.compressed)
        return values

    def _of_rows(self, path: str, rows: Int[np.ndarray, " row"]) -> Int[np.ndarray, " chunk"]:
        """Numbers of the chunks of some rows of an array that is cut."""
        in_row = math.prod(self._shapes[path][1 : self.specs[path].num_cut])
        return (rows[:, None] * in_row + np.arange(in_row)).reshape(-1)

    def _chunks(self, path: str, numbers: Int[np.ndarray, " chunk"]) -> Shaped[np.ndarray, "chunk ..."]:
        """Chunks of an array that is cut. The file's index is read once and each chunk as one range, neighbours as one.

        Through zarr a chunk costs about a millisecond of Python (docs/log.md). Sizes and checksums are looked at as
        zarr does, and nothing is decompressed into more than the chunk's own bytes.
        """
        spec, shape = self.specs[path], self._shape(path)
        spans = self._spans(spec, shape, numbers)
        values = np.empty((len(numbers), *shape[spec.num_cut :]), spec.numpy_dtype)
        order = np.argsort(spans[:, 0], kind="stable")
        ends = spans.sum(1)
        breaks = np.flatnonzero(spans[order][1:, 0] != ends[order][:-1]) + 1
        runs = np.split(order, breaks) if len(order) else []
        read = self._ranges(spec.chunk_file, [(int(spans[run[0], 0]), int(ends[run[-1]])) for run in runs])
        for run, data in zip(runs, read, strict=True):
            for place in run.tolist():
                start, stop = spans[place, 0] - spans[run[0], 0], ends[place] - spans[run[0], 0]
                decode(data[start:stop], values[place : place + 1], compressed=spec.compressed)
        return values

    def _spans(
        self, spec: ArraySpec, shape: tuple[int, ...], numbers: Int[np.ndarray, " chunk"]
    ) -> Int[np.ndarray, "chunk 2"]:
        """(offset, bytes) of inner chunks, from the index at the end of the array's file.

        Of chunks in their order, all of one size, nothing is kept: a run visits every shard of a cache.
        """
        size = math.prod(shape[spec.num_cut :]) * spec.numpy_dtype.itemsize + CRC_BYTES
        if spec.path not in self._indexes:
            index = self._chunk_index(spec, math.prod(shape[: spec.num_cut]))
            if not spec.compressed and (index[:, 1] != size).any():
                raise ValueError("a chunk of another size")
            in_order = not spec.compressed and np.array_equal(index[:, 0], np.arange(len(index)) * size)
            self._indexes[spec.path] = None if in_order else index
        known = self._indexes[spec.path]
        return known[numbers] if known is not None else np.stack([numbers * size, np.full_like(numbers, size)], axis=1)

    def _chunk_index(self, spec: ArraySpec, chunks: int) -> Int[np.ndarray, "chunk 2"]:
        size = self._files[spec.chunk_file]
        start = size - chunks * INDEX_BYTES - CRC_BYTES
        if start < 0:
            raise ValueError(f"{size} bytes with an index of {chunks} chunks")
        (data,) = self._ranges(spec.chunk_file, [(start, size)])
        index = np.frombuffer(without_checksum(data), "<u8").reshape(chunks, 2)
        if (index > start).any() or (index.sum(1) > start).any() or (index[:, 1] <= CRC_BYTES).any():
            raise ValueError("a chunk index that points out of its file")
        return index.astype(np.int64)

    def _ranges(self, file: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        try:
            parts = self.store.ranges(f"{self.folder}/{file}", spans)
        except (FileNotFoundError, NotFoundError) as error:
            raise LostBytes(f"{file}: no such file") from error
        for part, (start, end) in zip(parts, spans, strict=True):
            if len(part) != end - start:
                raise LostBytes(f"{file}: {len(part)} bytes instead of {end - start}")
        return parts

    def _unreadable(self, path: str, rows: Rows, error: Exception) -> CacheCorrupt:
        return CacheCorrupt(
            f"Array {path} of {self.title} cannot be read: its bytes are not the committed ones.",
            where=f"{self.location}/{path}" + self._culprits(path, rows),
            got=str(error).splitlines()[0][:200] if str(error) else type(error).__name__,
            fix=self.advice(),
        )

    def _culprits(self, path: str, rows: Rows) -> str:
        """The rows whose chunks fail, found one by one; only after a failure, so its cost does not matter."""
        shape, spec = self._shapes.get(path), self.specs[path]
        if shape is None or spec.chunking == "whole":
            return ""
        bad = []
        for row in np.unique(_chosen(path, rows, shape[0])):
            try:
                self._chunks(path, self._of_rows(path, row[None]))
            except _Unreadable:
                bad.append(int(row))
        if not bad:
            return ""
        return f" ({', '.join(self.row_names(spec, bad[:5]))}{', ...' if len(bad) > 5 else ''})"


def _chosen(path: str, rows: Rows, length: int) -> Int[np.ndarray, " row"]:
    """Numbers of rows. IndexError for some that an array of this length does not have."""
    if isinstance(rows, np.ndarray):
        if len(rows) and (rows.min() < 0 or rows.max() >= length):
            raise IndexError(f"rows {rows.min()}..{rows.max()} of {path}, which has {length}")
        return rows
    return np.arange(length)[slice(None) if rows is None else rows]
