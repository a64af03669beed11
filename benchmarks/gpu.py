"""Everything that a GPU is to be asked, in order of value, each in a process of its own: `make bench-gpu`.

A line of JSON is kept after each in runs/bench/results.jsonl, so that nothing is lost if time runs out. A benchmark
that fails or takes too long is named, and the next one begins. `--only N` stops after N; `--arch toyworld` tries the
list on a CPU.
"""

import argparse
import subprocess
import sys
import time

LONGEST = 300
"""Seconds for one. Kernels with gradients alone take up to three minutes where none are kept from before."""
LIST = (
    ("roofline", "sd15", "--batch-size", "16", "--rounds", "3", "--of", "precompute"),
    ("train_step", "sd15", "--batch-size", "8", "--rounds", "5", "--compile", "off"),
    ("roofline", "sd15", "--batch-size", "16", "--rounds", "5", "--of", "train step"),
    ("roofline", "sdxl", "--batch-size", "4", "--shard", "8", "--rounds", "3", "--of", "precompute"),
    ("roofline", "sdxl", "--batch-size", "2", "--shard", "8", "--rounds", "5", "--of", "train step"),
    ("roofline", "sd15", "--batch-size", "2", "--rounds", "5", "--of", "train step", "--compile", "whole"),
    ("train_step", "sd15", "--batch-size", "2", "--rounds", "5", "--compile", "off"),
    ("kernels", "sd15", "--batch-size", "16"),
    ("kernels", "sd15", "--batch-size", "2"),
    ("kernels", "sdxl", "--batch-size", "4", "--ways", "as it is", "contiguous", "blocks"),
    ("recipe", "sd15", "--batch-size", "8", "--pairs", "16", "--rounds", "2", "--compile", "off"),
    ("groups", "sd15", "--pairs", "12", "--rounds", "2"),
    ("precompute", "sd15", "--pairs", "32", "--rounds", "2"),
    ("train_step", "sd15", "--batch-size", "8", "--rounds", "5"),
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, default=len(LIST), help="stop after so many")
    parser.add_argument("--arch", help="instead of each one's own, to try the list elsewhere")
    options = parser.parse_args(arguments)
    failed = []
    for name, arch, *told in LIST[: options.only]:
        command = [sys.executable, "-m", f"benchmarks.{name}", "--arch", options.arch or arch, *told]
        print(f"== {' '.join(command[2:])}", flush=True)
        clock = time.perf_counter()
        try:
            code = subprocess.run(command, timeout=LONGEST).returncode
        except subprocess.TimeoutExpired:
            code = -1
        if code:
            failed.append(" ".join(command[2:]))
        print(f"== {time.perf_counter() - clock:.0f} s{', failed' if code else ''}\n", flush=True)
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
