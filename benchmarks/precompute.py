"""Pairs per second of precompute, by batch size, against one path per kept timestep: `python -m
benchmarks.precompute`.

The alternative is what a script does that inverts up to a drawn timestep: every record is a run of its own, with the
images encoded again. Ours takes K records from one path. The same worker does both, so that only this differs.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.measure import interleaved, machine, ratio_table, record
from benchmarks.setting import setting
from inpo.common.cache import ShardData
from inpo.precompute.worker import ShardWorker

BATCH_SIZES = (1, 4, 16, 32)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", choices=["toyworld", "sd15-narrow", "sd15", "sdxl"])
    parser.add_argument("--pairs", type=int, default=32, help="pairs of the shard that is made again and again")
    parser.add_argument("--kept", type=int, default=4, help="K")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    here = setting(options.arch)
    task = here.tasks(options.pairs)[0]
    with tempfile.TemporaryDirectory() as scratch:

        def worker(kept: int, batch_size: int) -> ShardWorker:
            settings = here.settings(steps=10, kept=kept, batch_size=batch_size)
            return here.worker(Path(scratch) / f"{kept}-{batch_size}", settings)

        def make(worker: ShardWorker, times: int) -> None:
            for _ in range(times):
                stages.append(worker.compute(worker.read(task)))

        stages: list[ShardData] = []
        best = f"batch {BATCH_SIZES[-1]}"
        workers = {f"batch {size}": worker(options.kept, size) for size in BATCH_SIZES}
        single = worker(1, BATCH_SIZES[-1])
        contestants = {name: (lambda worker=each: make(worker, 1)) for name, each in workers.items()}
        contestants["a path per timestep, " + best] = lambda: make(single, options.kept)
        timings = interleaved(contestants, rounds=options.rounds)
        stages.clear()
        make(workers[best], options.rounds)
        for each in [*workers.values(), single]:
            each.close()
    print(
        f"precompute, {here.architecture}, {options.pairs} pairs, n = 10, K = {options.kept}, {here.dtype}, "
        f"{machine()}\n"
    )
    print(ratio_table(timings, ours=best, unit="s"))
    rates = {name: options.pairs / timing.median for name, timing in timings.items()}
    print("\npairs per second: " + ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items()))
    seconds = {name: sum(data.seconds[name] for data in stages) for name in stages[0].seconds}
    whole = sum(seconds.values())
    print("time by stage, " + best + ": " + ", ".join(f"{name} {value / whole:.0%}" for name, value in seconds.items()))
    record("precompute", {"architecture": here.architecture, "pairs_per_second": rates, "seconds_by_stage": seconds})


if __name__ == "__main__":
    main()
