"""Small caches with known numbers, an S3 server on loopback that can be told to fail, full and read-only disks."""

import shutil
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inpo.common.cache import CacheWriter, InverterIdentity, Manifest, ShardData, ShardSource, TextCommit, TextData
from inpo.common.cache.schema import ConditionSpec, LevelTables
from inpo.common.levels import Levels

_BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2


def levels_of(alphas_cumprod: np.ndarray) -> LevelTables:
    return LevelTables.of(Levels.from_alphas_cumprod(torch.from_numpy(alphas_cumprod)))


LEVELS = levels_of(np.cumprod(1 - _BETAS))
EMBEDDING = ConditionSpec(dtype="float16", axes=("token", "width"), per="prompt")
CONDITIONS = {
    "embedding": EMBEDDING,
    "length": ConditionSpec(dtype="int32", axes=(), per="prompt"),
    "pooled": ConditionSpec(dtype="float16", axes=("width",), per="prompt"),
    "time_ids": ConditionSpec(dtype="float32", axes=("time_id",), per="image"),
}
NUM_PROMPTS = 4
"""Of each text shard but `empty`."""
TRIPLE = ((0, 1), (1, 2), (0, 2), (1, 0))
"""The pairs (win, lose) of a group of three images; the last two raters do not agree."""


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
        "max_tokens": 9 if "length" in told else None,
        "profile": profile,
        "extra": extra,
        "seed": 0,
        "timesteps_per_pair": steps,
        "group": "pair",
        "resolution": (64, 64),
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


def layout_of(num_pairs: int, *, grouped: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """(the group of each image, the images of each pair): groups of two, or, `grouped`, of three images and four pairs
    as far as the pairs go."""
    group: list[int] = []
    sides: list[tuple[int, int]] = []
    number = 0
    while len(sides) < num_pairs:
        pairs = TRIPLE if grouped and num_pairs - len(sides) >= len(TRIPLE) else ((0, 1),)
        first = len(group)
        sides += [(first + win, first + lose) for win, lose in pairs]
        group += [number] * (3 if pairs is TRIPLE else 2)
        number += 1
    return group, sides


def arrays_of(manifest: Manifest, num_pairs: int, *, seed: int = 0, grouped: bool = False) -> dict[str, np.ndarray]:
    """Random arrays that obey the contract; x_t by the stored-point rule, in numpy's own arithmetic."""
    rng = np.random.default_rng(seed)
    steps, latent = manifest.timesteps_per_pair, manifest.latent_shape
    group, sides = layout_of(num_pairs, grouped=grouped)
    num_images, num_groups = len(group), group[-1] + 1
    timestep = np.sort(np.stack([rng.choice(1000, steps, replace=False) for _ in range(num_groups)]), axis=1)
    a, s = (
        np.array(table)[timestep[group]][..., None, None, None]
        for table in (manifest.levels.signal, manifest.levels.noise)
    )

    def latents(*shape: int) -> np.ndarray:
        return rng.standard_normal((*shape, *latent)).astype(np.float16)

    x0, target, delta = latents(num_images), latents(num_images, steps), latents(num_images, steps)
    signal = a * x0[:, None].astype(np.float64)
    x_t = (signal + s * target.astype(np.float64)).astype(np.float16)
    pair_ids = [f"pair-{seed}-{row} ä" for row in range(num_pairs)]
    owner = [group[win] for win, _ in sides]
    made = {
        "x0": x0,
        "x_t": x_t,
        "delta": delta,
        "target": target,
        "x0_t": ((x_t - s * delta) / a).clip(-60000, 60000).astype(np.float16),
        "reference_error": rng.random((num_images, steps)).astype(np.float32),
        "inversion_error": np.where(rng.random(num_images) < 0.5, np.nan, seed).astype(np.float32),
        "residual": rng.random((num_images, steps)).astype(np.float32),
        "timestep": timestep.astype(np.int16),
        "image/id": np.array([f"{seed:016x}{row:016x}" for row in range(num_images)], dtype=object),
        "image/group": np.array(group, dtype=np.int32),
        "image/score": np.where(rng.random(num_images) < 0.5, np.nan, rng.random(num_images)).astype(np.float32),
        "image/time_ids": rng.random((num_images, 6)).astype(np.float32),
        "group/id": np.array([pair_ids[owner.index(row)] for row in range(num_groups)], dtype=object),
        "group/prompt": np.stack([np.ones(num_groups), rng.integers(0, NUM_PROMPTS, num_groups)], axis=1).astype(
            np.int32
        ),
        "group/caption_dropped": rng.random(num_groups) < 0.5,
        "pair/id": np.array(pair_ids, dtype=object),
        "pair/win": np.array([win for win, _ in sides], dtype=np.int32),
        "pair/lose": np.array([lose for _, lose in sides], dtype=np.int32),
        "pair/label": rng.random(num_pairs).astype(np.float32),
        "delta_prev": latents(num_images, steps),
        "eps_ref": latents(num_images, steps),
    }
    if manifest.profile == "compact":
        for path in ("x0", "target"):
            made[path] = rng.integers(-127, 128, made[path].shape, dtype=np.int8)
            made[f"{path}_scale"] = rng.choice(np.float16([1 / 32, 3 / 64, 1 / 16]), made[path].shape[:-2])
    return {spec.path: made[spec.path] for spec in manifest.arrays}


def texts_of(manifest: Manifest, seed: int | None) -> dict[str, np.ndarray]:
    """The arrays of text shard t<seed>, or of the empty prompt's; rows as long as this shard's longest where prompts
    have a length."""
    rng = np.random.default_rng(100 if seed is None else seed)
    prompts = [""] if seed is None else [f"prompt {seed} {row} ä" for row in range(NUM_PROMPTS)]
    longest = 5 + (0 if seed is None or manifest.max_tokens is None else seed % 4)
    made = {
        "text": np.array(prompts, dtype=object),
        "embedding": rng.standard_normal((len(prompts), longest, 6)).astype(np.float16),
        "length": np.sort(rng.integers(1, longest + 1, len(prompts))).astype(np.int32),
        "pooled": rng.standard_normal((len(prompts), 7)).astype(np.float16),
    }
    return {path: made[path] for path in manifest.text_specs}


def shard_of(manifest: Manifest, num_pairs: int, *, seed: int = 0, grouped: bool = False, **changes: Any) -> ShardData:
    """A shard whose prompts stand in text shard t<seed>."""
    rows = (0, num_pairs + len(changes.get("skipped", ())))
    source = ShardSource(location="/pairs", input_shard="0.tar", rows=rows, fingerprint="f" * 32)
    arrays = arrays_of(manifest, num_pairs, seed=seed, grouped=grouped) if num_pairs else {}
    return ShardData(arrays=arrays, texts=("empty", f"t{seed}"), source=source, **changes)


def text_shard_of(manifest: Manifest, seed: int | None = 0) -> TextData:
    return TextData(arrays=texts_of(manifest, seed))


def writer_of(location: object, manifest: Manifest, *, texts: Iterable[int] = (0,)) -> CacheWriter:
    """A writer of a cache that has the text shards `empty`, t0, ... of these numbers."""
    writer = CacheWriter.open(str(location), manifest)
    for name, seed in {"empty": None, **{f"t{each}": each for each in texts}}.items():
        if not writer.is_committed(name, TextCommit):
            assert writer.write_texts(name, text_shard_of(manifest, seed)) is not None
    return writer


@dataclass(frozen=True)
class Build:
    """What tests make caches with."""

    manifest: Callable[..., Manifest] = manifest_of
    shard: Callable[..., ShardData] = shard_of
    texts: Callable[..., TextData] = text_shard_of
    writer: Callable[..., CacheWriter] = writer_of
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

    def cache(
        self, location: object, *, pairs: tuple[int, ...] = (3, 2), grouped: bool = False, **options: Any
    ) -> Manifest:
        """A cache with shards s0, s1, ... of so many pairs, and the text shards empty, t0, t1, ... of their prompts."""
        manifest = manifest_of(**({"group": "prompt"} if grouped else {}) | options)
        writer = writer_of(location, manifest, texts=range(len(pairs)))
        for index, num_pairs in enumerate(pairs):
            shard = shard_of(manifest, num_pairs, seed=index, grouped=grouped)
            assert writer.write(f"s{index}", shard) is not None
        return manifest


@pytest.fixture(scope="session")
def build() -> Build:
    return Build()


@pytest.fixture(scope="session")
def sound(tmp_path_factory, build) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "cache"
    manifest = build.manifest(**build.everything, group="prompt")
    writer = build.writer(folder, manifest, texts=(0, 1))
    skipped = [{"pair_id": "tie", "reason": "tie", "detail": "label 0.5", "row": 3}]
    assert writer.write("s0", build.shard(manifest, 3, skipped=skipped))
    assert writer.write("s1", build.shard(manifest, 4, seed=1, grouped=True))
    writer.write_configuration('[data]\ncache = "x"\n')
    return folder


@pytest.fixture(scope="session")
def whole(tmp_path_factory, build) -> Path:
    """Every array there is, two shards of one size."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    build.cache(folder, pairs=(3, 3), **build.everything)
    return folder


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    """A copy of a cache with every array there is, plain pairs in s0 and a group of three images in s1, a skipped row
    and a configuration, for a test to forge."""
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
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
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
