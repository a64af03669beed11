"""The record stream against what the trainer consumes and against raw reads: `python -m benchmarks.stream`.

The cache holds SD1.5-sized latents (random numbers: only their bytes matter here), 4 x 64 x 64 at 512 px. Every figure
is of a few epochs from opening to closing, with the window that is read ahead at the end and never used.
"""

import argparse
import contextlib
import gc
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import obstore
import torch

from benchmarks.measure import interleaved, machine, ratio_table, record
from inpo.common.cache import CacheWriter, InverterIdentity, Manifest, ShardData, ShardSource, TextData, open_cache
from inpo.common.cache.derive import point_from_target
from inpo.common.cache.schema import LevelTables
from inpo.common.cache.store import CacheStore
from inpo.common.families import FAMILIES
from inpo.common.levels import Levels
from inpo.train.index import build_index
from inpo.train.records import Needs
from inpo.train.stream import RecordStream

CONSUMED_PAIRS_PER_SECOND = 66.0
"""SD1.5 records per second that one H200 would train on at 40% of its bf16 matmul rate: a calculation, see docs."""
FOLDER = Path("runs/bench/stream")
OURS = "stream, window of 4 shards"
EPOCHS = 3


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=256, help="pairs per shard")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--kept", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    shutil.rmtree(FOLDER, ignore_errors=True)
    _write(FOLDER, options.shards, options.pairs, options.kept)
    cache = open_cache(str(FOLDER))
    files = [
        Path(shard.location) / name
        for shard in cache
        for name in shard.commit.files
        if name.startswith(("x_t/c", "target/c"))
    ]
    size = sum(file.stat().st_size for file in files)

    def raw() -> None:
        for file in files:
            file.read_bytes()

    def epochs(location: str, window_shards: int, ranks: int = 1) -> None:
        """Open, draw, close: no stream reads ahead while another contestant is timed."""
        index = build_index([open_cache(location)], soft=False, held_out=0.0)
        streams = [
            RecordStream(
                index,
                Needs(),
                batch_size=options.batch_size,
                window_shards=window_shards,
                seed=0,
                rank=rank,
                world_size=ranks,
            )
            for rank in range(ranks)
        ]
        sources = [iter(stream) for stream in streams]
        for number in range(EPOCHS * index.num_records // options.batch_size):
            next(sources[number % ranks])
        for stream in streams:
            stream.close()

    gc.collect()
    gc.freeze()  # as the trainer does
    with _on_s3() as s3:
        contestants = {
            OURS: lambda: epochs(str(FOLDER), 4),
            "the same, files not in memory at the start": lambda: (_forget(files), epochs(str(FOLDER), 4)),
            "stream, window of 1 shard": lambda: epochs(str(FOLDER), 1),
            "two ranks of one process": lambda: epochs(str(FOLDER), 4, ranks=2),
            "S3 on loopback": lambda: epochs(s3, 4),
            "raw reads of the latents": lambda: [raw() for _ in range(EPOCHS)],
            "raw reads, files not in memory at the start": lambda: (_forget(files), [raw() for _ in range(EPOCHS)]),
        }
        timings = interleaved(contestants, rounds=options.rounds)
    rates = {name: EPOCHS * cache.num_records / timing.median for name, timing in timings.items()}
    print(f"record stream, SD1.5 latents, {cache.num_records} records, {size / 1e6:.0f} MB of them, {machine()}\n")
    print(ratio_table(timings, ours=OURS, unit=f"s for {EPOCHS} epochs"))
    print(
        f"\n{rates[OURS]:.0f} records/s: {rates[OURS] / CONSUMED_PAIRS_PER_SECOND:.1f} times the "
        f"{CONSUMED_PAIRS_PER_SECOND:.0f} pairs/s that one H200 would consume (calculated, not measured)"
    )
    record("stream", {"records_per_second": rates, "bytes": size})


def _forget(files: list[Path]) -> None:
    """Drop the files' pages from memory, so that the next read goes to the disk."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _on_s3() -> Iterator[str]:
    """The same cache behind a real S3 API in a process of its own; yields its address."""
    import boto3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    os.environ |= {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.2)
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="bench")
        store = CacheStore("s3://bench/cache", create=True)
        for file in sorted(path for path in FOLDER.rglob("*") if path.is_file()):
            obstore.put(store.client, str(file.relative_to(FOLDER)), file.read_bytes())
        yield store.location
    finally:
        server.terminate()
        server.wait()


def _write(folder: Path, shards: int, pairs: int, kept: int) -> None:
    shape = (4, 64, 64)
    abar = torch.linspace(0.9991**0.5, 0.0047**0.5, 1000, dtype=torch.float64) ** 2
    levels = Levels.from_alphas_cumprod(abar)
    manifest = Manifest(
        latent_shape=shape,
        family="sd",
        levels=LevelTables.of(levels),
        conditions=dict(FAMILIES["sd"].conditions),
        profile="full",
        seed=0,
        timesteps_per_pair=kept,
        group="pair",
        resolution=(512, 512),
        crop="center",
        flip=False,
        vae_latent="mean",
        vae_dtype="float32",
        network_dtype="float32",
        inverter=InverterIdentity(name="ddim", grid_points=10, timestep_range=(0, 1000)),
        fingerprints={"network": "0" * 32},
    )
    writer = CacheWriter.open(str(folder), manifest)
    rng = np.random.default_rng(0)
    for name, prompt in (("empty", ""), ("prompts", "a prompt")):
        embedding = rng.standard_normal((1, 77, 768)).astype(np.float16)
        writer.write_texts(name, TextData(arrays={"text": np.array([prompt], dtype=object), "embedding": embedding}))
    images = 2 * pairs
    timestep = np.sort(rng.integers(0, 1000, (pairs, kept)), axis=1)
    x0 = torch.from_numpy(rng.standard_normal((images, *shape), dtype=np.float32)).half()
    target = torch.from_numpy(rng.standard_normal((images, kept, *shape), dtype=np.float32)).half()
    a, s = (torch.from_numpy(value)[..., None, None, None] for value in levels.at(timestep.repeat(2, axis=0)))
    x_t = point_from_target(x0[:, None], target, a, s)
    for shard in range(shards):
        ids = np.array([f"{shard}-{number}" for number in range(pairs)], dtype=object)
        arrays = {
            "x0": x0.numpy(),
            "x_t": x_t.numpy(),
            "delta": target.numpy(),
            "x0_t": x_t.numpy(),
            "target": target.numpy(),
            "reference_error": np.zeros((images, kept), np.float32),
            "inversion_error": np.full(images, np.nan, np.float32),
            "timestep": timestep.astype(np.int16),
            "image/id": np.array([f"{number:032x}" for number in range(images)], dtype=object),
            "image/group": np.arange(images, dtype=np.int32) // 2,
            "image/score": np.full(images, np.nan, np.float32),
            "group/id": ids,
            "group/prompt": np.tile(np.array([[1, 0]], np.int32), (pairs, 1)),
            "group/caption_dropped": np.zeros(pairs, bool),
            "pair/id": ids,
            "pair/win": np.arange(0, images, 2, dtype=np.int32),
            "pair/lose": np.arange(1, images, 2, dtype=np.int32),
            "pair/label": np.ones(pairs, np.float32),
        }
        source = ShardSource(location="random", input_shard=f"{shard:04d}", rows=(0, pairs), fingerprint="0" * 32)
        writer.write(f"{shard:04d}-00000000", ShardData(arrays=arrays, source=source, texts=("empty", "prompts")))


if __name__ == "__main__":
    main()
