"""Overlap: while the device computes a shard, the next one is read and the previous one is written.

    reading thread -> queue of 1 -> this thread (device) -> writing thread, 1 waiting at most

Bounded, so memory holds about three shards whatever the source's size.
"""

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from common.cache import Commit, ShardData
from common.errors import DataError
from precompute.tasks import ShardTask
from precompute.worker import PreparedShard, ShardWorker


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one task: committed by us, committed by somebody else first, or its input unreadable."""

    task: ShardTask
    commit: Commit | None = None
    lost_race: bool = False
    error: DataError | None = None


@dataclass(kw_only=True)
class Timing:
    """Where the time of the computing thread went, in seconds."""

    waiting_for_input: float = 0.0
    computing: float = 0.0
    waiting_for_writing: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)

    def add(self, data: ShardData) -> None:
        for name, value in data.seconds.items():
            self.stages[name] = self.stages.get(name, 0.0) + value

    def report(self) -> str:
        total = self.waiting_for_input + self.computing + self.waiting_for_writing
        if total <= 0:
            return "no time spent"
        parts = (
            ("network and VAE", self.computing), ("waiting for images", self.waiting_for_input),
            ("waiting for the disk", self.waiting_for_writing),
        )
        return ", ".join(f"{name} {value / total:.0%}" for name, value in parts) + f" of {total:.1f} s"


def run_tasks(worker: ShardWorker, tasks: Iterable[ShardTask], timing: Timing) -> Iterator[Outcome]:
    """Make every task's shard; yields outcomes as shards are committed. Tasks are pulled one ahead, not all at once."""
    prepared: queue.Queue[PreparedShard | Outcome | BaseException | None] = queue.Queue(maxsize=1)
    stop = threading.Event()

    def read_ahead() -> None:
        try:
            for task in tasks:
                try:
                    item: PreparedShard | Outcome = worker.read(task)
                except DataError as error:
                    item = Outcome(task=task, error=error)
                if not _put(prepared, item, stop):
                    return
            _put(prepared, None, stop)
        except BaseException as error:  # handed to the computing thread, which raises it
            _put(prepared, error, stop)

    reader = threading.Thread(target=read_ahead, name="read-ahead", daemon=True)
    reader.start()
    writing: Future[Commit | None] | None = None
    writing_task: ShardTask | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="write-behind") as writer:
        try:
            while True:
                clock = time.perf_counter()
                item = prepared.get()
                timing.waiting_for_input += time.perf_counter() - clock
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    break
                if isinstance(item, Outcome):
                    yield item
                    continue
                clock = time.perf_counter()
                data = worker.compute(item)
                timing.computing += time.perf_counter() - clock
                timing.add(data)
                clock = time.perf_counter()
                if writing is not None and writing_task is not None:
                    yield _outcome(writing_task, writing.result())
                timing.waiting_for_writing += time.perf_counter() - clock
                writing, writing_task = writer.submit(worker.write, item.task.name, data), item.task
            clock = time.perf_counter()
            if writing is not None and writing_task is not None:
                last, writing = writing.result(), None
                timing.waiting_for_writing += time.perf_counter() - clock
                yield _outcome(writing_task, last)
        finally:
            # A shard that is being written when we are stopped is finished, not torn: leaving the pool waits for it.
            stop.set()


def _outcome(task: ShardTask, commit: Commit | None) -> Outcome:
    return Outcome(task=task, commit=commit, lost_race=commit is None)


def _put(
    items: "queue.Queue[PreparedShard | Outcome | BaseException | None]",
    item: PreparedShard | Outcome | BaseException | None,
    stop: threading.Event,
) -> bool:
    """Put, but give up when the computing thread has stopped. Returns False then."""
    while not stop.is_set():
        try:
            items.put(item, timeout=0.2)
            return True
        except queue.Full:
            continue
    return False
