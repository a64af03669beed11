"""SIGKILL at random moments: nothing lost, nothing half visible, no committed shard made again.

The processes run the real command. While they live and die, a reader opens the cache again and again, reads every
array of every committed shard, and compares it with a run that nobody disturbed.
"""

import random
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from inpo.common.cache import open_cache
from inpo.common.errors import CacheMissing
from tests.engines.runs import NUM_SHARDS, Tensors, World, assert_same, tensors
from tests.launching import Process, Zygote


class Observer:
    """A reader that trusts nobody: every committed shard is whole, right, and stays the same attempt for ever."""

    def __init__(self, cache: Path, expected: Tensors) -> None:
        self.cache = cache
        self.expected = expected
        self.seen: dict[str, str] = {}
        self.looks = 0

    def look(self) -> None:
        self.looks += 1
        try:
            cache = open_cache(str(self.cache), allow_empty=True)
        except CacheMissing:
            assert not self.seen, "the manifest has vanished"
            return
        now = {name: commit.attempt for name, commit in cache.commits.items()}
        assert self.seen.items() <= now.items(), "a committed shard was made again or has vanished"
        for name in now.keys() - self.seen.keys():
            found = {path: cache.shards[name].read(path) for path in cache.manifest.specs}
            assert_same({name: found}, {name: self.expected[name]})
        self.seen = now


@dataclass
class Count:
    """What happened over all caches of a test."""

    kills: int = 0
    caches: int = 0
    shards: int = 0
    orphans: int = 0
    looks: int = 0


def kill_again_and_again(
    zygote: Zygote, world: World, undisturbed: tuple[Tensors, float], folder: Path, *, writers: int, kills: int
) -> Count:
    """Caches, one after the other, each made by writers that are killed at moments of their own, until there were so
    many kills (at most ten a cache). A last run completes each cache: it makes what is missing, and only that.
    """
    expected, seconds = undisturbed
    count = Count()
    while count.kills < kills:
        observer = Observer(folder / f"cache{count.caches}", expected)
        now = min(10, kills - count.kills)
        count.kills += _kill(zygote, world, observer, writers=writers, kills=now, within=seconds)
        observer.look()
        before = dict(observer.seen)
        output = zygote.run(world.arguments(observer.cache))
        observer.look()
        assert before.items() <= observer.seen.items()
        assert f"committed: {NUM_SHARDS} of {NUM_SHARDS} shards" in output
        assert_same(tensors(observer.cache), expected)
        count.caches += 1
        count.shards += len(observer.seen)
        count.orphans += len(list((observer.cache / "shards").glob("*/*"))) - len(observer.seen)
        count.looks += observer.looks
    return count


def _kill(zygote: Zygote, world: World, observer: Observer, *, writers: int, kills: int, within: float) -> int:
    """Start writers and kill each within so many seconds; a killed one is replaced. Returns how many were killed."""
    done = 0
    running: list[tuple[Process, float]] = []

    def start() -> None:
        process = zygote.start(world.arguments(observer.cache, "--decode-workers", "1"))
        running.append((process, time.monotonic() + random.uniform(0.0, within)))

    for _ in range(writers):
        start()
    while running:
        observer.look()
        for entry in [each for each in running if each[1] <= time.monotonic()]:
            running.remove(entry)
            entry[0].kill()
            code = entry[0].wait()
            assert code in (-9, 0), entry[0].text()
            if code == -9:
                done += 1
                if done + len(running) < kills:
                    start()
        time.sleep(0.05)
    return done


@pytest.mark.parametrize("writers", [1, 2])
def test_killed_at_random_moments(
    zygote: Zygote, world: World, undisturbed: tuple[Tensors, float], tmp_path: Path, writers: int
) -> None:
    assert kill_again_and_again(zygote, world, undisturbed, tmp_path, writers=writers, kills=3).kills >= 3


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_kills_over_several_runs_with_two_writers(
    zygote: Zygote, world: World, undisturbed: tuple[Tensors, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = kill_again_and_again(zygote, world, undisturbed, tmp_path, writers=2, kills=50)
    with capsys.disabled():
        print(
            f"\n{count.kills} kills over {count.caches} caches: {count.shards} shards committed once each, 0 made "
            f"again, {count.orphans} orphaned attempts, {count.looks} looks by the reader without an error"
        )
