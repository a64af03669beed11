"""Progress of a pass over rows, on stderr: a bar on a terminal, a plain line now and then otherwise."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class RowProgress(Protocol):
    def set_total(self, num_rows: int) -> None: ...

    def advance(self) -> None: ...


@contextmanager
def row_progress(console: Console, title: str) -> Iterator[RowProgress]:
    """Progress with rate and time left; the total may be told late."""
    if not console.is_terminal:
        yield _Lines(console, title)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield _Bar(progress, title)


class _Bar:
    def __init__(self, progress: Progress, title: str) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=None, rate="")

    def set_total(self, num_rows: int) -> None:
        self._progress.update(self._task, total=num_rows)

    def advance(self) -> None:
        speed = self._progress.tasks[0].speed
        self._progress.update(self._task, advance=1, rate=f"{speed:,.0f} rows/s" if speed else "")


class _Lines:
    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._total = 0
        self._done = 0
        self._begin = self._last = time.monotonic()

    def set_total(self, num_rows: int) -> None:
        self._total = num_rows
        self._begin = self._last = time.monotonic()

    def advance(self) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        rate = self._done / (now - self._begin)
        left = (self._total - self._done) / rate
        self._console.print(
            f"{self._title}: {self._done:,} of {self._total:,} rows, {rate:,.0f} rows/s, {left:,.0f} s left",
            markup=False,
            highlight=False,
        )
