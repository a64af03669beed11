"""What reading asks of a store, and what it leaves in memory."""

import gc
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from inpo.common.cache import open_cache
from inpo.common.cache.reader import Shard
from inpo.common.cache.store import CacheStore
from inpo.precompute.texts import TextTable
from tests.cache.forging import attempt_of, forge_file


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a store was asked for what."""
    counts: Counter[str] = Counter()
    for name in ("get", "ranges", "listing", "zarr"):
        real = getattr(CacheStore, name)

        def count(self: CacheStore, *arguments: Any, real: Any = real, name: str = name, **options: Any) -> Any:
            counts[name] += 1
            return real(self, *arguments, **options)

        monkeypatch.setattr(CacheStore, name, count)
    return counts


def test_a_small_array_costs_two_requests_and_then_one(whole, asked):
    shard = open_cache(str(whole)).shards["s0"]
    asked.clear()
    paths = ("pair/id", "pair/win", "pair/label", "reference_error", "image/group")
    for path in paths:
        shard.read(path)
    assert asked == {"listing": 1, "ranges": 2 * len(paths)}  # its metadata, its one chunk
    asked.clear()
    for path in paths:
        shard.read(path, np.array([1]))
    assert asked == {"ranges": len(paths)}


def test_records_cost_a_request_once_metadata_sample_and_index_are_known(whole, asked):
    shard = open_cache(str(whole)).shards["s0"]
    shard.read_records("x_t", np.array([0]), np.array([1]))
    asked.clear()
    shard.read_records("x_t", np.array([4, 1]), np.array([0, 1]))
    assert asked == {"ranges": 1}


def test_the_table_of_texts_asks_four_times_for_each(whole, build, asked):
    writer = build.writer(whole, open_cache(str(whole)).manifest)
    asked.clear()
    table = TextTable(writer)
    assert table.names == {"empty", "t0", "t1"}
    assert asked == {"get": 3, "listing": 1 + 3, "ranges": 2 * 3}  # one of them lists the names of all
    assert table.place("prompt 1 2 ä") == ("t1", 2)


def test_a_visited_shard_leaves_nothing_of_the_size_of_its_arrays(tmp_path, build):
    """Its 400 chunks of an array have an index of 6,400 bytes."""
    build.cache(tmp_path, pairs=(20,), steps=10, latent=(1, 1, 1))
    cache = open_cache(str(tmp_path))
    visited = [Shard(cache, "s0", cache.commits["s0"]) for _ in range(9)]

    def visit(shard: Shard) -> None:
        for path in ("x_t", "target", "delta", "reference_error", "pair/id"):
            shard.read(path, np.array([3, 1]))

    visit(visited[0])
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for shard in visited[1:]:
        visit(shard)
    gc.collect()
    kept = (tracemalloc.get_traced_memory()[0] - before) / 8
    tracemalloc.stop()
    assert kept < 6400


def reversed_chunks(data: bytes, chunks: int) -> bytes:
    """A file of the sharding codec whose chunks stand in the other order; its index says so."""
    index = np.frombuffer(data[-4 - 16 * chunks : -4], "<u8").reshape(chunks, 2).copy()
    parts = [data[start : start + size] for start, size in index.tolist()]
    index[:, 0] = np.cumsum(index[::-1, 1])[::-1] - index[:, 1]
    table = index.tobytes()
    return b"".join([*reversed(parts), table, google_crc32c.value(table).to_bytes(4, "little")])


@pytest.mark.parametrize(("owner", "path", "chunks"), [("s0", "x_t", 12), ("texts/t0", "embedding", 4)])
def test_chunks_are_where_the_index_says(folder: Path, owner: str, path: str, chunks: int) -> None:
    """Other writers of the format put them in another order."""

    def read() -> np.ndarray:
        cache = open_cache(str(folder))
        found = cache.shards[owner] if owner == "s0" else cache.texts.need("t0")
        return found.read_stored(path, np.array([2, 0, 3, 0]))

    before = read()
    (file,) = [each for each in (attempt_of(folder, owner) / path / "c").rglob("*") if each.is_file()]
    name = str(file.relative_to(attempt_of(folder, owner)))
    assert reversed_chunks(file.read_bytes(), chunks) != file.read_bytes()
    forge_file(folder, name, reversed_chunks(file.read_bytes(), chunks), owner)
    assert read().tobytes() == before.tobytes()


def test_rows_that_an_array_lacks_are_an_error_of_the_caller(whole):
    shard = open_cache(str(whole)).shards["s0"]
    for path in ("x_t", "pair/win"):
        for rows in ([0, 6], [-1]):
            with pytest.raises(IndexError, match=f"{path}, which has"):
                shard.read(path, np.array(rows))
    with pytest.raises(IndexError, match=r"x_t, which has \[6, 2\]"):
        shard.read_records("x_t", np.array([0]), np.array([2]))
