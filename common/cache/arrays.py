"""Arrays of one shard through zarr-python: how each is created, written, and opened."""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs.zstd import Zstd
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer, BufferPrototype, cpu
from zarr.core.sync import sync
from zarr.errors import UnstableSpecificationWarning
from zarr.storage import MemoryStore, WrapperStore

from inpo.common.cache.specs import CRC_BYTES, ArraySpec
from inpo.common.cache.store import check_process, digest_of_sample

ZSTD_LEVEL = 3
_CHUNKS_PER_BATCH = 64
if zarr.config.get("codec_pipeline.batch_size") == 1:
    # zarr's default decodes one chunk at a time; in batches the same bytes take half the time, to write and to read.
    zarr.config.set({"codec_pipeline.batch_size": _CHUNKS_PER_BATCH})


class LostBytes(EOFError):
    """A committed file is gone or shorter than committed."""


class CommittedStore(WrapperStore[Store]):
    """A shard's folder as its commit lists it.

    zarr reads a missing or empty chunk file as zeros. Here every answer is held against the committed size, at each
    read and not just when the shard is opened: a file may vanish at any time in a run of days.
    """

    def __init__(self, store: Store, files: Mapping[str, int], *, remote: bool = False) -> None:
        super().__init__(store)
        self._files = files
        self._remote = remote

    def _with_store(self, store: Store) -> "CommittedStore":
        return type(self)(store, self._files, remote=self._remote)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        if self._remote:
            check_process(key)
        size = self._files.get(key)
        if isinstance(byte_range, RangeByteRequest) and not byte_range.start <= byte_range.end <= (size or 0):
            # A chunk index that points out of its file: memory for what it asks must not be taken first.
            raise LostBytes(f"{key}: bytes {byte_range.start} to {byte_range.end} of {size}")
        found = await self._store.get(key, prototype, byte_range)
        if size is not None:
            wanted = _length(byte_range, size)
            if found is None or len(found) != wanted:
                got = "no such file" if found is None else f"{len(found)} bytes"
                raise LostBytes(f"{key}: {got} instead of {wanted} bytes")
        return found


class WrittenStore(WrapperStore[Store]):
    """A shard's folder on its way: remembers the size and the digest of every file as it was handed over."""

    def __init__(self, store: Store, written: dict[str, tuple[int, str]]) -> None:
        super().__init__(store)
        self._written = written

    def _with_store(self, store: Store) -> "WrittenStore":
        return type(self)(store, self._written)

    def _remember(self, key: str, value: Buffer) -> None:
        data = value.as_numpy_array().view(np.uint8).data
        self._written[key] = (len(data), digest_of_sample(data))

    async def set(self, key: str, value: Buffer) -> None:
        self._remember(key, value)
        await super().set(key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        self._remember(key, value)
        await super().set_if_not_exists(key, value)


def _length(byte_range: ByteRequest | None, size: int) -> int:
    """How many bytes a range of a file of `size` bytes has."""
    if isinstance(byte_range, RangeByteRequest):
        return byte_range.end - byte_range.start
    if isinstance(byte_range, OffsetByteRequest):
        return size - byte_range.offset
    if isinstance(byte_range, SuffixByteRequest):
        return byte_range.suffix
    return size


@contextmanager
def quiet_strings() -> Iterator[None]:
    """zarr warns that variable-length strings have no final v3 specification; the contract accepts that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnstableSpecificationWarning)
        yield


def write_group(store: Store, arrays: Mapping[str, np.ndarray], specs: Mapping[str, ArraySpec]) -> None:
    """Write a plain zarr v3 group. Arrays must already have the dtype and rank of their `specs`."""
    with quiet_strings():
        zarr.create_group(store=store, zarr_format=3)
        for path in sorted({path.split("/")[0] for path in arrays if "/" in path}):
            zarr.create_group(store=store, path=path, zarr_format=3)
        for path, values in arrays.items():
            spec = specs[path]
            array = _create(store, spec, values.shape)
            if spec.chunking == "whole":
                array[...] = values
            else:
                sync(store.set(spec.chunk_file, cpu.Buffer.from_bytes(_shard_file(values, spec))))


def _shard_file(values: np.ndarray, spec: ArraySpec) -> bytes:
    """What zarr's sharding codec makes of an array: its inner chunks and, last, their index, each with its CRC-32C.

    By hand, as chunks are read: zarr spends a tenth of a millisecond of Python on every one (docs/log.md).
    """
    rows = math.prod(values.shape[: spec.num_cut])
    plain = values.astype(spec.numpy_dtype.newbyteorder("<"), copy=False).reshape(rows, -1)
    encode = Zstd(level=ZSTD_LEVEL).encode if spec.compressed else bytes
    chunks = [_with_checksum(encode(row.tobytes())) for row in plain]
    sizes = np.array([len(chunk) for chunk in chunks], np.uint64)
    index = np.stack([np.cumsum(sizes) - sizes, sizes], axis=1)
    return b"".join([*chunks, _with_checksum(index.astype("<u8").tobytes())])


def _with_checksum(data: bytes) -> bytes:
    checksum: int = google_crc32c.value(data)
    return data + checksum.to_bytes(CRC_BYTES, "little")


def _create(store: Store, spec: ArraySpec, shape: tuple[int, ...]) -> zarr.Array[Any]:
    """Sharding codec with one file per big array; codecs bytes, zstd for texts, crc32c; empty chunks are written, so
    that a missing chunk is always damage and never an implicit fill value."""
    return zarr.create_array(
        store=store,
        name=spec.path,
        shape=shape,
        dtype="string" if spec.is_text else spec.dtype,
        chunks=spec.inner_chunk(shape),
        shards=None if spec.chunking == "whole" else shape,
        compressors=[ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()] if spec.compressed else [Crc32cCodec()],
        filters=None if not spec.is_text else "auto",
        dimension_names=spec.axes,
        fill_value="" if spec.is_text else 0,
        config={"write_empty_chunks": True},
    )


@lru_cache(maxsize=512)
def _contract(spec: ArraySpec, shape: tuple[int, ...]) -> dict[str, Any]:
    """The metadata that an array of this shape has by the contract. Nothing of the array's size is made for it."""
    with quiet_strings():
        return _metadata(_create(MemoryStore(), spec, shape))


def _metadata(array: zarr.Array[Any]) -> dict[str, Any]:
    return {name: value for name, value in array.metadata.to_dict().items() if name != "attributes"}


def metadata_problem(array: zarr.Array[Any], spec: ArraySpec) -> str | None:
    """The first entry of an opened array's metadata that is not the contract's (chunks, codecs, axes), or None."""
    found, expected = _metadata(array), _contract(spec, array.shape)
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            return f"{name} {ascii(found.get(name))[:200]} instead of {ascii(expected.get(name))[:200]}"
    return None


def open_array(store: Store, path: str) -> zarr.Array[Any]:
    """Open one array of a shard for reading."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what zarr finds odd in foreign metadata is refused by `metadata_problem`
        return zarr.open_array(store=store, path=path, mode="r", zarr_format=3)


FRAME_HEADER_BYTES = 18
"""Of zstd, at most."""
_FRAME_MAGIC = b"\x28\xb5\x2f\xfd"


def frame_content(header: bytes) -> int | None:
    """How many bytes a zstd frame says that it holds (RFC 8878, 3.1.1.1), which is what a decoder takes at once.

    None: it does not say, or is no such frame.
    """
    if len(header) < 5 or header[:4] != _FRAME_MAGIC:
        return None
    descriptor = header[4]
    is_single, size_flag = descriptor & 0x20, descriptor >> 6
    start = 5 + (not is_single) + (0, 1, 2, 4)[descriptor & 3]
    length = (1 if is_single else 0, 2, 4, 8)[size_flag]
    field = header[start : start + length]
    if not length or len(field) < length:
        return None
    return int.from_bytes(field, "little") + (256 if length == 2 else 0)


__all__ = [
    "FRAME_HEADER_BYTES",
    "CommittedStore",
    "LostBytes",
    "frame_content",
    "metadata_problem",
    "open_array",
    "quiet_strings",
    "write_group",
]
