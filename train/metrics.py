"""Is it learning? Sums on the device, one synchronisation per logging interval, one JSON object a line."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from inpo.common.durable import storage_errors, write_file
from inpo.train.objectives import ObjectiveResult
from inpo.train.tracker import Tracker

NUM_BINS = 5
_COLUMNS = ("records", "loss", "implicit_accuracy", "margin", "win_advantage", "lose_advantage")


class Accumulator:
    """Sums of the metrics (train/objectives.py: ObjectiveResult) by timestep bin, on the device."""

    def __init__(self, *, device: torch.device, num_train_timesteps: int) -> None:
        self._sums = torch.zeros(NUM_BINS, len(_COLUMNS), dtype=torch.float64, device=device)
        self._num_train_timesteps = num_train_timesteps

    def add(self, result: ObjectiveResult, timestep: Int[Tensor, " record"]) -> None:
        """Add one micro-batch; no synchronisation."""
        columns = torch.stack(
            [
                torch.ones_like(result.loss),
                result.loss,
                result.implicit_accuracy,
                result.margin,
                result.win_advantage,
                result.lose_advantage,
            ],
            dim=1,
        ).double()
        bins = timestep * NUM_BINS // self._num_train_timesteps
        self._sums.index_add_(0, bins, columns.detach())

    def result(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Means over everything added, and by timestep bin; `reduce` sums over processes. Synchronises, then resets."""
        sums = reduce(self._sums).cpu().numpy()  # the one wait: all that follows is arithmetic here
        self._sums = torch.zeros_like(self._sums)
        total = sums.sum(0)
        result: dict[str, Any]
        result = {name: float(total[column] / total[0]) for column, name in enumerate(_COLUMNS) if column}
        result["by_timestep"] = [
            {
                "timesteps": [
                    bin_ * self._num_train_timesteps // NUM_BINS,
                    (bin_ + 1) * self._num_train_timesteps // NUM_BINS,
                ],
                "records": int(sums[bin_, 0]),
            }
            | {name: float(sums[bin_, column] / sums[bin_, 0]) for column, name in enumerate(_COLUMNS) if column}
            for bin_ in range(NUM_BINS)
            if sums[bin_, 0] > 0
        ]
        return result


class MetricsWriter:
    """metrics.jsonl and the tracker. Lines and sample images after the step that a run resumes from are dropped first:
    they are another model's."""

    def __init__(self, output: Path, *, tracker: Tracker | None, resumed_step: int) -> None:
        self.path = output / "metrics.jsonl"
        self._tracker = tracker
        if self.path.exists():
            with storage_errors("read the metrics", self.path):
                lines = self.path.read_text(errors="replace").splitlines()
            kept = [line for line in lines if (step := _step(line)) is not None and step <= resumed_step]
            write_file(self.path, "".join(line + "\n" for line in kept if resumed_step), action="write the metrics")
        with storage_errors("remove a sample", output / "samples"):
            for file in (output / "samples").glob("step-*.png"):
                if file.stem > f"step-{resumed_step:08d}":
                    file.unlink(missing_ok=True)

    def write(self, values: dict[str, Any]) -> None:
        """One line; numbers that are not finite become null, which JSON has and NaN it has not."""
        with storage_errors("write the metrics", self.path), self.path.open("a") as stream:
            stream.write(json.dumps(_jsonable(values), allow_nan=False) + "\n")
        scalars = {name: value for name, value in values.items() if isinstance(value, int | float) and name != "step"}
        for group in ("by_timestep", "held_out_by_timestep"):
            for part in values.get(group, []):
                low, high = part["timesteps"]
                scalars |= {f"{group}/{name}_{low}-{high}": part[name] for name in _COLUMNS if name != "records"}
        if self._tracker is not None:
            self._tracker.log(scalars, values["step"])

    def image(self, name: str, pixels: UInt8[np.ndarray, "height width 3"], step: int) -> None:
        """A picture for the tracker."""
        if self._tracker is not None:
            self._tracker.image(name, pixels, step)

    def close(self) -> None:
        if self._tracker is not None:
            self._tracker.finish()


def _step(line: str) -> int | None:
    """The line's step; None for a line that a killed run left half written."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_jsonable(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
