"""Races, object stores, refusing disks: one winner, a clear error, and what is committed stays."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import boto3
import numpy as np
import pytest
import zarr

from inpo.common.cache import CacheWriter, TextData, open_cache
from inpo.common.cache import store as store_module
from inpo.common.cache.store import CacheStore
from inpo.common.conditions import Condition
from inpo.common.errors import CacheCorrupt, CacheIncomplete, StorageError, UsageError

NUM_WRITERS = 16
ROOT = Path(__file__).parents[2]


def race(location: str, manifest, shards) -> list[bool]:
    """16 writers, each a client of its own, open the cache and commit the same shard at the same moment."""
    barrier = threading.Barrier(NUM_WRITERS)

    def write(index: int) -> bool:
        barrier.wait()
        writer = CacheWriter.open(location, manifest)
        if isinstance(shards[index], TextData):
            return writer.write_texts("t0", shards[index]) is not None
        return writer.write("s0", shards[index]) is not None

    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        return list(pool.map(write, range(NUM_WRITERS)))


def check_race(location: str, won: list[bool], shards) -> None:
    assert sum(won) == 1
    cache = open_cache(location)
    assert list(cache.shards) == ["s0"]
    read = cache.shards["s0"]
    winner = shards[won.index(True)]
    for path in ("pair/id", "x0", "x_t", "timestep", "group/id"):
        assert np.array_equal(read.read(path), winner.arrays[path])
    attempts = {name.split("/")[0] for name in cache.store.listing("shards/s0")}
    assert len(attempts) == NUM_WRITERS
    assert read.commit.attempt in attempts
    assert not [name for name in cache.store.listing("") if name.endswith(".staged")]


def test_of_16_racing_threads_one_commits(tmp_path, build):
    manifest = build.manifest()
    shards = [build.shard(manifest, 2, seed=seed) for seed in range(NUM_WRITERS)]
    check_race(str(tmp_path), race(str(tmp_path), manifest, shards), shards)


def test_of_16_racing_threads_one_commits_its_texts(tmp_path, build):
    manifest = build.manifest()
    shards = [build.texts(manifest, seed) for seed in range(NUM_WRITERS)]
    won = race(str(tmp_path), manifest, shards)
    assert sum(won) == 1
    texts = open_cache(str(tmp_path), allow_empty=True).texts
    assert [shard.name for shard in texts] == ["t0"]
    for path, values in shards[won.index(True)].arrays.items():
        assert np.array_equal(texts.need("t0").read_stored(path), values)
    attempts = {name.split("/")[0] for name in texts.store.listing("texts/t0")}
    assert len(attempts) == NUM_WRITERS
    assert texts.need("t0").commit.attempt in attempts


def test_of_16_racing_writers_one_commits_on_s3(s3, build):
    barrier = threading.Barrier(NUM_WRITERS)

    def write(index: int) -> list[bool]:
        store = CacheStore(s3.location, create=True)
        barrier.wait()
        return [store.put_new(f"commits/{name}.json", b"%d" % index) for name in range(4)]

    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        won = np.array(list(pool.map(write, range(NUM_WRITERS))))
    assert (won.sum(axis=0) == 1).all()
    store = CacheStore(s3.location)
    for name, index in enumerate(won.argmax(axis=0)):
        assert store.get(f"commits/{name}.json") == b"%d" % index


def test_a_lost_race_on_s3_leaves_an_orphan(s3, build):
    manifest = build.cache(s3.location, pairs=(1,), profile="lean")
    writer = CacheWriter.open(s3.location, manifest)
    assert writer.write("s0", build.shard(manifest, 1, seed=5)) is None
    assert writer.write_texts("t0", build.texts(manifest, 5)) is None
    cache = open_cache(s3.location)
    assert list(cache.shards["s0"].read("pair/id")) == ["pair-0-0 ä"]
    assert cache.texts.need("t0").text[0] == "prompt 0 0 ä"
    for place in ("shards/s0", "texts/t0"):
        assert len({name.split("/")[0] for name in writer.store.listing(place)}) == 2


_FORK = """
import os, sys, time
from inpo.common.cache.store import CacheStore
location, start = sys.argv[1], time.time() + 0.5
children = []
for index in range(16):
    child = os.fork()
    if child == 0:
        store = CacheStore(location, create=True)
        time.sleep(max(0.0, start - time.time()))
        for name in range(20):
            if store.put_new(f"commits/{name}.json", b"%d" % index * 5000):
                os.write(1, f"{name} {index}\\n".encode())  # one write, so that lines do not mix
        os._exit(0)
    children.append(child)
sys.exit(max(os.waitpid(child, 0)[1] for child in children))
"""


def test_of_16_racing_processes_one_wins_each_name(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _FORK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    winners = dict(line.split() for line in done.stdout.splitlines())
    assert len(done.stdout.splitlines()) == len(winners) == 20
    for name, index in winners.items():
        assert (tmp_path / "commits" / f"{name}.json").read_bytes() == index.encode() * 5000
    assert len(list((tmp_path / "commits").iterdir())) == 20


def test_put_new_in_any_name_and_never_over_another(tmp_path):
    store = CacheStore(str(tmp_path))
    for name in ("manifest.json", "commits/a b.json", "commits/ü~%20#1.json", "skipped/x&y[z]/0.jsonl"):
        assert store.put_new(name, b"first")
        assert not store.put_new(name, b"second")
        assert store.get(name) == b"first"
        assert (tmp_path / name).read_bytes() == b"first"
    assert store.get("commits/none.json") is None
    assert store.listing("nothing") == {}


def test_the_whole_life_on_s3(s3, build):
    manifest = build.cache(s3.location, pairs=(3, 2), latent=(4, 16, 16), **build.everything)
    cache = open_cache(s3.location)
    assert (cache.num_pairs, list(cache.shards)) == (5, ["s0", "s1"])
    for index, shard in enumerate(cache):
        for path, values in build.shard(manifest, (3, 2)[index], seed=index).arrays.items():
            assert shard.read(path).tobytes() == np.asarray(values, shard.read(path).dtype).tobytes(), path
    assert np.array_equal(cache.shards["s0"].read("x0", np.array([2, 0])), cache.shards["s0"].read("x0")[[2, 0]])
    for index, texts in enumerate([None, 0, 1]):
        shard = list(cache.texts)[index]
        for path, values in build.texts(manifest, texts).arrays.items():
            got = shard.read_stored(path)
            assert got.tobytes() == np.asarray(values, got.dtype).tobytes(), path
            assert np.array_equal(shard.read_stored(path, np.array([0])), got[:1])
    told = Condition.of(cache.shards["s0"], np.array([5, 0]))
    assert told["embedding"].shape == (2, 9, 6)

    file = f"{cache.shards['s0'].folder}/x_t/c/0/0/0/0/0"
    data = bytearray(cache.store.get(file))
    cache.store.remove(file)
    for shard in (cache.shards["s0"], open_cache(s3.location).shards["s0"]):
        with pytest.raises(CacheCorrupt, match="x_t of shard s0"):
            shard.read("x_t")
    data[len(data) // 3] ^= 1
    assert cache.store.put_new(file, bytes(data))
    with pytest.raises(CacheCorrupt, match=r"x_t of shard s0(.|\n)*pair"):
        open_cache(s3.location).shards["s0"].read("x_t")
    with pytest.raises(CacheIncomplete):
        open_cache(s3.location).find("nobody")

    texts = cache.texts.need("t0")
    file = f"{texts.folder}/embedding/c/0/0/0"
    cache.store.remove(file)
    for shard in (texts, open_cache(s3.location).texts.need("t0")):
        with pytest.raises(CacheCorrupt, match="embedding of text shard t0"):
            shard.read_stored("embedding")

    cache.store.move("commits/s0.json", "quarantine/s0.json")
    cache.store.move("text-commits/t0.json", "quarantine/texts/t0.json")
    cache = open_cache(s3.location)
    assert list(cache.shards) == ["s1"]
    assert [shard.name for shard in cache.texts] == ["empty", "t1"]
    cache.store.remove("shards/s0")
    assert cache.store.listing("shards/s0") == {}


@pytest.fixture
def quick(monkeypatch):
    """The same retries, in less time."""
    retry = {
        "max_retries": 4,
        "retry_timeout": timedelta(seconds=10),
        "backoff": {"init_backoff": timedelta(milliseconds=5), "max_backoff": timedelta(milliseconds=20), "base": 2},
    }
    monkeypatch.setattr(store_module, "RETRY", retry)


def test_s3_answers_503_and_recovers(s3, build, quick):
    manifest = build.manifest(profile="lean")
    writer = CacheWriter.open(s3.location, manifest)
    s3.failures = 3
    assert writer.write_texts("t0", build.texts(manifest)) is not None
    s3.failures = 3
    assert writer.write("s0", build.shard(manifest, 2)) is not None
    assert (s3.failures, s3.refused) == (0, 6)
    s3.failures = 3
    cache = open_cache(s3.location)
    s3.failures = 3
    assert np.array_equal(cache.shards["s0"].read("x0"), build.shard(manifest, 2).arrays["x0"])
    s3.failures = 3
    texts = cache.texts.need("t0")
    assert np.array_equal(texts.read_stored("embedding"), build.texts(manifest).arrays["embedding"])
    assert s3.refused == 15


def test_s3_answers_503_for_ever(s3, build, quick):
    manifest = build.cache(s3.location, pairs=(2,), profile="lean")
    cache = open_cache(s3.location)
    writer = CacheWriter.open(s3.location, manifest)
    s3.failures = -1
    attempts = {
        "read": lambda: open_cache(s3.location),
        "list": lambda: cache.shards["s0"].read("x0"),
        "write": lambda: writer.write("s1", build.shard(manifest, 2)),
    }
    for action, attempt in attempts.items():
        before = s3.refused
        with pytest.raises(StorageError) as caught:
            attempt()
        assert s3.refused - before >= 5  # one try and four more
        message = str(caught.value)
        for part in (f"Could not {action}", s3.location, "503", "what is committed stays"):
            assert part in message
    s3.failures = 0
    assert open_cache(s3.location).num_pairs == 2
    assert writer.write("s1", build.shard(manifest, 2)) is not None


def test_a_commit_that_arrived_although_its_answer_was_lost_is_ours(s3, monkeypatch):
    store = CacheStore(s3.location, create=True)
    real = store_module.obstore.put

    def put_twice(*arguments, **options):  # what a client does that saw no answer to its first request
        real(*arguments, **options)
        return real(*arguments, **options)

    monkeypatch.setattr(store_module.obstore, "put", put_twice)
    assert store.put_new("commits/a.json", b"mine")
    monkeypatch.undo()
    assert store.get("commits/a.json") == b"mine"
    assert not store.put_new("commits/a.json", b"another's")


@pytest.mark.parametrize("name", ["run#2", "p%20c", "a b", "100%", "ü~[1]*:+'"])
def test_the_key_of_an_address_is_taken_letter_by_letter(s3, name):
    address = f"{s3.location}/{name}"
    for other in (s3.location, f"{s3.location}/run", f"{s3.location}/p c"):  # what a URL would make of it
        CacheStore(other, create=True).put_new("manifest.json", b"another's")
    store = CacheStore(address, create=True)
    assert store.put_new("manifest.json", b"{}")
    zarr.create_group(store.zarr("shards/s0/a", read_only=False))
    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    keys = {each["Key"] for each in client.list_objects_v2(Bucket=bucket)["Contents"]}
    assert {f"{prefix}/manifest.json", f"{prefix}/shards/s0/a/zarr.json"} <= keys
    assert len(keys) == 5
    assert set(store.listing("")) == {"manifest.json", "shards/s0/a/zarr.json"}
    assert zarr.open_group(CacheStore(f"{address}/").zarr("shards/s0/a"), mode="r").metadata is not None


@pytest.mark.parametrize("end", ["?v=2", "x?", "a//b", "a/../b", "./a", "..", "#2"])
def test_an_address_of_which_a_part_would_be_lost_is_refused(end):
    address = "http://host/" if end == "#2" else "s3://bucket/"  # in a web address alone # is no letter
    with pytest.raises(UsageError, match="cannot be a cache's") as caught:
        CacheStore(address + end, create=True)
    assert "s3://bucket/path" in str(caught.value)


def test_a_login_in_the_address_of_a_bucket_is_refused_and_not_shown() -> None:
    with pytest.raises(StorageError, match="has no login") as caught:
        CacheStore("s3://KEY:pw42@bucket/cache")
    assert "pw42" not in str(caught.value)
