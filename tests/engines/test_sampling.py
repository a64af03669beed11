"""`inpo sample` on the engines of precompute: several processes, Ray's workers, SIGKILL. One cache, and its images."""

import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from inpo.toyworld.scenes import captions
from tests.engines.runs import (
    NUM_SHARDS,
    ROOT,
    Samples,
    Tensors,
    World,
    assert_same,
    attempts,
    kill_a_ray_worker,
    tensors,
)
from tests.engines.test_kill import kill_again_and_again
from tests.launching import Zygote, launch, ranks


@pytest.fixture(scope="module")
def samples(world: World, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    prompts = tmp_path_factory.mktemp("samples") / "prompts.txt"
    prompts.write_text("\n".join(captions("train")[: 2 * NUM_SHARDS]) + "\n")
    return Samples(model=world.model, pairs=prompts)


@pytest.fixture(scope="module")
def alone(samples: Samples, zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensors, float, Path]:
    """The cache of one process, the seconds it took, and where it is."""
    cache = tmp_path_factory.mktemp("alone") / "cache"
    start = time.monotonic()
    zygote.run(samples.arguments(cache))
    assert len(attempts(cache)) == NUM_SHARDS
    return tensors(cache), time.monotonic() - start, cache


def images(cache: Path) -> dict[str, list[str]]:
    """{tar: its members}, and no other file."""
    found = {}
    for file in Path(f"{cache}-images").iterdir():
        with tarfile.open(file) as tar:
            found[file.name] = tar.getnames()
    return found


def test_two_processes(zygote: Zygote, samples: Samples, alone: tuple[Tensors, float, Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    both = [zygote.start(samples.arguments(cache), environment) for environment in ranks(2)]
    assert [rank.wait() for rank in both] == [0, 0], both[0].text() + both[1].text()
    assert_same(tensors(cache), alone[0])
    assert images(cache) == images(alone[2])
    assert len(list((cache / "shards").glob("*/*"))) == NUM_SHARDS, "no shard was made twice"


def test_killed_at_random_moments(
    zygote: Zygote, samples: Samples, alone: tuple[Tensors, float, Path], tmp_path: Path
) -> None:
    assert kill_again_and_again(zygote, samples, alone[:2], tmp_path, writers=2, kills=3).kills >= 3
    for cache in tmp_path.glob("cache?"):
        assert images(cache) == images(alone[2])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_ray_worker_is_killed(
    zygote: Zygote, samples: Samples, alone: tuple[Tensors, float, Path], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    run = zygote.start(samples.arguments(cache, "--engine", "ray", "--ray-workers", "2"))
    before = kill_a_ray_worker(run, cache)
    assert run.wait() == 0, run.text()
    assert before.items() <= attempts(cache).items(), "a committed shard was made again"
    assert_same(tensors(cache), alone[0])
    assert images(cache) == images(alone[2])


@pytest.mark.slow
def test_accelerate_launch(
    samples: Samples, alone: tuple[Tensors, float, Path], child_environment: dict[str, str], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    command = launch(*samples.arguments(cache))
    command[command.index("inpo")] = "tests.engines.zygote"  # whose shards are as small as those of the others
    done = subprocess.run(command, env=child_environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("committed:") == 1
    assert_same(tensors(cache), alone[0])
    assert images(cache) == images(alone[2])
