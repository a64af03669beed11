"""Interleaved timing, a table of ratios, and one JSON line per run."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from inpo.common.tensor_watch import TensorWatch

RESULTS = Path("runs/bench/results.jsonl")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one contestant: median and the middle half."""

    name: str
    median: float
    low: float
    high: float


def interleaved(contestants: dict[str, Callable[[], object]], *, rounds: int, warmup: int = 1) -> dict[str, Timing]:
    """Run every contestant once per round, in turn, so that whatever else the machine does falls on all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(warmup + rounds):
        for name, run in contestants.items():
            synchronise()
            start = time.perf_counter()
            run()
            synchronise()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    timings = {}
    for name, values in seconds.items():
        low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0], values[0], values[0])
        timings[name] = Timing(name=name, median=median, low=low, high=high)
    return timings


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True, kw_only=True)
class Matmul:
    """One large square product, in the network's dtype: what a share of the matmul rate is a share of."""

    factor: torch.Tensor
    times: int
    """Products per timing, so that launching one is not part of it."""

    @classmethod
    def on(cls, device: torch.device, dtype: str) -> "Matmul":
        side, times = (8192, 10) if device.type == "cuda" else (1024, 4)
        return cls(factor=torch.randn(side, side, dtype=getattr(torch, dtype), device=device), times=times)

    def __call__(self) -> None:
        for _ in range(self.times):
            self.factor @ self.factor

    @property
    def flops(self) -> int:
        """Of one timing."""
        return self.times * 2 * self.factor.shape[0] ** 3

    @property
    def name(self) -> str:
        return f"matmul, {self.times} of {self.factor.shape[0]} x {self.factor.shape[0]}"


@contextmanager
def setting_up(what: str = "set-up") -> Iterator[None]:
    """Prints how long it took: what is made, loaded and compiled before anything is measured."""
    clock = time.perf_counter()
    yield
    synchronise()
    print(f"{what}: {time.perf_counter() - clock:.1f} s, not measured below", flush=True)


def peak_bytes(run: Callable[[], object], holds: Iterable[torch.nn.Module | torch.optim.Optimizer]) -> int:
    """Bytes of the modules and optimisers that a contestant holds, and the most that one run takes beside them."""
    resident = 0
    for each in holds:
        tensors = (
            [*each.parameters(), *each.buffers()]
            if isinstance(each, torch.nn.Module)
            else [value for state in each.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
        )
        resident += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if torch.cuda.is_available():
        synchronise()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronise()
        return resident + torch.cuda.max_memory_allocated() - before
    with TensorWatch() as watch:
        run()
    return resident + watch.peak


def machine() -> str:
    """The device in words, for the record."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def ratio_table(timings: dict[str, Timing], *, ours: str, unit: str) -> str:
    """Markdown: each contestant's median and its ratio to ours."""
    lines = [f"| | median {unit} | middle half | ratio to {ours} |", "|---|---|---|---|"]
    base = timings[ours].median
    for timing in timings.values():
        lines.append(
            f"| {timing.name} | {timing.median:.4g} | {timing.low:.4g} to {timing.high:.4g} | "
            f"{timing.median / base:.2f} |"
        )
    return "\n".join(lines)


def record(benchmark: str, values: dict[str, Any]) -> None:
    """Append one JSON line to runs/bench/results.jsonl."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    line = {
        "benchmark": benchmark,
        "machine": machine(),
        "torch": torch.__version__,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with RESULTS.open("a") as stream:
        stream.write(json.dumps(line | values) + "\n")
