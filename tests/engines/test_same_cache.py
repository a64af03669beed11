"""One cache, tensor for tensor, whoever makes it: two runs at once, two processes of one run, an object store."""

import re
import signal
from pathlib import Path

import pytest

from tests.engines.runs import NUM_SHARDS, Tensors, World, assert_same, attempts, tensors, until
from tests.launching import Zygote, ranks


def test_two_independent_runs_at_once(zygote: Zygote, world: World, uninterrupted: Tensors, tmp_path: Path) -> None:
    """Both end well, and little is done twice: a run that notices the other goes another way."""
    cache = tmp_path / "cache"
    runs = [zygote.start(world.arguments(cache)) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0], runs[0].text() + runs[1].text()
    assert_same(tensors(cache), uninterrupted)
    assert len(attempts(cache)) == NUM_SHARDS


def test_object_store(
    zygote: Zygote, world: World, uninterrupted: Tensors, s3: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One shard, then one more by a second run, which makes nothing twice."""
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    cache = "s3://bucket/cache"
    zygote.run(world.arguments(cache, "--limit", "4"), s3)
    before = attempts(cache)
    assert len(before) == 1
    zygote.run(world.arguments(cache, "--limit", "8"), s3)
    assert before.items() < attempts(cache).items()
    assert len(attempts(cache)) == 2
    found = tensors(cache)
    assert_same(found, {name: uninterrupted[name] for name in found})


def test_two_processes_of_one_run(zygote: Zygote, world: World, uninterrupted: Tensors, tmp_path: Path) -> None:
    """A static split, a shard in one hand only, and one summary of both, by rank 0, when both are done."""
    cache = tmp_path / "cache"
    both = [zygote.start(world.arguments(cache, "--decode-workers", "1"), environment) for environment in ranks(2)]
    assert [rank.wait() for rank in both] == [0, 0], both[0].text() + both[1].text()
    assert_same(tensors(cache), uninterrupted)
    assert len(list((cache / "shards").glob("*/*"))) == NUM_SHARDS, "no shard was made twice"
    assert f"committed: {NUM_SHARDS} of {NUM_SHARDS} shards" in both[0].text()
    assert re.search(r"^time: network and VAE \d+%.*, over 2 processes$", both[0].text(), re.MULTILINE)
    assert "committed:" not in both[1].text()


def test_when_one_of_two_processes_dies_the_other_says_so_and_keeps_its_shards(
    zygote: Zygote, world: World, uninterrupted: Tensors, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    both = [zygote.start(world.arguments(cache), environment) for environment in ranks(2)]
    until(lambda: (cache / "commits").is_dir() and attempts(cache))
    both[1].kill()
    assert both[1].wait() == -signal.SIGKILL
    assert both[0].wait() == 1
    assert "Another process of this run has ended" in both[0].text()
    assert "Traceback" not in both[0].text()
    before = attempts(cache)
    assert len(before) >= NUM_SHARDS // 2
    zygote.run(world.arguments(cache))
    assert before.items() <= attempts(cache).items()
    assert_same(tensors(cache), uninterrupted)


def test_sigterm_ends_in_order(zygote: Zygote, world: World, uninterrupted: Tensors, tmp_path: Path) -> None:
    """Exit code 1, one sentence, no half-written attempt; what is committed can be read, and the rest is made later."""
    cache = tmp_path / "cache"
    run = zygote.start(world.arguments(cache, "--decode-workers", "1"))
    until(lambda: (cache / "commits").is_dir() and attempts(cache))
    run.terminate()
    assert run.wait() == 1
    assert "stopped: committed shards stay" in run.text()
    assert "run the same command again" in run.text()
    assert "Traceback" not in run.text()
    before = attempts(cache)
    assert tensors(cache)
    assert len(before) < NUM_SHARDS
    assert {path.name for path in (cache / "shards").glob("*/*")} == set(before.values())
    zygote.run(world.arguments(cache))
    assert before.items() <= attempts(cache).items()
    assert_same(tensors(cache), uninterrupted)
