"""The whole recipe, precompute and train, per record against online InPO: `python -m benchmarks.recipe`.

Over K kept timesteps per pair at n = 10; every K with its distinct pairs per 1,000 records, the number of passes over
the cache at which it breaks even with the online loop, and the hours that 400 steps of 1,024 records would take here.
"""

import argparse
import tempfile
from pathlib import Path
from typing import get_args

from benchmarks.measure import interleaved, machine, record, setting_up
from benchmarks.setting import PROMPTS, setting
from inpo.common.choices import CompileName
from inpo.precompute.worker import ShardWorker

KEPT = (1, 2, 4, 5, 10)
"""K."""
PAPER_RECORDS = 400 * 1024
"""Of the paper's run for Stable Diffusion 1.5: 400 steps, 1,024 records each."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", choices=["toyworld", "sd15-narrow", "sd15", "sdxl"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=32, help="pairs inverted per round")
    parser.add_argument("--compile", choices=get_args(CompileName), default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    here = setting(options.arch, compile=options.compile)
    with tempfile.TemporaryDirectory() as scratch:
        workers: dict[int, ShardWorker] = {}
        with setting_up():
            cache = here.cache(num_pairs=options.pairs, steps=10, kept=4, batch_size=options.batch_size)
            ours = here.cached(cache, batch_size=options.batch_size)
            online = here.online(options.batch_size)
            for number in KEPT:
                told = here.settings(steps=10, kept=number, batch_size=options.batch_size)
                workers[number] = here.worker(Path(scratch) / str(number), told, like=workers.get(KEPT[0]))
        pixels = here.pixels(options.batch_size)
        prompts = [PROMPTS[number % len(PROMPTS)] for number in range(options.batch_size)]
        task = here.tasks(options.pairs)[0]
        written = 0

        def precompute(number: int) -> None:
            nonlocal written
            written += 1
            worker = workers[number]
            worker.writer.write(f"{task.name}-{written}", worker.compute(worker.read(task)))

        contestants = {"cached step": ours.step, "online step": lambda: online.inpo_step(pixels, prompts)}
        contestants |= {f"precompute K={number}": (lambda k=number: precompute(k)) for number in KEPT}
        timings = interleaved(contestants, rounds=options.rounds)
        for worker in workers.values():
            worker.close()
    ours.stream.close()
    train = timings["cached step"].median / options.batch_size
    alternative = timings["online step"].median / options.batch_size
    told = f"{here.dtype}, --compile {here.compile}, {machine()}"
    print(f"recipe, {here.architecture}, n = 10, {told}; milliseconds per record\n")
    print(
        "| K | precompute | train | together | online | ratio | pairs per 1,000 records | break-even passes | hours |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    rows = {}
    for number in KEPT:
        once = timings[f"precompute K={number}"].median / options.pairs / number
        ratio = alternative / (once + train)
        passes = once / (alternative - train)
        hours = (once + train) * PAPER_RECORDS / 3600
        rows[number] = {
            "precompute": once,
            "train": train,
            "online": alternative,
            "ratio": ratio,
            "break_even": passes,
            "hours": hours,
        }
        print(
            f"| {number} | {1e3 * once:.1f} | {1e3 * train:.1f} | {1e3 * (once + train):.1f} | {1e3 * alternative:.1f} "
            f"| {ratio:.2f} | {1000 // number} | {passes:.2f} | {hours:.2f} |"
        )
    print(
        f"\nhours: {PAPER_RECORDS:,} records, extrapolated, on one device; K = 10 has a tenth as many distinct pairs.\n"
        f"The online step here: {alternative * PAPER_RECORDS / 3600:.2f}. The paper: 57.6 H800-hours for Stable "
        f"Diffusion 1.5, a new "
        "pair for every record"
    )
    record(
        "recipe",
        {"architecture": here.architecture, "batch_size": options.batch_size, "compile": here.compile, "by_kept": rows},
    )


if __name__ == "__main__":
    main()
