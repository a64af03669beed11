"""Arrays of one shard through zarr-python: how each is created, written, and opened."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec
from zarr.errors import UnstableSpecificationWarning

from common.cache.schema import SPECS, ArraySpec


@contextmanager
def quiet_strings() -> Iterator[None]:
    """zarr warns that variable-length strings have no final v3 specification; the contract accepts that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnstableSpecificationWarning)
        yield


def write_group(store: Store, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a plain zarr v3 group. Arrays must already have the contract's dtype and rank.

    Sharding codec with one file per big array; codecs bytes + crc32c, no compression; empty chunks are written, so
    that a missing chunk is always damage and never an implicit fill value.
    """
    with quiet_strings():
        zarr.create_group(store=store, zarr_format=3)
        for path in sorted({path.split("/")[0] for path in arrays if "/" in path}):
            zarr.create_group(store=store, path=path, zarr_format=3)
        for path, values in arrays.items():
            spec = SPECS[path]
            created = zarr.create_array(
                store=store,
                name=path,
                shape=values.shape,
                dtype="string" if spec.is_text else spec.dtype,
                chunks=inner_chunk(spec, values.shape),
                shards=None if spec.chunking == "whole" else values.shape,
                compressors=[Crc32cCodec()],
                filters=None if not spec.is_text else "auto",
                dimension_names=spec.axes,
                fill_value="" if spec.is_text else 0,
                config={"write_empty_chunks": True},
            )
            created[...] = values


def inner_chunk(spec: ArraySpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """1 pair and 1 step, 1 pair, or everything: see ArraySpec.chunking."""
    if spec.chunking == "pair_step":
        return (1, 1, *shape[2:])
    if spec.chunking == "pair":
        return (1, *shape[1:])
    return shape


def open_array(store: Store, path: str) -> zarr.Array[Any]:
    """Open one array of a shard for reading."""
    with quiet_strings():
        return zarr.open_array(store=store, path=path, mode="r", zarr_format=3)


__all__ = ["inner_chunk", "open_array", "quiet_strings", "write_group"]
