"""`accelerate launch -m inpo precompute` itself, with two processes on CPUs."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.engines.runs import NUM_SHARDS, ROOT, Tensors, World, assert_same, attempts, tensors
from tests.launching import Zygote, launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def launched(arguments: list[str], environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    command = launch(*arguments)
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def test_two_processes(world: World, uninterrupted: Tensors, child_environment: dict[str, str], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    done = launched(world.arguments(cache), child_environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("committed:") == 1
    assert done.stderr.count("over 2 processes") == 1
    told = re.findall(r"precompute (\w+): (\d+) of (\d+) ", done.stderr)
    assert {phase for phase, _, _ in told} == {"texts", "images"}
    assert {phase: made == whole for phase, made, whole in told} == {"texts": True, "images": True}  # the last of each
    assert_same(tensors(cache), uninterrupted)
    assert len(list((cache / "shards").glob("*/*"))) == NUM_SHARDS


def test_a_process_that_fails_fails_the_launch_and_keeps_what_is_committed(
    world: World, zygote: Zygote, uninterrupted: Tensors, child_environment: dict[str, str], tmp_path: Path
) -> None:
    """A file where a shard's folder should be: the rank that owns the shard cannot write it."""
    cache = tmp_path / "cache"
    zygote.run(world.arguments(cache, "--limit", "8"))
    before = attempts(cache)
    blocked = cache / "shards" / "0007-00000000"
    blocked.write_text("in the way")
    done = launched(world.arguments(cache), child_environment)
    assert done.returncode != 0
    assert "Could not write a shard" in done.stderr
    blocked.unlink()
    assert before.items() <= attempts(cache).items()
    between = attempts(cache)
    zygote.run(world.arguments(cache))
    assert between.items() <= attempts(cache).items()
    assert_same(tensors(cache), uninterrupted)
