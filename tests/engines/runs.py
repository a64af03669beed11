"""Precompute processes on a tiny world, and how their caches are compared."""

import io
import json
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from inpo.common.cache import open_cache
from tests.launching import Process
from tests.rounding import UNIT, record_bounds, rms

ROOT = Path(__file__).parents[2]
NUM_SHARDS, PAIRS_PER_SHARD = 12, 4


@dataclass(frozen=True)
class World:
    """What every run here starts from."""

    model: Path
    pairs: Path

    def arguments(self, cache: object, *more: str) -> list[str]:
        return [
            "precompute",
            "--pairs",
            str(self.pairs),
            "--model",
            str(self.model),
            "--cache",
            str(cache),
            "--resolution",
            "32",
            "--grid-points",
            "4",
            "--timesteps-per-pair",
            "2",
            "--batch-size",
            "4",
            "--decode-workers",
            "0",
            "--measure-inversion",
            "0.2",
            *more,
        ]


@dataclass(frozen=True)
class Samples(World):
    """What is sampled instead of inverted: `pairs` is a list of prompts, so many that there are as many shards."""

    def arguments(self, cache: object, *more: str) -> list[str]:
        flags = {
            "prompts": self.pairs,
            "model": self.model,
            "cache": cache,
            "scorer": "toyworld-oracle",
            "resolution": 32,
            "inference-steps": 4,
            "timesteps-per-pair": 2,
            "batch-size": 4,
        }
        given = [f"--{name}={value}" for name, value in flags.items()]
        # Decoding is none of sampling's work.
        return ["sample", *given, *(each for each in more if each not in ("--decode-workers", "1"))]


def write_pairs(folder: Path, *, num_shards: int, pairs_per_shard: int) -> Path:
    """Tars in the project's own layout: random 32 px images, a few prompts."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for shard in range(num_shards):
        with tarfile.open(folder / f"{shard:04d}.tar", "w") as tar:
            for row in range(pairs_per_shard):
                members: dict[str, bytes] = {}
                for side in ("win", "lose"):
                    stream = io.BytesIO()
                    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(stream, format="PNG")
                    members[f"{side}.png"] = stream.getvalue()
                members["json"] = json.dumps({"prompt": f"a red {('cat', 'dog', 'house')[row % 3]}"}).encode()
                for name, data in members.items():
                    info = tarfile.TarInfo(f"{shard:04d}-{row:03d}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


Tensors = dict[str, dict[str, np.ndarray]]
RECORD = ("x_t", "delta", "x0_t", "target", "reference_error")
ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
"""The tiny pipelines' schedule."""


def tensors(cache: object) -> Tensors:
    """{shard: {array: values}} of everything committed; texts under texts/NAME."""
    opened = open_cache(str(cache))
    images = {name: {path: shard.read(path) for path in opened.manifest.specs} for name, shard in opened.shards.items()}
    texts = {
        f"texts/{shard.name}": {path: shard.read_stored(path) for path in opened.manifest.text_specs}
        for shard in opened.texts
    }
    return images | texts


def attempts(cache: object) -> dict[str, str]:
    """{shard: id of its committed attempt}."""
    return {name: commit.attempt for name, commit in open_cache(str(cache), allow_empty=True).commits.items()}


def assert_same(found: Tensors, expected: Tensors) -> None:
    """Equal but for the rounding of sums in another order, every tensor of a record within its own bound."""
    assert found.keys() == expected.keys()
    for name, arrays in expected.items():
        for path, values in arrays.items():
            other = found[name][path]
            assert other.dtype == values.dtype
            assert other.shape == values.shape
            if path in RECORD:
                continue
            if values.dtype.kind == "f":  # two units in the last place
                np.testing.assert_allclose(other, values, rtol=2 * UNIT, atol=1e-4, err_msg=f"{name} {path}")
            else:
                np.testing.assert_array_equal(other, values, err_msg=f"{name} {path}")
        if name.startswith("texts/"):
            continue
        for (pair, record), t in np.ndenumerate(arrays["timestep"]):
            sides = slice(2 * pair, 2 * pair + 2)
            one, other = ({path: each[path][sides, record] for path in RECORD} for each in (arrays, found[name]))
            bounds = record_bounds(one, np.sqrt(ABAR[t]), np.sqrt(1 - ABAR[t]))
            for path in RECORD:
                apart = rms(one[path].astype(float) - other[path]) / rms(one[path])
                assert apart <= bounds[path], (name, pair, t, path, apart, bounds[path])


def kill_a_ray_worker(run: Process, cache: Path) -> dict[str, str]:
    """Once something is committed, one that is at work; returns what was. Not once all are ready: the first may have
    made everything by then."""
    until(lambda: (cache / "commits").is_dir() and attempts(cache), seconds=300)
    before = attempts(cache)
    working = [worker for worker in workers_of(run) if "load" not in " ".join(worker.cmdline())]
    working[0].kill()
    return before


def until(condition: Any, *, seconds: float = 120.0) -> None:
    """Wait for a condition; the limit is only there so that a broken run ends."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def workers_of(run: Process) -> list[psutil.Process]:
    """The cluster's actor processes; the cluster is a child of the run."""
    found = []
    for process in psutil.Process(run.pid).children(recursive=True):
        try:
            if "ray::RayWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found
