"""Cost per pair as pairs, K, n, resolution and workers grow: `python -m benchmarks.scaling`. It should be flat per
pair.

Each row changes one thing of the first. Milliseconds are of one process making whole shards, from reading the images to
the commit; the last column divides by the network calls of the inversion, which is what should decide.
"""

import argparse
import multiprocessing
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks.architectures import Architecture
from benchmarks.measure import interleaved, machine, record
from benchmarks.setting import Setting, setting

FIRST = {"pairs": 32, "kept": 4, "steps": 10, "resolution": 64}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", choices=["toyworld", "sd15-narrow", "sd15", "sdxl"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    here = setting(options.arch)
    first = FIRST | {"resolution": here.resolution}
    rows = [first]
    rows += [first | {"pairs": number} for number in (64, 128, 256)]
    rows += [first | {"kept": number} for number in (1, 2, 10)]
    rows += [first | {"steps": number} for number in (5, 30)]
    rows += [first | {"resolution": 2 * here.resolution}]
    with tempfile.TemporaryDirectory() as scratch:
        made = {str(row): _Shards(here, row, Path(scratch) / str(number)) for number, row in enumerate(rows)}
        timings = interleaved({name: shards.make for name, shards in made.items()}, rounds=options.rounds)
        print(f"precompute's scaling, {here.architecture}, {here.dtype}, {machine()}\n")
        print("| pairs | K | n | side | ms per pair | calls per image | ms per pair and call |")
        print("|---|---|---|---|---|---|---|")
        found = []
        for row in rows:
            shards = made[str(row)]
            per_pair = 1e3 * timings[str(row)].median / row["pairs"]
            calls = shards.num_calls / shards.num_made / row["pairs"] / 2
            found.append(row | {"ms_per_pair": per_pair, "calls_per_image": calls})
            print(
                f"| {row['pairs']} | {row['kept']} | {row['steps']} | {row['resolution']} | {per_pair:.1f} | "
                f"{calls:.1f} "
                f"| {per_pair / calls:.2f} |"
            )
        workers = {number: _in_processes(options.arch, number, options.rounds) for number in (1, 2)}
    print(
        "\nworkers of one thread each: "
        + ", ".join(f"{number}: {rate:.3g} pairs/s" for number, rate in workers.items())
    )
    print(f"two workers make {workers[2] / workers[1]:.2f} times the pairs of one")
    record("scaling", {"architecture": here.architecture, "rows": found, "pairs_per_second_by_workers": workers})


class _Shards:
    """Makes the same shard under a new name each time."""

    def __init__(self, here: Setting, row: dict[str, int], cache: Path) -> None:
        settings = here.settings(steps=row["steps"], kept=row["kept"], batch_size=32)
        settings = settings.model_copy(update={"resolution": str(row["resolution"])})
        self._worker = here.worker(cache, settings)
        self._task = here.tasks(row["pairs"])[0]
        self.num_made = 0

    @property
    def num_calls(self) -> int:
        return self._worker.components.denoiser.num_calls

    def make(self) -> None:
        self.num_made += 1
        data = self._worker.compute(self._worker.read(self._task))
        self._worker.writer.write(f"{self._task.name}-{self.num_made}", data)


def _in_processes(architecture: Architecture | None, number: int, rounds: int) -> float:
    """Pairs per second of `number` processes at work at once, from the first one's start to the last one's end."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(number, mp_context=context) as pool, context.Manager() as manager:
        together = manager.Barrier(number)
        spans = [pool.submit(_one_worker, architecture, rounds, together) for _ in range(number)]
        times = [span.result() for span in spans]
    return number * rounds * FIRST["pairs"] / (max(end for _, end in times) - min(start for start, _ in times))


def _one_worker(architecture: Architecture | None, rounds: int, together: threading.Barrier) -> tuple[float, float]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        here = setting(architecture)
        shards = _Shards(here, FIRST | {"resolution": here.resolution}, Path(scratch))
        shards.make()
        together.wait()
        start = time.time()
        for _ in range(rounds):
            shards.make()
        return start, time.time()


if __name__ == "__main__":
    main()
