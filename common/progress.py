"""Progress of long work: a bar with rate and time left on a terminal, plain lines otherwise."""

import sys
import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from inpo.common.console import console
from inpo.common.log import is_quiet, say

_PLAIN_INTERVAL_SECONDS = 10.0


class ProgressReport:
    """Counts `unit`s up to `total` (None: unknown) and says how fast and how long still.

    Plain lines come at most every ten seconds, and once at the end. `note` is shown beside the rate.
    """

    def __init__(self, label: str, *, total: int | None, unit: str, done: int = 0, quiet: bool = False) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self._start_done = done
        self._start = self._last_line = time.monotonic()
        self._note = ""
        self._quiet = quiet
        self._bar: Progress | None = None
        if not quiet and not is_quiet() and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console(stderr=True),
            )
            self._task = self._bar.add_task(label, total=total, completed=done, rate="", note="")

    def __enter__(self) -> "ProgressReport":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif not self._quiet and self.done != self._start_done:
            self._line()

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        elapsed = time.monotonic() - self._start
        return (self.done - self._start_done) / elapsed if elapsed > 0 else 0.0

    def advance(self, amount: int = 1, note: str | None = None) -> None:
        self.done += amount
        if note is not None:
            self._note = note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=f"{self.rate:.3g} {self.unit}/s", note=self._note)
        elif not self._quiet and time.monotonic() - self._last_line >= _PLAIN_INTERVAL_SECONDS:
            self._line()

    def _line(self) -> None:
        self._last_line = time.monotonic()
        left = ""
        if self.total is not None and self.rate > 0:
            left = f", {_duration((self.total - self.done) / self.rate)} left"
        of = f" of {self.total}" if self.total is not None else ""
        note = f", {self._note}" if self._note else ""
        say(f"{self.label}: {self.done}{of} {self.unit}, {self.rate:.3g} {self.unit}/s{left}{note}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
