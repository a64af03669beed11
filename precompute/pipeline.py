"""Overlap: while the device computes a shard, the next one is read and the previous one is written.

    reading thread -> 1 prepared shard waiting -> this thread (device) -> writing thread, nothing waiting

Bounded, so memory holds four shards at most, whatever the source's size: one being read, one waiting, one being
computed, one being written.
"""

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

from inpo.common.cache.commits import AnyCommit
from inpo.common.errors import DataError


@runtime_checkable
class Task(Protocol):
    """One shard to be made."""

    @property
    def name(self) -> str: ...

    @property
    def num_rows(self) -> int:
        """What progress counts: pairs, or prompts."""
        ...


@runtime_checkable
class Worker(Protocol):
    """Who makes shards of images, or of texts. `read` may run in another thread than `compute`, `write` in a third."""

    def is_committed(self, task: Any) -> bool: ...

    def read(self, task: Any) -> Any:
        """Raises DataError if the input shard cannot be read."""
        ...

    def compute(self, item: Any) -> Any:
        """From what was read to what is written; has `seconds`, by stage."""
        ...

    def write(self, task: Any, data: Any) -> AnyCommit | None:
        """None if another writer committed the shard first."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one task: committed by us, committed by somebody else first, or its input unreadable."""

    task: Task
    commit: AnyCommit | None = None
    lost_race: bool = False
    error: DataError | None = None


@dataclass(kw_only=True)
class Timing:
    """Where the time of the computing thread went, in seconds, and what it is doing now."""

    waiting_for_input: float = 0.0
    computing: float = 0.0
    waiting_for_writing: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    longest_computing: float = 0.0
    """The slowest shard so far."""
    activity: str = "starting"
    since: float = field(default_factory=time.perf_counter)
    """When `activity` began, on the clock of time.perf_counter."""

    def begin(self, activity: str) -> float:
        """Note what starts now, for whoever asks why nothing moves. Returns the time."""
        self.activity, self.since = activity, time.perf_counter()
        return self.since

    def add(self, stages: Mapping[str, float], seconds: float) -> None:
        """One shard was computed."""
        self.computing += seconds
        self.longest_computing = max(self.longest_computing, seconds)
        for name, value in stages.items():
            self.stages[name] = self.stages.get(name, 0.0) + value

    def merge(self, other: "Timing") -> None:
        """Add another worker's time."""
        self.waiting_for_input += other.waiting_for_input
        self.computing += other.computing
        self.waiting_for_writing += other.waiting_for_writing
        self.longest_computing = max(self.longest_computing, other.longest_computing)
        for name, value in other.stages.items():
            self.stages[name] = self.stages.get(name, 0.0) + value

    def report(self) -> str:
        """One line: shares of the computing thread's time, then what each stage took in its own thread."""
        total = self.waiting_for_input + self.computing + self.waiting_for_writing
        if total <= 0:
            return "no time spent"
        parts = (
            ("network and VAE", self.computing),
            ("waiting for images", self.waiting_for_input),
            ("waiting for the disk", self.waiting_for_writing),
        )
        line = ", ".join(f"{name} {value / total:.0%}" for name, value in parts) + f" of {total:.1f} s"
        stages = ", ".join(f"{name} {value:.1f} s" for name, value in self.stages.items())
        return f"{line} (by stage, overlapped: {stages})" if stages else line


@dataclass(frozen=True, kw_only=True)
class _Written:
    """The writing thread has finished a shard."""

    task: Task
    result: Future[AnyCommit | None]

    def outcome(self) -> Outcome:
        """Raises what the writing thread raised."""
        commit = self.result.result()
        return Outcome(task=self.task, commit=commit, lost_race=commit is None)


@dataclass(frozen=True, kw_only=True)
class _Read:
    """The reading thread has read a task."""

    task: Task
    item: Any


@dataclass(frozen=True, kw_only=True)
class _End:
    """The reading thread has no more, or failed."""

    error: BaseException | None = None


_Events = queue.SimpleQueue[_Read | Outcome | _Written | _End]


def run_tasks(
    worker: Worker, tasks: Iterable[Task], timing: Timing, is_wanted: Callable[[Task], bool] = lambda task: True
) -> Generator[Outcome, None, None]:
    """Make every task's shard; yields each outcome when the shard is committed, not in order.

    Tasks are pulled one ahead, in the reading thread, so `tasks` may be a queue that is filled while this runs. A
    shard that another run has committed meanwhile is not made again. A task that is not wanted any more, as an outcome
    may tell, is dropped before the next step, without an outcome. The first failure of any thread is raised here;
    a shard that is being written then, or when the caller stops, is finished first.
    """
    events: _Events = queue.SimpleQueue()
    room = threading.Semaphore(1)
    stop = threading.Event()
    reader = threading.Thread(
        target=_read_ahead, args=(worker, filter(is_wanted, tasks), events, room, stop), name="read-ahead", daemon=True
    )
    reader.start()
    writing = False
    ended = False
    waiting: list[_Read | Outcome] = []
    with ThreadPoolExecutor(1, thread_name_prefix="write-behind") as writer:
        try:
            while True:
                clock = timing.begin("writing the last shard" if ended else "waiting for images")
                while not waiting and not (ended and not writing):
                    event = events.get()
                    if isinstance(event, _Written):
                        writing = False
                        yield event.outcome()
                    elif isinstance(event, _End):
                        if event.error is not None:
                            raise event.error
                        ended = True
                        timing.waiting_for_input += time.perf_counter() - clock
                        clock = timing.begin("writing the last shard")
                    else:
                        waiting.append(event)
                if ended and not waiting:
                    timing.waiting_for_writing += time.perf_counter() - clock
                    return
                timing.waiting_for_input += time.perf_counter() - clock
                item = waiting.pop()
                room.release()
                if isinstance(item, Outcome):
                    yield item
                    continue
                task = item.task
                if not is_wanted(task):
                    continue
                # Read a while ago: another run may have committed it in between.
                if worker.is_committed(task):
                    yield Outcome(task=task, lost_race=True)
                    continue
                clock = timing.begin(f"computing shard {task.name}")
                data = worker.compute(item.item)
                timing.add(data.seconds, time.perf_counter() - clock)
                clock = timing.begin("writing the shard before")
                while writing:
                    event = events.get()
                    if isinstance(event, _Written):
                        writing = False
                        timing.waiting_for_writing += time.perf_counter() - clock
                        yield event.outcome()
                    elif isinstance(event, _End):
                        if event.error is not None:
                            raise event.error
                        ended = True
                    else:
                        waiting.append(event)
                if not is_wanted(task):  # what was being written has told so
                    continue
                written = writer.submit(worker.write, task, data)
                writing = True
                written.add_done_callback(partial(_put_written, events, task))
        finally:
            # A shard that is being written when we are stopped is finished, not torn: leaving the pool waits for it.
            stop.set()


def _put_written(events: _Events, task: Task, result: Future[AnyCommit | None]) -> None:
    events.put(_Written(task=task, result=result))


def _read_ahead(
    worker: Worker, tasks: Iterable[Task], events: _Events, room: threading.Semaphore, stop: threading.Event
) -> None:
    """Read task after task, one ahead of the computing thread, until `stop`."""
    try:
        for task in tasks:
            item: _Read | Outcome
            try:
                if stop.is_set():
                    return
                if worker.is_committed(task):
                    item = Outcome(task=task, lost_race=True)
                else:
                    item = _Read(task=task, item=worker.read(task))
            except DataError as error:
                item = Outcome(task=task, error=error)
            while not room.acquire(timeout=0.2):
                if stop.is_set():
                    return
            events.put(item)
        events.put(_End())
    except BaseException as error:  # handed to the computing thread, which raises it
        events.put(_End(error=error))
