"""Arrays of one shard: written as a plain zarr v3 group, and how their metadata and their chunks are read."""

import math
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs.vlen import VLenUTF8
from numcodecs.zstd import Zstd
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer, cpu
from zarr.core.metadata import ArrayMetadata, ArrayV3Metadata
from zarr.core.sync import sync
from zarr.errors import UnstableSpecificationWarning
from zarr.storage import MemoryStore, WrapperStore

from inpo.common.cache.document import MAX_WHOLE_BYTES
from inpo.common.cache.specs import CRC_BYTES, ArraySpec
from inpo.common.cache.store import digest_of_sample

ZSTD_LEVEL = 3
_parsing = threading.Lock()
"""Which warnings are shown is the process's; two threads that change it at once leave it changed."""


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


@contextmanager
def _quiet_strings() -> Iterator[None]:
    """zarr warns that variable-length strings have no final v3 specification; the contract accepts that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnstableSpecificationWarning)
        yield


def write_group(store: Store, arrays: Mapping[str, np.ndarray], specs: Mapping[str, ArraySpec]) -> None:
    """Write a plain zarr v3 group. Arrays must already have the dtype and rank of their `specs`."""
    with _quiet_strings():
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
    with _quiet_strings():
        return _metadata(_create(MemoryStore(), spec, shape).metadata)


def _metadata(found: ArrayMetadata) -> dict[str, Any]:
    return {name: value for name, value in found.to_dict().items() if name != "attributes"}


def metadata_problem(document: dict[str, Any], spec: ArraySpec) -> str | None:
    """The first entry of an array's zarr.json that is not the contract's (chunks, codecs, axes), or None.

    Raises what zarr raises for what it cannot read.
    """
    with _parsing, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what zarr finds odd in foreign metadata is refused below
        found = _metadata(ArrayV3Metadata.from_dict(document))
        expected = _contract(spec, tuple(document["shape"]))
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            return f"{name} {ascii(found.get(name))[:200]} instead of {ascii(expected.get(name))[:200]}"
    return None


_FRAME_MAGIC = b"\x28\xb5\x2f\xfd"


def _frame_content(frame: bytes) -> int | None:
    """How many bytes a zstd frame says that it holds (RFC 8878, 3.1.1.1), which is what a decoder takes at once.

    None: it does not say, or is no such frame.
    """
    if len(frame) < 5 or frame[:4] != _FRAME_MAGIC:
        return None
    descriptor = frame[4]
    is_single, size_flag = descriptor & 0x20, descriptor >> 6
    start = 5 + (not is_single) + (0, 1, 2, 4)[descriptor & 3]
    length = (1 if is_single else 0, 2, 4, 8)[size_flag]
    field = frame[start : start + length]
    if not length or len(field) < length:
        return None
    return int.from_bytes(field, "little") + (256 if length == 2 else 0)


def without_checksum(data: bytes) -> bytes:
    """What the CRC-32C at its end is of. Raises ValueError if it is of something else."""
    if google_crc32c.value(data[:-CRC_BYTES]) != int.from_bytes(data[-CRC_BYTES:], "little"):
        raise ValueError("a checksum does not fit")
    return data[:-CRC_BYTES]


def decode(data: bytes, out: np.ndarray, *, compressed: bool) -> None:
    """Undo the codecs of one chunk into `out`: checksum, zstd where it is `compressed`, bytes.

    By hand, as chunks are written. Raises ValueError, RuntimeError for what is no chunk of the size of `out`.
    """
    content = without_checksum(data)
    if not compressed:
        out[...] = np.frombuffer(content, out.dtype).reshape(out.shape)
    elif _frame_content(content) != out.nbytes:
        raise ValueError(f"{_frame_content(content)} bytes in a chunk of {out.nbytes}")
    else:
        Zstd().decode(content, out=out)


def decode_texts(data: bytes, count: int, *, compressed: bool) -> np.ndarray:
    """The chunk of an array of `count` texts. Raises as `decode`."""
    content = without_checksum(data)
    if compressed:
        size = _frame_content(content)
        if size is None or size > MAX_WHOLE_BYTES:
            raise ValueError(f"{size} bytes of texts, limit {MAX_WHOLE_BYTES}")
        content = bytes(Zstd().decode(content))
    found = int.from_bytes(content[:4], "little")  # how many objects a decoder makes
    if found != count:
        raise ValueError(f"{found} texts instead of {count}")
    return np.asarray(VLenUTF8().decode(content)).astype(np.dtypes.StringDType())


__all__ = ["decode", "decode_texts", "metadata_problem", "without_checksum", "write_group"]
