"""The Ray engine on a real cluster of two CPU workers; deaths, joining nodes, stopping."""

import builtins
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from inpo.common.errors import UsageError
from inpo.common.recipe import resolve
from inpo.precompute.engines.ray_cluster import connect, has_gpus, places
from inpo.precompute.settings import RayOptions
from tests.engines.runs import (
    NUM_SHARDS,
    ROOT,
    Tensors,
    World,
    assert_same,
    attempts,
    kill_a_ray_worker,
    tensors,
    until,
    write_pairs,
)
from tests.launching import Zygote

pytestmark = pytest.mark.timeout(600)


def test_a_worker_killed_in_mid_shard_costs_only_what_it_had_in_flight(
    zygote: Zygote, world: World, uninterrupted: Tensors, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    run = zygote.start(world.arguments(cache, "--engine", "ray", "--ray-workers", "2", "--decode-workers", "1"))
    before = kill_a_ray_worker(run, cache)
    assert run.wait() == 0, run.text()
    assert before.items() <= attempts(cache).items(), "a committed shard was made again"
    assert_same(tensors(cache), uninterrupted)
    output = run.text()
    assert "1 of them died" in output
    again = re.search(r"handed out again: (.*); [\d.]+ s of work lost", output)
    retried = again[1].split(", ") if again else []
    assert len(retried) <= 3
    assert not set(retried) & before.keys()
    assert f"committed: {NUM_SHARDS} of {NUM_SHARDS} shards" in output


@pytest.mark.slow
def test_a_shard_that_kills_every_worker_takes_no_other_with_it(
    zygote: Zygote, world: World, uninterrupted: Tensors, tmp_path: Path
) -> None:
    # Code that every new Python process runs first: the worker that computes this shard ends there and then.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'inpo.precompute.engines.ray_worker':\n"
        "            sys.meta_path.remove(self)\n"
        "            import os, inpo.precompute.worker as worker\n"
        "            compute = worker.ShardWorker.compute\n"
        "            def poisoned(self, prepared):\n"
        "                if prepared.task.name.startswith('0005'):\n"
        "                    os._exit(9)\n"
        "                return compute(self, prepared)\n"
        "            worker.ShardWorker.compute = poisoned\n"
        "        return None\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    cache = tmp_path / "cache"
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    run = zygote.start(world.arguments(cache, "--engine", "ray", "--ray-workers", "2"), environment)
    assert run.wait() == 1, run.text()
    assert "1 shards could not be made" in run.text()
    assert_same(tensors(cache), {name: arrays for name, arrays in uninterrupted.items() if not name.startswith("0005")})
    assert len(attempts(cache)) == NUM_SHARDS - 1


@pytest.mark.slow
def test_two_workers(zygote: Zygote, world: World, uninterrupted: Tensors, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    output = zygote.run(world.arguments(cache, "--engine", "ray", "--ray-workers", "2"))
    assert_same(tensors(cache), uninterrupted)
    assert "over 2 workers" in output


@pytest.mark.slow
def test_sigterm_stops_the_local_cluster_and_leaves_a_resumable_cache(
    zygote: Zygote, world: World, uninterrupted: Tensors, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    run = zygote.start(world.arguments(cache, "--engine", "ray", "--ray-workers", "2"))
    until(lambda: (cache / "commits").is_dir() and attempts(cache), seconds=300)
    family = psutil.Process(run.pid).children(recursive=True)
    run.terminate()
    assert run.wait() == 1, run.text()
    assert "stopped: committed shards stay" in run.text()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, "something of the cluster outlived the run"
    before = attempts(cache)
    zygote.run(world.arguments(cache))
    assert before.items() <= attempts(cache).items()
    assert_same(tensors(cache), uninterrupted)


@pytest.fixture
def cluster(child_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A simulated cluster of one node without a place for a worker; others are added to it."""
    from ray.cluster_utils import Cluster

    for name, value in child_environment.items():
        monkeypatch.setenv(name, value)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield made
    made.shutdown()


@pytest.mark.slow
def test_a_node_that_joins_is_used_and_one_that_leaves_costs_only_what_it_had_in_flight(
    zygote: Zygote, world: World, cluster: Any, tmp_path: Path
) -> None:
    pairs = write_pairs(tmp_path / "pairs", num_shards=60, pairs_per_shard=4)
    many = World(model=world.model, pairs=pairs)
    zygote.run(many.arguments(tmp_path / "expected"))
    cache = tmp_path / "cache"
    run = zygote.start(many.arguments(cache, "--engine", "ray", "--ray-address", cluster.address))
    first = cluster.add_node(num_cpus=1)
    until(lambda: run.text().count("is ready") == 1, seconds=300)
    cluster.add_node(num_cpus=1)
    until(lambda: run.text().count("is ready") == 2, seconds=300)
    before = attempts(cache)
    assert len(before) < 60, "the second node came too late to prove anything"
    cluster.remove_node(first, allow_graceful=False)
    assert run.wait() == 0, run.text()
    assert "is lost" in run.text()
    assert before.items() <= attempts(cache).items()
    assert_same(tensors(cache), tensors(tmp_path / "expected"))


def test_without_ray_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(name: str, *rest: Any) -> ModuleType:
        if name == "ray":
            raise ImportError("No module named 'ray'")
        return original(name, *rest)

    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UsageError, match=r"pip install 'inpo-cache\[ray\]'") as error:
        connect(RayOptions())
    assert "--engine local" in str(error.value)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"gpus_per_worker": 0.0}, "--gpus-per-worker"),
        ({"gpus_per_worker": 1.5}, "--gpus-per-worker"),
        ({"workers": 0}, "--ray-workers"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, float], name: str) -> None:
    with pytest.raises(UsageError) as error:
        resolve(RayOptions, "ray", {}, options)
    assert error.value.where == name


def test_a_gpu_has_a_place_for_each_worker_that_shares_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    nodes = [
        {"NodeID": "two GPUs", "Alive": True, "Resources": {"GPU": 2.0, "CPU": 8.0}},
        {"NodeID": "none", "Alive": True, "Resources": {"CPU": 4.0}},
        {"NodeID": "gone", "Alive": False, "Resources": {"GPU": 8.0, "CPU": 8.0}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert has_gpus()
    assert places(RayOptions(), use_gpus=True) == {"two GPUs": 2}
    assert places(RayOptions(gpus_per_worker=0.5), use_gpus=True) == {"two GPUs": 4}
    assert places(RayOptions(), use_gpus=False) == {"two GPUs": 8, "none": 4}
