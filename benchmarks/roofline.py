"""Useful FLOP per second of train and precompute, as a share of this machine's matmul rate: `python -m
benchmarks.roofline`.

FLOP are counted by PyTorch on the operations that run (convolutions, matrix products, attention); no activation is
recomputed here, so all of them are useful, but for the scores that fused attention forms again in its backward pass.
The matmul rate is that of one large square product in the network's dtype, measured in turn with the others.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import interleaved, machine, record
from benchmarks.setting import setting


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
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    here = setting(options.arch)
    pairs = 4 * options.batch_size
    ours = here.cached(
        here.cache(num_pairs=pairs, steps=10, kept=4, batch_size=options.batch_size), batch_size=options.batch_size
    )
    side = 8192 if here.device.type == "cuda" else 1024
    factor = torch.randn(side, side, dtype=getattr(torch, here.dtype), device=here.device)
    task = here.tasks(pairs)[0]
    with tempfile.TemporaryDirectory() as scratch:
        worker = here.worker(Path(scratch), here.settings(steps=10, kept=4, batch_size=options.batch_size))
        contestants: dict[str, Callable[[], object]] = {
            f"matmul, {side} x {side}": lambda: factor @ factor,
            "train step": ours.step,
            "precompute": lambda: worker.compute(worker.read(task)),
        }
        flops = {name: count_flops(run, here.device) for name, run in contestants.items()}
        timings = interleaved(contestants, rounds=options.rounds)
        worker.close()
    ours.stream.close()
    rates = {name: flops[name] / timings[name].median for name in contestants}
    images = {"train step": 2 * options.batch_size, "precompute": 2 * pairs}
    full = next(iter(rates.values()))
    print(f"roofline, {here.architecture}, {options.batch_size} pairs, {here.dtype}, {machine()}\n")
    print("| | TFLOP per image | TFLOP per second | share of the matmul rate |")
    print("|---|---|---|---|")
    for name, rate in rates.items():
        each = f"{flops[name] / images[name] / 1e12:.3g}" if name in images else "-"
        print(f"| {name} | {each} | {rate / 1e12:.3g} | {rate / full:.0%} |")
    record(
        "roofline",
        {
            "architecture": here.architecture,
            "batch_size": options.batch_size,
            "flops": flops,
            "flops_per_second": rates,
        },
    )


if __name__ == "__main__":
    main()
