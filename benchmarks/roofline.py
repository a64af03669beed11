"""Useful FLOP per second of train and precompute, as a share of this machine's matmul rate: `python -m
benchmarks.roofline`.

FLOP are counted by PyTorch on the operations that run (convolutions, matrix products, attention); no activation is
recomputed here, so all of them are useful, but for the scores that fused attention forms again in its backward pass.
The matmul rate is that of large square products in the network's dtype, several per timing, measured in turn with the
others. Precompute is a whole shard, from the images' files to the commit, without the next one's beside it. What is
made, loaded, compiled and counted before is printed apart.
"""

import argparse
import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Matmul, interleaved, machine, record, setting_up
from benchmarks.setting import Setting, setting
from inpo.common.choices import CompileName
from inpo.precompute.tasks import ShardTask
from inpo.precompute.worker import ShardWorker

TRAIN, PRECOMPUTE = "train step", "precompute"


def count_flops(run: Callable[[], object], device: torch.device) -> int:
    """Floating point operations of one run: a multiplication with its addition counts as two."""
    # The CPU's fused attention is unknown to the counter; taken apart, it is two counted products.
    attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
    with attention, FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", choices=["toyworld", "sd15-narrow", "sd15", "sdxl"])
    parser.add_argument(
        "--batch-size", type=int, default=8, help="pairs per step of train, and per batch of precompute"
    )
    parser.add_argument("--shard", type=int, help="pairs of the shard that is made; unset: four batches")
    parser.add_argument("--of", choices=(TRAIN, PRECOMPUTE), nargs="+", default=(TRAIN, PRECOMPUTE))
    parser.add_argument("--compile", choices=get_args(CompileName), default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    here = setting(options.arch, compile=options.compile)
    pairs = options.shard or 4 * options.batch_size
    matmul = Matmul.on(here.device, here.dtype)
    contestants: dict[str, Callable[[], object]] = {}
    stages: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as closing:
        with setting_up():
            if TRAIN in options.of:
                cache = here.cache(num_pairs=pairs, steps=10, kept=4, batch_size=options.batch_size)
                ours = here.cached(cache, batch_size=options.batch_size)
                closing.callback(ours.stream.close)
                contestants[TRAIN] = ours.step
            if PRECOMPUTE in options.of:
                worker = here.worker(Path(scratch), here.settings(steps=10, kept=4, batch_size=options.batch_size))
                closing.callback(worker.close)
                contestants[PRECOMPUTE] = _shards(worker, here.tasks(pairs)[0], stages)
        with setting_up("counting"):
            flops = {name: count_flops(run, here.device) for name, run in _eagerly(contestants, here).items()}
        flops[matmul.name] = matmul.flops
        timings = interleaved({matmul.name: matmul, **contestants}, rounds=options.rounds)
    rates = {name: flops[name] / timing.median for name, timing in timings.items()}
    images = {TRAIN: 2 * options.batch_size, PRECOMPUTE: 2 * pairs}
    full = rates[matmul.name]
    told = f"{options.batch_size} pairs, {here.dtype}, --compile {here.compile}, {machine()}"
    print(f"roofline, {here.architecture}, {told}\n")
    print("| | TFLOP per image | seconds | TFLOP per second | share of the matmul rate |")
    print("|---|---|---|---|---|")
    for name, rate in rates.items():
        each = f"{flops[name] / images[name] / 1e12:.3g}" if name in images else "-"
        print(f"| {name} | {each} | {timings[name].median:.3g} | {rate / 1e12:.3g} | {rate / full:.0%} |")
    if stages:
        print("\nthe last shard: " + ", ".join(f"{name} {value:.2f} s" for name, value in stages.items()))
    record(
        "roofline",
        {
            "architecture": here.architecture,
            "batch_size": options.batch_size,
            "pairs": pairs,
            "compile": here.compile,
            "flops": flops,
            "flops_per_second": rates,
            "share": {name: rate / full for name, rate in rates.items()},
            "stages": stages,
        },
    )


def _shards(worker: ShardWorker, task: ShardTask, stages: dict[str, float]) -> Callable[[], object]:
    """A call makes one more: from the files of the pairs to a committed shard, one stage after the other. `stages` gets
    the seconds of each."""
    written = itertools.count()

    def shard() -> None:
        data = worker.compute(worker.read(task))
        clock = time.perf_counter()
        worker.writer.write(f"{task.name}-{next(written)}", data)
        stages.update(data.seconds | {"write": time.perf_counter() - clock})

    return shard


def _eagerly(contestants: dict[str, Callable[[], object]], here: Setting) -> dict[str, Callable[[], object]]:
    """The same without compiled kernels, in which nothing can be counted."""
    if here.compile == "off":
        return contestants

    def eager(run: Callable[[], object]) -> object:
        with torch.compiler.set_stance("force_eager"):
            return run()

    return {name: partial(eager, run) for name, run in contestants.items()}


if __name__ == "__main__":
    main()
