"""The record stream against what the trainer consumes and against raw reads: `python -m benchmarks.stream`.

The cache holds SD1.5-sized latents (random numbers: only their bytes matter here), 4 x 64 x 64 at 512 px.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import interleaved, machine, ratio_table, record
from common.cache import CacheWriter, InverterIdentity, Manifest, ShardData, ShardSource, open_cache
from common.cache.derive import point_from_target
from common.schedule import NoiseSchedule
from train.index import build_index
from train.records import Needs
from train.stream import RecordStream

CONSUMED_PAIRS_PER_SECOND = 66.0
"""SD1.5 records per second that one H200 would train on at 40% of its bf16 matmul rate: a calculation, see docs."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=256, help="pairs per shard")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--kept", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    folder = Path("runs/bench/stream")
    shutil.rmtree(folder, ignore_errors=True)
    _write(folder, options.shards, options.pairs, options.kept)
    cache = open_cache(str(folder))
    index = build_index([cache], soft=False, held_out=0.0)
    files = [
        Path(shard.location) / name for shard in cache for name in shard.commit.files
        if name.startswith(("x_t/c", "target/c"))
    ]

    def epoch(window_shards: int) -> None:
        stream = RecordStream(index, Needs(), batch_size=options.batch_size, window_shards=window_shards, seed=0)
        batches = iter(stream)
        for _ in range(cache.num_records // options.batch_size):
            next(batches)
        stream.close()

    def raw() -> None:
        for file in files:
            file.read_bytes()

    contestants = {"stream, window of 1 shard": lambda: epoch(1), "stream, window of 4 shards": lambda: epoch(4),
                   "raw reads of the same bytes": raw}
    timings = interleaved(contestants, rounds=options.rounds)
    size = sum(file.stat().st_size for file in files)
    rate = cache.num_records / timings["stream, window of 4 shards"].median
    print(f"record stream, SD1.5 latents, {cache.num_records} records, {size / 1e6:.0f} MB, warm, {machine()}\n")
    print(ratio_table(timings, ours="stream, window of 4 shards", unit="s per epoch"))
    print(
        f"\n{rate:.0f} records/s with one worker: {rate / CONSUMED_PAIRS_PER_SECOND:.1f} times the "
        f"{CONSUMED_PAIRS_PER_SECOND:.0f} pairs/s that one H200 would consume (calculated, not measured)"
    )
    record(
        "stream",
        {"records_per_second": rate, "bytes": size,
         "median_seconds": {name: timing.median for name, timing in timings.items()}},
    )


def _write(folder: Path, shards: int, pairs: int, kept: int) -> None:
    shape = (4, 64, 64)
    abar = torch.linspace(0.9991**0.5, 0.0047**0.5, 1000, dtype=torch.float64) ** 2
    schedule = NoiseSchedule.from_alphas_cumprod(abar)
    manifest = Manifest(
        latent_shape=shape, num_train_timesteps=1000, alphas_cumprod=tuple(abar.tolist()), prediction_type="epsilon",
        profile="full", seed=0, timesteps_per_pair=kept, resolution=512, crop="center", flip=False, vae_latent="mean",
        vae_dtype="float32", network_dtype="float32",
        inverter=InverterIdentity(name="ddim", steps=10, timestep_range=(0, 1000)), fingerprints={"unet": "random"},
    )
    writer = CacheWriter.open(str(folder), manifest)
    rng = np.random.default_rng(0)
    timestep = np.sort(rng.integers(0, 1000, (pairs, kept)), axis=1)
    x0 = torch.from_numpy(rng.standard_normal((pairs, 2, *shape), dtype=np.float32)).half()
    target = torch.from_numpy(rng.standard_normal((pairs, kept, 2, *shape), dtype=np.float32)).half()
    a, s = schedule.at(torch.from_numpy(timestep), trailing=4)
    x_t = point_from_target(x0[:, None], target, a, s)
    for shard in range(shards):
        arrays = {
            "x0": x0.numpy(), "x_t": x_t.numpy(), "delta": target.numpy(), "x0_t": x_t.numpy(),
            "target": target.numpy(), "reference_error": np.zeros((pairs, kept, 2), np.float32),
            "inversion_error": np.full((pairs, 2), np.nan, np.float32), "timestep": timestep.astype(np.int16),
            "pair_id": np.array([f"{shard}-{number}" for number in range(pairs)], dtype=object),
            "prompt_index": np.ones(pairs, np.int32), "caption_dropped": np.zeros(pairs, bool),
            "label": np.ones(pairs, np.float32), "prompt/text": np.array(["", "a prompt"], dtype=object),
            "prompt/embedding": rng.standard_normal((2, 77, 768)).astype(np.float16),
        }
        source = ShardSource(location="random", input_shard=f"{shard:04d}", rows=(0, pairs), fingerprint="random")
        writer.write(f"{shard:04d}-00000000", ShardData(arrays=arrays, source=source))


if __name__ == "__main__":
    main()
