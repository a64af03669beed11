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
from inpo.train.checkpoint import list_checkpoints
from inpo.train.objectives import ObjectiveResult
from inpo.train.tracker import Tracker

METRICS = "metrics.jsonl"
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
    """metrics.jsonl and the tracker.

    Lines and sample images after the step that a run resumes from are another model's. The first new line or sample
    takes their place, but while there are checkpoints after that step, which a run may yet go on from, the save that
    removes those: until then what is new waits in memory.
    """

    def __init__(
        self, output: Path, *, tracker: Tracker | None, resumed_step: int, on_begin: Callable[[], object] = lambda: None
    ) -> None:
        """`on_begin` is called once the first new line or sample has taken the place of what was there."""
        self.path = output / METRICS
        self._samples = output / "samples"
        self._tracker = tracker
        self._resumed_step = resumed_step
        self._on_begin = on_begin
        self._begun = False
        last = list_checkpoints(output / "checkpoints")[-1:]
        self._waits = any(int(each.name.removeprefix("step-")) > resumed_step for each in last)
        self._lines: list[str] = []
        self._told: list[Callable[[Tracker], None]] = []
        self._pictures: dict[Path, bytes] = {}

    def write(self, values: dict[str, Any]) -> None:
        """One line; numbers that are not finite become null, which JSON has and NaN it has not."""
        self._lines.append(_text(values))
        scalars = {name: value for name, value in values.items() if isinstance(value, int | float) and name != "step"}
        for group in ("by_timestep", "held_out_by_timestep"):
            for part in values.get(group, []):
                low, high = part["timesteps"]
                scalars |= {f"{group}/{name}_{low}-{high}": part[name] for name in _COLUMNS if name != "records"}
        self._told.append(lambda tracker: tracker.log(scalars, values["step"]))
        self._put()

    def image(self, name: str, pixels: UInt8[np.ndarray, "height width 3"], step: int, *, png: bytes) -> None:
        """The samples of a step, for the tracker and as a file."""
        self._pictures[self._samples / f"step-{step:08d}.png"] = png
        self._told.append(lambda tracker: tracker.image(name, pixels, step))
        self._put()

    def saved(self) -> None:
        """A checkpoint of this run is there, and those of later steps are not."""
        self._waits = False
        self._put()

    def _put(self) -> None:
        """Write what is new, and tell the tracker."""
        if self._waits or not self._told:
            return
        for file, png in self._pictures.items():
            write_file(file, png, action="write a sample")
        if not self._begun:
            self._begin()
        elif self._lines:
            with storage_errors("write the metrics", self.path), self.path.open("a") as stream:
                stream.writelines(self._lines)
        self._lines.clear()
        self._pictures.clear()
        if self._tracker is not None:
            for tell in self._told:
                tell(self._tracker)
        self._told.clear()

    def _begin(self) -> None:
        """Put what is new in the place of what another model left: in one piece, so that a kill loses neither."""
        kept = [line for line in read_metrics(self.path) if self._resumed_step and line["step"] <= self._resumed_step]
        write_file(self.path, "".join([*map(_text, kept), *self._lines]), action="write the metrics")
        with storage_errors("remove a sample", self._samples):
            for file in self._samples.glob("step-*.png"):
                if file.stem > f"step-{self._resumed_step:08d}" and file not in self._pictures:
                    file.unlink(missing_ok=True)
        self._begun = True
        self._on_begin()

    def close(self) -> None:
        if self._tracker is not None:
            self._tracker.finish()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, [] if there is none, but for one that a killed run left half written."""
    if not file.exists():
        return []
    with storage_errors("read the metrics", file):
        lines = file.read_text(errors="replace").splitlines()
    return [values for line in lines if (values := _line(line)) is not None]


def _text(values: dict[str, Any]) -> str:
    return json.dumps(_jsonable(values), allow_nan=False) + "\n"


def _line(text: str) -> dict[str, Any] | None:
    """None: it is not one."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_jsonable(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
