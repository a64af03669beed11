"""An open cache in other processes: forked, and by pickle."""

import multiprocessing

import numpy as np
import pytest

from inpo.common.cache import open_cache
from inpo.common.errors import CacheIncomplete, StorageError


def _read_in_child(cache, path, queue) -> None:
    try:
        queue.put(float(cache.shards["s0"].read(path).astype(np.float64).sum()))
    except StorageError as error:
        queue.put(str(error))


def _in_fork(cache, path) -> object:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(cache, path, queue))
    child.start()
    try:
        return queue.get(timeout=30)
    finally:
        child.kill()
        child.join()


def test_a_forked_worker_reads_a_local_cache(tmp_path, build):
    build.cache(tmp_path, pairs=(2,))
    cache = open_cache(str(tmp_path))
    cache.shards["s0"].read("pair/label")
    for path in ("x_t", "pair/label"):
        assert _in_fork(cache, path) == cache.shards["s0"].read(path).astype(np.float64).sum()


def test_a_forked_worker_of_an_object_store_is_told_instead_of_hanging(s3, build):
    build.cache(s3.location, pairs=(2,))
    cache = open_cache(s3.location)
    cache.shards["s0"].read("pair/label")
    for path in ("x_t", "pair/label"):
        assert "forked" in str(_in_fork(cache, path))


def test_errors_and_caches_cross_process_borders(tmp_path, build):
    import pickle

    build.cache(tmp_path, pairs=(2,))
    cache = open_cache(str(tmp_path))
    expected = cache.shards["s0"].read("x_t")
    prompts = cache.shards["s0"].prompts()
    again = pickle.loads(pickle.dumps(cache))
    assert np.array_equal(again.shards["s0"].read("x_t"), expected)
    assert list(again.shards["s0"].prompts()) == list(prompts)
    with pytest.raises(CacheIncomplete) as caught:
        cache.shards["s0"].read("delta_prev")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
