"""Where curves go beside metrics.jsonl: accelerate's trackers, each told the same numbers, settings and pictures."""

import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from jaxtyping import UInt8
from numpy import ndarray

from inpo.common.durable import storage_errors, write_file
from inpo.common.errors import UsageError
from inpo.common.log import note
from inpo.common.processes import processes

_STARTS: Mapping[str, Callable[[Path, str, str, int], dict[str, Any]]] = {
    "tensorboard": lambda output, project, name, step: {
        "run_name": "tensorboard",
        "logging_dir": str(output),
        "purge_step": step + 1,
    },
    "wandb": lambda output, project, name, step: {
        "run_name": project,
        "dir": str(output),
        "name": name,
        "id": _run_id(output / "wandb-id", resumed=step > 0),
        "resume": "allow",
    },
    "aim": lambda output, project, name, step: {"run_name": name, "logging_dir": str(output), "experiment": project},
    "clearml": lambda output, project, name, step: {"project_name": project, "task_name": name},
    "dvclive": lambda output, project, name, step: {"dir": str(output / "dvclive"), "resume": step > 0},
    "mlflow": lambda output, project, name, step: {"experiment_name": project, "run_name": name},
    "swanlab": lambda output, project, name, step: {
        "run_name": project,
        "experiment_name": name,
        "logdir": str(output / "swanlab"),
    },
    "trackio": lambda output, project, name, step: {"run_name": project, "name": name, "resume": "allow"},
}
"""{tracker: what it is started with: (output folder, project, name of the run, step that is resumed from)}; those that
are not here are told the project alone."""
_IMAGES: Mapping[str, Callable[[Any], tuple[Any, dict[str, Any]]]] = {
    "tensorboard": lambda pixels: (pixels[None], {"dataformats": "NHWC"}),
    "wandb": lambda pixels: ([pixels], {}),
    "swanlab": lambda pixels: ([pixels], {}),
    "aim": lambda pixels: (pixels, {}),
    "clearml": lambda pixels: (pixels, {}),
}
"""{tracker: a picture as it takes it}; the others take none."""


class Tracker:
    """One tracker. Started when it is made, so that a run does not begin that nobody can follow; but tensorboard, which
    can fail by its disk alone, with the first numbers: from then on it shows no others of later steps."""

    def __init__(
        self,
        name: str,
        output: Path,
        *,
        resumed_step: int,
        config: Mapping[str, Any],
        project: str | None = None,
        run_name: str | None = None,
    ) -> None:
        """Raises UsageError if it does not start."""
        processes()  # which trackers ask for the first of them
        self.name = name
        self._failed = self._started = False
        self._where = output / "tensorboard"
        project = project or (os.environ.get("WANDB_PROJECT") if name == "wandb" else None) or "inpo"
        start = _STARTS.get(name, lambda output, project, name, step: {"run_name": project})
        kind = LOGGER_TYPE_TO_CLASS[name]
        with self._storage():
            told = start(output, project, run_name or output.resolve().name, resumed_step)
            try:
                self._tracker: GeneralTracker = kind(**told)
                if name != "tensorboard":
                    self._start().store_init_configuration(_plain(config))  # of tensorboard it would be a second run
            except Exception as error:
                raise UsageError(
                    f"The tracker {name} does not start.",
                    where=f"--tracker {name}",
                    got=f"{type(error).__name__}: {' '.join(str(error).split())}"[:400],
                    fix="set it up as it says, or choose another --tracker: metrics.jsonl is always written",
                ) from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        with self._told():
            self._start().log(dict(values), step=step)

    def image(self, name: str, pixels: UInt8[ndarray, "height width 3"], step: int) -> None:
        """A picture, if the tracker takes any."""
        if self.name in _IMAGES:
            value, options = _IMAGES[self.name](pixels)
            with self._told():
                self._start().log_images({name: value}, step=step, **options)

    def finish(self) -> None:
        with self._told():
            if self._started:
                self._tracker.finish()

    def _start(self) -> GeneralTracker:
        """The tracker, started."""
        if not self._started:
            self._tracker.start()
            self._started = True
        return self._tracker

    @contextmanager
    def _told(self) -> Iterator[None]:
        """A disk that refuses ends the run, as everywhere; a service that fails does not: it is said, once."""
        with self._storage():
            try:
                yield
            except Exception as error:
                if self.name == "tensorboard":
                    raise
                if not self._failed:
                    first = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
                    note(f"the tracker {self.name} failed ({first}); the run goes on, metrics.jsonl has everything")
                self._failed = True

    @contextmanager
    def _storage(self) -> Iterator[None]:
        with storage_errors(f"write for {self.name}", self._where):
            yield


def _plain(config: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Settings as every tracker takes them."""
    return {
        name: value if isinstance(value, str | int | float | bool) else json.dumps(value)
        for name, value in config.items()
        if value is not None
    }


def _run_id(file: Path, *, resumed: bool) -> str:
    """The id of this folder's run: another one where training begins anew."""
    with storage_errors("read the tracker's id", file):
        known = file.read_text().strip() if resumed and file.exists() else ""
    if not known:
        known = uuid.uuid4().hex[:12]
        write_file(file, known + "\n", action="write the tracker's id")
    return known
