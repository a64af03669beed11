"""The local engine: one process, or as many as `accelerate launch` starts, with a static split of the shards."""

import contextlib
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping

from inpo.common.batch_size import MOST
from inpo.common.cache import CacheWriter, Commit
from inpo.common.choices import AUTO
from inpo.common.models import Model
from inpo.common.processes import processes
from inpo.precompute.components import Share
from inpo.precompute.engines.waiting_room import WaitingRoom
from inpo.precompute.engines.watchdog import Watchdog
from inpo.precompute.phases import Phase
from inpo.precompute.pipeline import Outcome, Task, Timing, run_tasks
from inpo.precompute.settings import PrecomputeSettings
from inpo.precompute.tasks import split


def run_local(
    phase: Phase,
    tasks: Mapping[int, Task],
    *,
    model: Model,
    writer: CacheWriter,
    settings: PrecomputeSettings,
    room: WaitingRoom,
    committed: set[str],
    on_outcome: Callable[[Outcome], None],
    is_wanted: Callable[[Task], bool],
    on_batch_size: Callable[[int], None],
) -> str:
    """Make this process's share of `tasks` on its own device, then wait for the others; returns the time report of all.

    `on_batch_size` is told the batch size that all processes take, where it was to be found. The split is by the
    tasks' numbers, so it does not depend on when a process looked. What is not wanted any more is dropped, also when it
    is read or computed. Nothing is loaded where there is nothing to do.
    """
    state = processes()
    numbers = split(max(tasks, default=-1) + 1, state.process_index, state.num_processes)
    mine = [task for number, task in tasks.items() if number in numbers and task.name not in committed]
    timing = Timing()

    def least(pairs: int) -> int:
        found = min(room.gathered(pairs))
        if mine or found < MOST:  # not where nobody has anything to do
            on_batch_size(found)
        return found

    if not mine and phase.kind is Commit and settings.batch_size == AUTO:
        least(MOST)
    if mine:
        share = Share(num_rows=sum(task.num_rows for task in mine), least=least)
        worker = phase.worker(model, writer, settings, state.device, share)
        try:
            met_another_run = threading.Event()
            order = in_order(mine, met_another_run)
            with Watchdog(timing), contextlib.closing(run_tasks(worker, order, timing, is_wanted)) as outcomes:
                for outcome in outcomes:
                    if outcome.lost_race:
                        met_another_run.set()
                    on_outcome(outcome)
        finally:
            worker.close()
    whole = Timing()
    for each in room.gathered(timing):
        whole.merge(each)
    return whole.report() + (f", over {state.num_processes} processes" if state.num_processes > 1 else "")


def in_order(tasks: Iterable[Task], met_another_run: threading.Event) -> Iterator[Task]:
    """The tasks in order; what is left in random order each time that another run is met at work on the same cache.

    Two runs that go through the same shards in the same order would make each of them twice, for ever side by side.
    In random order they meet only now and then: about ln(n) times in n shards.
    """
    left = list(tasks)[::-1]  # the next is the last
    while left:
        if met_another_run.is_set():
            met_another_run.clear()
            random.SystemRandom().shuffle(left)
        yield left.pop()
