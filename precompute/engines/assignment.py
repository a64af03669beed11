"""Who makes which shard, without a cluster: the driver asks here, and tells here what became of it.

    waiting --take--> in a worker's line --finished--> done
                          |  lost (the worker died)
                          +--> suspect: waits again, and is made with nothing else beside it --4 deaths--> given up

Doing a shard twice is safe (the commit is put-if-absent, one wins); this only decides what is worth doing.
"""

import random
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

_LINE_LENGTH = 3
"""Shards a worker holds: one being written, one computed, one read ahead."""
_STARTED = 2
"""The first so many of a line may be in the works already."""
_MAX_DEATHS = 4
_PATIENCE = 2.0
_REMEMBERED = 1000
"""Durations that the usual time is taken from."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What a dead worker cost."""

    retried: tuple[str, ...]
    """Handed out again: shards that only this worker had."""
    given_up: tuple[str, ...]
    """Shards that were in the hands of four workers when they died."""
    seconds: float
    """Work lost: time since the worker last finished a shard."""


@dataclass(kw_only=True)
class _Worker:
    free_since: float
    line: dict[str, float] = field(default_factory=dict)
    """Shards in the order they were handed out, with the time."""


class Assignment:
    """The state of one run over named shards. Times are seconds on any one clock, given by the caller."""

    def __init__(self, names: Iterable[str]) -> None:
        self._waiting = list(reversed(list(names)))
        self._suspects: list[str] = []
        self._deaths: dict[str, int] = {}
        self._workers: dict[str, _Worker] = {}
        self._durations: list[float] = []
        self._finished: set[str] = set()
        self._given_up: set[str] = set()
        self._total = len(self._waiting)

    @property
    def num_unfinished(self) -> int:
        """Shards neither done nor given up."""
        return self._total - len(self._finished) - len(self._given_up)

    def line(self, worker: str) -> tuple[str, ...]:
        """What a worker holds now, oldest first."""
        return tuple(self._workers[worker].line)

    def join(self, worker: str, now: float) -> None:
        """A worker is ready."""
        self._workers[worker] = _Worker(free_since=now)

    def take(self, worker: str, now: float) -> str | None:
        """The next shard for a worker, or None: its line is full, or nothing is worth its time."""
        line = self._workers[worker].line
        if any(name in self._deaths for name in line):
            return None  # a suspect may kill its worker: nothing else shall die with it
        name = None
        if not line and self._suspects:
            name = self._suspects.pop(0)
        elif self._waiting and len(line) < _LINE_LENGTH:
            name = self._waiting.pop()
        elif not line:
            name = self._straggler(now)
        if name is not None:
            line[name] = now
        return name

    def _straggler(self, now: float) -> str | None:
        """A shard that another worker has and that an idle one may make too.

        First those that the other has surely not begun, from the end of its line; then, oldest first, those that
        have taken twice the usual time. At most two workers have the same shard.
        """
        lines = [worker.line for worker in self._workers.values()]
        patience = _PATIENCE * statistics.median(self._durations) if self._durations else float("inf")
        copies = Counter(name for line in lines for name in line)
        found: list[tuple[int, float, str]] = []
        for line in lines:
            for position, (name, since) in enumerate(line.items()):
                worth_it = position >= _STARTED or now - since > patience
                if worth_it and copies[name] == 1 and name not in self._finished:
                    found.append((-max(position, _STARTED - 1), since, name))
        return min(found)[2] if found else None

    def finished(self, worker: str, name: str, now: float) -> bool:
        """A worker is done with a shard. False if another had finished it before."""
        if worker in self._workers:
            state = self._workers[worker]
            self._durations.append(now - max(state.line.pop(name, now), state.free_since))
            del self._durations[:-_REMEMBERED]
            state.free_since = now
        if name in self._finished:
            return False
        self._finished.add(name)
        self._given_up.discard(name)
        return True

    def lost(self, worker: str, now: float) -> Loss:
        """A worker has died; what only it had is handed out again, four times at most."""
        state = self._workers.pop(worker)
        retried: list[str] = []
        given_up: list[str] = []
        elsewhere = {name for other in self._workers.values() for name in other.line}
        for name in state.line:
            if name in self._finished or name in elsewhere:
                continue
            self._deaths[name] = self._deaths.get(name, 0) + 1
            if self._deaths[name] >= _MAX_DEATHS:
                given_up.append(name)
                self._given_up.add(name)
            else:
                retried.append(name)
                self._suspects.append(name)
        seconds = now - max(min(state.line.values()), state.free_since) if state.line else 0.0
        return Loss(retried=tuple(retried), given_up=tuple(given_up), seconds=seconds)

    def shuffle(self) -> None:
        """Another run works on the same cache: go on in random order, so that the two keep out of each other's way."""
        random.SystemRandom().shuffle(self._waiting)
