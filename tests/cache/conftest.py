"""Small caches with known numbers, an S3 server on loopback that can be told to fail, full and read-only disks."""

import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inpo.common.cache import CacheWriter, InverterIdentity, Manifest, ShardData, ShardSource
from inpo.common.cache.schema import ConditionSpec, LevelTables
from inpo.common.levels import Levels

_BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2


def levels_of(alphas_cumprod: np.ndarray) -> LevelTables:
    return LevelTables.of(Levels.from_alphas_cumprod(torch.from_numpy(alphas_cumprod)))


LEVELS = levels_of(np.cumprod(1 - _BETAS))
EMBEDDING = ConditionSpec(dtype="float16", axes=("token", "width"), per="prompt")
CONDITIONS = {
    "embedding": EMBEDDING,
    "mask": ConditionSpec(dtype="bool", axes=("token",), per="prompt"),
    "pooled": ConditionSpec(dtype="float16", axes=("width",), per="prompt"),
    "time_ids": ConditionSpec(dtype="float32", axes=("time_id",), per="image"),
}


def manifest_of(
    *,
    profile: str = "full",
    steps: int = 2,
    latent: tuple[int, int, int] = (4, 8, 8),
    told: tuple[str, ...] = ("embedding",),
    extra: tuple[str, ...] = (),
    **changes: Any,
) -> Manifest:
    fingerprints = {"network": "a" * 32, "vae": "b" * 32, "text_encoder": "c" * 32, "scheduler": "d" * 32}
    values: dict[str, Any] = {
        "latent_shape": latent,
        "family": "sd",
        "levels": LEVELS,
        "conditions": {name: CONDITIONS[name] for name in told},
        "profile": profile,
        "extra": extra,
        "seed": 0,
        "timesteps_per_pair": steps,
        "resolution": 64,
        "crop": "center",
        "flip": False,
        "vae_latent": "mean",
        "vae_dtype": "float32",
        "network_dtype": "float32",
        "inverter": InverterIdentity(name="ddim", grid_points=10, timestep_range=(0, 1000)),
        "fingerprints": fingerprints,
        "versions": {"inpo-cache": "0"},
    }
    return Manifest(**values | changes)


def arrays_of(manifest: Manifest, num_pairs: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Random arrays that obey the contract; x_t by the stored-point rule, in numpy's own arithmetic."""
    rng = np.random.default_rng(seed)
    steps, latent = manifest.timesteps_per_pair, manifest.latent_shape
    timestep = np.sort(np.stack([rng.choice(1000, steps, replace=False) for _ in range(num_pairs)]), axis=1)
    a, s = (
        np.array(table)[timestep][..., None, None, None, None]
        for table in (manifest.levels.signal, manifest.levels.noise)
    )

    def latents(*shape: int) -> np.ndarray:
        return rng.standard_normal((*shape, *latent)).astype(np.float16)

    x0, target, delta = latents(num_pairs, 2), latents(num_pairs, steps, 2), latents(num_pairs, steps, 2)
    signal = a * x0[:, None].astype(np.float64)
    x_t = (signal + s * target.astype(np.float64)).astype(np.float16)
    num_prompts = num_pairs + 1
    made = {
        "x0": x0,
        "x_t": x_t,
        "delta": delta,
        "target": target,
        "x0_t": ((x_t - s * delta) / a).clip(-60000, 60000).astype(np.float16),
        "reference_error": rng.random((num_pairs, steps, 2)).astype(np.float32),
        "inversion_error": np.where(rng.random((num_pairs, 2)) < 0.5, np.nan, seed).astype(np.float32),
        "residual": rng.random((num_pairs, steps, 2)).astype(np.float32),
        "timestep": timestep.astype(np.int16),
        "pair_id": np.array([f"pair-{seed}-{row} ä" for row in range(num_pairs)], dtype=object),
        "prompt_index": rng.integers(0, num_prompts, num_pairs).astype(np.int32),
        "caption_dropped": rng.random(num_pairs) < 0.5,
        "label": rng.random(num_pairs).astype(np.float32),
        "prompt/text": np.array(["", *(f"prompt {seed} {row}" for row in range(num_pairs))], dtype=object),
        "prompt/embedding": rng.standard_normal((num_prompts, 5, 6)).astype(np.float16),
        "prompt/mask": rng.random((num_prompts, 5)) < 0.5,
        "prompt/pooled": rng.standard_normal((num_prompts, 7)).astype(np.float16),
        "time_ids": rng.random((num_pairs, 2, 6)).astype(np.float32),
        "delta_prev": latents(num_pairs, steps, 2),
        "eps_ref": latents(num_pairs, steps, 2),
    }
    return {spec.path: made[spec.path] for spec in manifest.arrays}


def shard_of(manifest: Manifest, num_pairs: int, *, seed: int = 0, **changes: Any) -> ShardData:
    rows = (0, num_pairs + len(changes.get("skipped", ())))
    source = ShardSource(location="/pairs", input_shard="0.tar", rows=rows, fingerprint="f" * 32)
    return ShardData(arrays=arrays_of(manifest, num_pairs, seed=seed) if num_pairs else {}, source=source, **changes)


@dataclass(frozen=True)
class Build:
    """What tests make caches with."""

    manifest: Callable[..., Manifest] = manifest_of
    shard: Callable[..., ShardData] = shard_of
    levels: Callable[..., LevelTables] = levels_of
    conditions: tuple[str, ...] = tuple(CONDITIONS)

    everything: Any = field(
        default_factory=lambda: {
            "told": tuple(CONDITIONS),
            "extra": ("delta_prev", "eps_ref"),
            "inverter": InverterIdentity(name="fixed_point", grid_points=10, timestep_range=(0, 1000), iterations=3),
        }
    )
    """Options that make every array of the contract appear."""

    def cache(self, location: object, *, pairs: tuple[int, ...] = (3, 2), **options: Any) -> Manifest:
        """A cache with shards s0, s1, ... of so many pairs."""
        manifest = manifest_of(**options)
        writer = CacheWriter.open(str(location), manifest)
        for index, num_pairs in enumerate(pairs):
            assert writer.write(f"s{index}", shard_of(manifest, num_pairs, seed=index)) is not None
        return manifest


@pytest.fixture(scope="session")
def build() -> Build:
    return Build()


@pytest.fixture(scope="session")
def sound(tmp_path_factory, build) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "cache"
    manifest = build.manifest(**build.everything)
    writer = CacheWriter.open(str(folder), manifest)
    skipped = [{"pair_id": "tie", "reason": "tie", "detail": "label 0.5", "row": 3}]
    assert writer.write("s0", build.shard(manifest, 3, skipped=skipped))
    assert writer.write("s1", build.shard(manifest, 2, seed=1))
    writer.write_configuration('[data]\ncache = "x"\n')
    return folder


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    """A copy of a cache with every array there is, a skipped row and a configuration, for a test to forge."""
    return Path(shutil.copytree(sound, tmp_path / "cache"))


@dataclass
class S3:
    """A real S3 API on loopback. `failures` requests from now on are answered 503; -1: all of them."""

    location: str = ""
    failures: int = 0
    refused: int = 0
    lock: Any = field(default_factory=threading.Lock)

    def __call__(self, application: Any) -> Any:
        def answer(environ: Any, start_response: Any) -> Any:
            with self.lock:
                refuse = self.failures != 0
                self.failures -= self.failures > 0
                self.refused += refuse
            if refuse:
                start_response("503 Slow Down", [("Content-Type", "text/plain")])
                return [b"slow down"]
            # moto checks If-None-Match and stores in two steps; S3 does both at once, and so does this lock.
            if environ.get("HTTP_IF_NONE_MATCH"):
                with self.lock:
                    return application(environ, start_response)
            return application(environ, start_response)

        return answer


@pytest.fixture(scope="session")
def s3_server() -> Iterator[tuple[S3, str]]:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log_request(self, *_: object) -> None:
            pass

    control = S3()
    server = make_server(
        "127.0.0.1", 0, control(DomainDispatcherApplication(create_backend_app)), threaded=True, request_handler=Quiet
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield control, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def s3(s3_server: tuple[S3, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[S3]:
    """An empty bucket's folder; AWS_* point at the server."""
    import boto3

    control, endpoint = s3_server
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = "b" + tmp_path.name.replace("_", "-").lower()[:40]
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=bucket)
    control.location, control.failures, control.refused = f"s3://{bucket}/cache", 0, 0
    yield control
    control.failures = 0


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a small tmpfs; skips where that is not allowed."""
    folders: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"mount{len(folders)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mount is not allowed here: {done.stderr.strip()}")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "-l", folder], check=True)
