"""Decoding in worker processes against threads: `python -m benchmarks.decode`.

Two questions: how many pairs are prepared in a second, and how much the thread that feeds the device is held up
meanwhile. The latter is measured by a loop of small tensor operations in the main thread, as the launching of a
network's kernels is one.
"""

import argparse
import io
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import interleaved, ratio_table, record
from inpo.common.pairs import Pair, Skipped
from inpo.common.pairs.decode import DecodePool, prepare_pair

OURS = "2 processes"
SIDE, RESOLUTION = 1024, 512


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    pairs = [_pair(row) for row in range(options.pairs)]
    work = partial(prepare_pair, resolution=(RESOLUTION, RESOLUTION))
    pools = {"the reading thread": DecodePool(0), "1 process": DecodePool(1), OURS: DecodePool(2)}

    def by_pool(pool: DecodePool) -> None:
        for _ in pool.map(work, pairs, arguments=lambda pair: (False,), on_crash=_crashed):
            pass

    def by_threads(number: int) -> None:
        with ThreadPoolExecutor(number) as threads:
            list(threads.map(lambda pair: work(pair, False), pairs))

    ways: dict[str, Callable[[], None]] = {
        **{name: partial(by_pool, pool) for name, pool in pools.items()},
        "1 thread": partial(by_threads, 1),
        "2 threads": partial(by_threads, 2),
    }
    timings = interleaved(ways, rounds=options.rounds)
    print(f"decoding {options.pairs} pairs of {SIDE} px JPEG to {RESOLUTION} px\n")
    print(ratio_table(timings, ours=OURS, unit="s"))

    def feeding(way: Callable[[], None] | None) -> None:
        with _beside(way):
            _feed()

    held_up = interleaved(
        {
            "alone": partial(feeding, None),
            "beside 1 process": partial(feeding, ways["1 process"]),
            "beside 1 thread": partial(feeding, ways["1 thread"]),
        },
        rounds=options.rounds,
    )
    print("\nfeeding a device meanwhile\n")
    print(ratio_table(held_up, ours="alone", unit="s"))
    for pool in pools.values():
        pool.close()
    record(
        "decode",
        {
            "pairs": options.pairs,
            "seconds": {name: timing.median for name, timing in timings.items()},
            "feeding": {name: timing.median for name, timing in held_up.items()},
        },
    )


def _pair(row: int) -> Pair:
    """Smooth colours under noise, which cost a JPEG decoder what a photograph does."""
    random = np.random.default_rng(row)
    slopes = np.linspace(0, 200, SIDE)[:, None, None] * random.random(3)
    files = []
    for _ in range(2):
        file = io.BytesIO()
        levels = np.clip(slopes + random.integers(0, 40, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(levels).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return Pair(pair_id=str(row), prompt="", win=files[0], lose=files[1], label=1.0, row=row)


def _crashed(pair: Pair) -> Skipped:
    raise RuntimeError(f"a worker died over pair {pair.pair_id}")


@contextmanager
def _beside(way: Callable[[], None] | None) -> Iterator[None]:
    """`way` again and again in another thread."""
    stop = threading.Event()

    def again() -> None:
        while way is not None and not stop.is_set():
            way()

    thread = threading.Thread(target=again)
    thread.start()
    time.sleep(0.2)
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _feed() -> None:
    x = torch.zeros(64)
    for _ in range(300_000):
        x = x + 1.0


if __name__ == "__main__":
    main()
