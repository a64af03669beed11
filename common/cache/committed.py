"""A committed attempt: a plain zarr v3 group, checked against its commit before the first byte is trusted."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import google_crc32c
import numpy as np
import zarr
from jaxtyping import Int, Shaped
from numcodecs.zstd import Zstd
from obstore.exceptions import NotFoundError

from inpo.common.cache.arrays import (
    FRAME_HEADER_BYTES,
    CommittedStore,
    LostBytes,
    frame_content,
    metadata_problem,
    open_array,
)
from inpo.common.cache.commits import AnyCommit
from inpo.common.cache.document import MAX_WHOLE_BYTES, load
from inpo.common.cache.specs import CRC_BYTES, INDEX_BYTES, ArraySpec
from inpo.common.cache.store import CacheStore
from inpo.common.durable import storage_errors
from inpo.common.errors import CacheCorrupt, CacheSchemaError, InpoError, command

_Unreadable = (ValueError, KeyError, TypeError, AttributeError, EOFError, RuntimeError)
"""What zarr raises for bytes that it cannot decode and for metadata that it cannot read."""

Rows = Int[np.ndarray, " row"] | slice | None


class CommittedArrays:
    """The arrays of one committed attempt. Read on demand, whole or some rows; nothing is kept."""

    def __init__(self, store: CacheStore, folder: str, commit: AnyCommit, specs: Mapping[str, ArraySpec]) -> None:
        self.store = store
        self.folder = folder
        self.specs = specs
        self._files = commit.files
        self._digests = commit.digests
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._indexes: dict[str, Int[np.ndarray, "*grid 2"]] = {}
        self._compared: set[str] = set()
        """Files whose digest was the committed one."""

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

        zarr returns silent zeros for a missing chunk file, and for an empty one, so this comes before the first read.
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

    def _open(self, path: str) -> zarr.Array[Any]:
        """Open an array after checking that its files are the committed ones and not another's."""
        for file in self._files:
            folder = file.removesuffix("zarr.json")  # the array's own metadata, and that of the groups above it
            if file in self._compared:
                continue
            if file.startswith(f"{path}/c") or (folder != file and f"{path}/".startswith(folder)):
                expected = self._digests.get(file)
                found = self.store.sample_digest(f"{self.folder}/{file}", self._files[file])
                if found != expected:
                    raise self._corrupt(
                        "A file is not the committed one", file, expected=f"digest {expected}", got=found
                    )
                self._compared.add(file)
        spec = self.specs[path]
        self._check_metadata(spec)
        array = open_array(self._zarr, path)
        problem = metadata_problem(array, spec)
        if problem is not None:
            raise self.misfit(path, problem)
        return array

    @cached_property
    def _zarr(self) -> CommittedStore:
        return CommittedStore(self.store.zarr(self.folder), self._files, remote=self.store.remote)

    def _array(self, path: str) -> zarr.Array[Any]:
        if path not in self._arrays:
            self._arrays[path] = self._open(path)
        return self._arrays[path]

    def _check_metadata(self, spec: ArraySpec) -> None:
        """Shape and dtype are the contract's and the array's file has just the bytes that they take.

        Looked at before zarr sees the metadata: what it says is how much memory is asked for.
        """
        path = spec.path
        document = load(self.store.get(f"{self.folder}/{path}/zarr.json") or b"", f"{self.location}/{path}")
        shape, dtype = document.get("shape"), document.get("data_type")
        if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
            raise self.misfit(path, f"shape {ascii(shape)[:100]}")
        if dtype != spec.dtype:
            raise self.misfit(path, f"{ascii(dtype)[:100]} instead of {spec.dtype}")
        problem = spec.problem(tuple(shape), spec.numpy_dtype, self.lengths())
        size, wanted = self._files[spec.chunk_file], spec.chunk_bytes(shape)
        if problem is None and wanted is not None and size != wanted:
            problem = f"{size} bytes instead of the {wanted} of {spec.dtype} {shape}"
        if problem is None and spec.compressed:
            problem = spec.too_large(shape) or self._frames_problem(spec, shape)
        if problem is None and spec.is_text:
            # How many texts there are is the first number of the chunk, and how many objects a decoder makes.
            (chunk,) = self._ranges(spec.chunk_file, [(0, size if spec.compressed else min(size, 4))])
            head = bytes(Zstd().decode(chunk[:-CRC_BYTES])) if spec.compressed else chunk
            count = int.from_bytes(head[:4], "little")
            if count != shape[0]:
                problem = f"{count} texts instead of {shape[0]}"
        if problem is not None:
            raise self.misfit(path, problem)

    def _frames_problem(self, spec: ArraySpec, shape: list[int]) -> str | None:
        """What is wrong with what the frames of a compressed array say that they hold, or None."""
        file, size = spec.chunk_file, self._files[spec.chunk_file]
        frames = np.array([[0, size]])
        if spec.chunking != "whole":
            start = size - CRC_BYTES - INDEX_BYTES * shape[0]
            if start <= 0:
                return f"{size} bytes with an index of {shape[0]} chunks"
            (index,) = self._ranges(file, [(start, size - CRC_BYTES)])
            frames = np.frombuffer(index, "<u8").reshape(-1, 2)
        spans: list[tuple[int, int]] = []
        for start, length in frames.tolist():
            if length <= CRC_BYTES or start + length > size:
                return f"a chunk of {length} bytes at {start} in a file of {size}"
            spans.append((start, start + min(length, FRAME_HEADER_BYTES)))
        most = MAX_WHOLE_BYTES if spec.is_text else math.prod(spec.inner_chunk(shape)) * spec.numpy_dtype.itemsize
        for content in map(frame_content, self._ranges(file, spans)):
            if content is None or content > most or (content < most and not spec.is_text):
                return f"a chunk that is to hold {content} bytes instead of {'at most ' * spec.is_text}{most}"
        return None

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
        """A stored array as numpy, whole or some rows of its first axis; see `Shard.read`."""
        self._verified  # noqa: B018  (a cached check, not a value)
        with storage_errors("read the cache", f"{self.location}/{path}"):
            try:
                array = self._array(path)
                values: Any
                if isinstance(rows, np.ndarray):
                    values = _read_rows(array, rows, path)
                else:
                    values = array[...] if rows is None else array[rows]
                self.check_values(path, np.asarray(values))
            except InpoError:
                raise
            except _Unreadable as error:
                raise self._unreadable(path, rows, error) from error
        return np.asarray(values)

    def read_chunks(self, path: str, places: Int[np.ndarray, "chunk axis"]) -> Shaped[np.ndarray, "chunk ..."]:
        """Single inner chunks of an array that is cut by prompt, by image, or by image and record, as `places` say.

        The file's index is read once and each chunk as one range: through zarr a chunk costs about a millisecond of
        Python (docs/log.md). Sizes and checksums are looked at as zarr does, and nothing is decompressed into more
        than the chunk's own bytes. Raises as `read_stored`.
        """
        self._verified  # noqa: B018  (a cached check, not a value)
        spec = self.specs[path]
        with storage_errors("read the cache", f"{self.location}/{path}"):
            try:
                spans = self._chunk_index(path)[tuple(places.T)]
                values = np.empty((len(places), *self._array(path).shape[spec.num_cut :]), spec.numpy_dtype)
                order = np.argsort(spans[:, 0], kind="stable")
                ends = spans.sum(1)
                # Neighbours are read as one.
                breaks = np.flatnonzero(spans[order][1:, 0] != ends[order][:-1]) + 1
                runs = np.split(order, breaks) if len(order) else []
                read = self._ranges(spec.chunk_file, [(int(spans[run[0], 0]), int(ends[run[-1]])) for run in runs])
                for run, data in zip(runs, read, strict=True):
                    for number in run.tolist():
                        start, stop = (spans[number, 0] - spans[run[0], 0], ends[number] - spans[run[0], 0])
                        _decode(data[start:stop], values[number : number + 1], compressed=spec.compressed)
            except InpoError:
                raise
            except _Unreadable as error:
                raise self._unreadable(path, np.unique(places[:, 0]), error) from error
        return values

    def _chunk_index(self, path: str) -> Int[np.ndarray, "*grid 2"]:
        """(offset, bytes) of every inner chunk, from the end of the array's file."""
        if path not in self._indexes:
            spec, shape = self.specs[path], self._array(path).shape
            grid, size = shape[: spec.num_cut], self._files[spec.chunk_file]
            (data,) = self._ranges(spec.chunk_file, [(size - math.prod(grid) * INDEX_BYTES - CRC_BYTES, size)])
            index = np.frombuffer(_without_checksum(data), "<u8").reshape(*grid, 2)
            wanted = math.prod(shape[spec.num_cut :]) * spec.numpy_dtype.itemsize + CRC_BYTES
            end = size - len(data)
            if (index > end).any() or (index.sum(-1) > end).any() or (index[..., 1] <= CRC_BYTES).any():
                raise ValueError("a chunk index that points out of its file")
            if not spec.compressed and (index[..., 1] != wanted).any():
                raise ValueError("a chunk of another size")
            self._indexes[path] = index.astype(np.int64)
        return self._indexes[path]

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
        if path not in self._arrays or self.specs[path].chunking == "whole":
            return ""
        array = self._arrays[path]
        bad = []
        for row in np.arange(array.shape[0])[rows if rows is not None else slice(None)]:
            try:
                array[int(row)]
            except _Unreadable:
                bad.append(int(row))
        if not bad:
            return ""
        return f" ({', '.join(self.row_names(self.specs[path], bad[:5]))}{', ...' if len(bad) > 5 else ''})"


def _without_checksum(data: bytes) -> bytes:
    """What a CRC-32C at its end is of. Raises ValueError if it is of something else."""
    if google_crc32c.value(data[:-CRC_BYTES]) != int.from_bytes(data[-CRC_BYTES:], "little"):
        raise ValueError("a checksum does not fit")
    return data[:-CRC_BYTES]


def _decode(data: bytes, out: np.ndarray, *, compressed: bool) -> None:
    """Undo the codecs of one chunk into `out`. Raises ValueError, RuntimeError for what is not a chunk of its size."""
    content = _without_checksum(data)
    if not compressed:
        out[...] = np.frombuffer(content, out.dtype).reshape(out.shape)
    elif frame_content(content) != out.nbytes:
        raise ValueError(f"{frame_content(content)} bytes in a chunk of {out.nbytes}")
    else:
        Zstd().decode(content, out=out)


def _read_rows(array: zarr.Array[Any], rows: Int[np.ndarray, " row"], path: str) -> Any:
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
