"""The Ray engine: a worker per GPU of a cluster, shards handed out as workers ask, nodes may die or join.

The driver holds names and commits, no tensors. What a dead worker had in flight is handed out again; what is committed
is never made twice.
"""

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from inpo.common.cache import CacheWriter
from inpo.common.errors import InpoError, UsageError
from inpo.common.log import say
from inpo.common.recipe import ModelSection
from inpo.precompute.engines.assignment import Assignment
from inpo.precompute.engines.ray_cluster import connect, deferred_stop, disconnect, has_gpus, places
from inpo.precompute.engines.ray_worker import RayWorker, Reply
from inpo.precompute.phases import Phase
from inpo.precompute.pipeline import Outcome, Task, Timing
from inpo.precompute.settings import PrecomputeSettings, RayOptions
from inpo.precompute.tasks import ShardTask

_POLL_SECONDS = 2.0
"""How often the cluster is asked for nodes that joined or left."""
_MAX_NODE_DEATHS = 8
_CALLS_AT_ONCE = 4


@dataclass(kw_only=True, eq=False)
class _Worker:
    """One actor. `calls` are its open calls; the one that loads the models has no task."""

    name: str
    node: str
    actor: Any
    calls: dict[Any, Task | None] = field(default_factory=dict)
    ready: bool = False


@contextlib.contextmanager
def ray_cluster(options: RayOptions) -> Iterator[None]:
    """Join or start the cluster for some phases of work; leaves or stops it in any case.

    Raises UsageError for a cluster that cannot do it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "The ray engine starts its own workers.",
            where="--engine",
            expected="one process",
            got=f"{os.environ['WORLD_SIZE']} by accelerate launch",
            fix="run `inpo precompute --engine ray` by itself",
        )
    connect(options)
    try:
        yield
    finally:
        disconnect()


def run_ray(
    phase: Phase,
    tasks: Mapping[int, Task],
    *,
    model: ModelSection,
    writer: CacheWriter,
    settings: PrecomputeSettings,
    options: RayOptions,
    committed: set[str],
    on_outcome: Callable[[Outcome], None],
    is_wanted: Callable[[Task], bool],
) -> str:
    """Make those of `tasks` that are not committed on the connected cluster; returns the time report. What is not
    wanted any more is not handed out.

    Raises UsageError for a cluster that cannot do it, the first StorageError (and the like) of any worker, and
    InpoError, after everything else is done, if shards killed every worker that had them.
    """
    left = [task for task in tasks.values() if task.name not in committed]
    with deferred_stop() as stop:
        run = _Run(
            left,
            phase=phase,
            model=model,
            writer=writer,
            settings=settings,
            options=options,
            on_outcome=on_outcome,
            is_wanted=is_wanted,
        )
        try:
            while run.assignment.num_unfinished and stop.signal is None:
                run.turn()
            return run.report()
        finally:
            run.close()


class _Run:
    """The state of one run on a connected cluster."""

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        phase: Phase,
        model: ModelSection,
        writer: CacheWriter,
        settings: PrecomputeSettings,
        options: RayOptions,
        on_outcome: Callable[[Outcome], None],
        is_wanted: Callable[[Task], bool],
    ) -> None:
        import ray

        self._tasks = {task.name: task for task in tasks}
        self._writer = writer
        self._kind = phase.kind
        self._options = options
        self._on_outcome, self._is_wanted = on_outcome, is_wanted
        self._arguments = {
            "phase": phase,
            "folder": os.getcwd(),
            "model": model,
            "location": writer.store.address,
            "manifest": writer.manifest,
            "manifest_digest": writer.manifest_digest,
            "settings": settings,
        }
        self._use_gpus = has_gpus()
        if options.gpus_per_worker is not None and not self._use_gpus:
            raise UsageError("No GPU in the cluster.", where="--gpus-per-worker", fix="leave the option out for CPUs")
        needs = {"num_gpus": options.gpus_per_worker or 1.0, "num_cpus": 0} if self._use_gpus else {"num_cpus": 1}
        limits: dict[str, Any] = {"max_concurrency": _CALLS_AT_ONCE, "max_restarts": 0}
        self._remote = ray.remote(**limits, **needs)(RayWorker)
        self.assignment = Assignment(self._tasks)
        self._workers: dict[str, _Worker] = {}
        self._inputs: dict[str, Any] = {}
        """Input shards in Ray's object store, while any of their shards is to be made."""
        self._open_shards = Counter(task.input_shard.name for task in tasks if isinstance(task, ShardTask))
        self._timings: dict[str, Timing] = {}
        self._node_deaths: dict[str, int] = {}
        self._next_poll = 0.0
        self._num_started = self._num_died = self._num_retried = 0
        self._lost_seconds = 0.0
        self._given_up: dict[str, str] = {}
        self._last_trouble = "none"

    def turn(self) -> None:
        """Look for nodes now and then, hand out shards, and wait up to a second for answers."""
        import ray

        if time.monotonic() >= self._next_poll:
            self._match_cluster()
            self._next_poll = time.monotonic() + _POLL_SECONDS
        for worker in self._workers.values():
            while worker.ready and (name := self.assignment.take(worker.name, time.monotonic())) is not None:
                if self._is_wanted(self._tasks[name]):
                    self._hand_out(self._tasks[name], worker)
                else:
                    self._finished(worker, Outcome(task=self._tasks[name]), time.monotonic())
        owners = {call: worker for worker in self._workers.values() for call in worker.calls}
        if not owners:
            time.sleep(min(1.0, _POLL_SECONDS))
            return
        done, _ = ray.wait(list(owners), num_returns=1, timeout=1.0)
        for call in done:
            if owners[call].name in self._workers:  # not lost by another answer of this turn
                self._answer(owners[call], call)

    def _hand_out(self, task: Task, worker: _Worker) -> None:
        import ray

        sent, shared = task, None
        if isinstance(task, ShardTask):
            name = task.input_shard.name
            if name not in self._inputs:
                self._inputs[name] = ray.put(task.input_shard)
            sent, shared = task.of(None), self._inputs[name]
        worker.calls[worker.actor.make.remote(sent, shared)] = task

    def _match_cluster(self) -> None:
        """Start workers where there is room, forget those whose node has gone."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        room = places(self._options, use_gpus=self._use_gpus)
        for worker in list(self._workers.values()):
            if worker.node not in room:
                self._lose(worker, f"node {worker.node[:8]} has gone")
        usable = {node: number for node, number in room.items() if not self._is_bad(node)}
        if room and not usable:
            raise InpoError(
                "No node of the cluster can do the work.",
                got=self._last_trouble,
                fix="see the workers' messages above, then run the same command again: what is committed stays",
            )
        most = min(self._options.workers or sys.maxsize, self.assignment.num_unfinished)
        for node, number in usable.items():
            have = sum(worker.node == node for worker in self._workers.values())
            while have < number and len(self._workers) < most:
                actor: Any = self._remote.options(
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False)
                ).remote(**self._arguments)
                worker = _Worker(name=f"worker-{self._num_started}", node=node, actor=actor)
                worker.calls[actor.load.remote()] = None
                self._workers[worker.name] = worker
                self._num_started += 1
                have += 1

    def _is_bad(self, node: str) -> bool:
        return self._node_deaths.get(node, 0) >= _MAX_NODE_DEATHS

    def _answer(self, worker: _Worker, call: Any) -> None:
        """One call has come back, or its worker will not."""
        import ray

        task = worker.calls.pop(call)
        now = time.monotonic()
        try:
            answer = ray.get(call)
        except ray.exceptions.RayError as error:  # it died, its node died, or it failed in a way of its own
            self._lose(worker, str(error).strip().splitlines()[-1][:300])
            return
        if task is None:
            if answer is None:
                worker.ready = True
                self.assignment.join(worker.name, now)
                _say(f"{worker.name} is ready on node {worker.node[:8]}")
            elif any(each.ready for each in self._workers.values()):
                self._node_deaths[worker.node] = _MAX_NODE_DEATHS
                self._lose(worker, str(answer))
            else:
                raise answer
            return
        reply: Reply = answer
        self._timings[worker.name] = reply.timing
        if reply.error is not None:
            raise reply.error
        self._node_deaths.pop(worker.node, None)
        if reply.outcome is not None:
            if reply.outcome.lost_race:
                self.assignment.shuffle()
            self._finished(worker, reply.outcome, now)

    def _finished(self, worker: _Worker, outcome: Outcome, now: float) -> None:
        if not self.assignment.finished(worker.name, outcome.task.name, now):
            return
        self._on_outcome(outcome)
        task = self._tasks[outcome.task.name]
        if not isinstance(task, ShardTask):
            return
        shard = task.input_shard.name
        self._open_shards[shard] -= 1
        if not self._open_shards[shard]:
            self._inputs.pop(shard, None)

    def _lose(self, worker: _Worker, trouble: str) -> None:
        """Hand out again what a worker had; `_match_cluster` starts another in its place."""
        import ray

        del self._workers[worker.name]
        ray.kill(worker.actor)
        self._num_died += 1
        self._last_trouble = trouble
        self._node_deaths[worker.node] = self._node_deaths.get(worker.node, 0) + 1
        _say(f"{worker.name} on node {worker.node[:8]} is lost: {trouble}")
        if self._is_bad(worker.node):
            _say(f"node {worker.node[:8]} is not used any more")
        if not worker.ready:
            return
        now = time.monotonic()
        for name in self.assignment.line(worker.name):
            if self._writer.is_committed(name, self._kind):  # before it could tell
                self._finished(worker, Outcome(task=self._tasks[name]), now)
        loss = self.assignment.lost(worker.name, now)
        self._num_retried += len(loss.retried)
        self._lost_seconds += loss.seconds
        self._given_up |= {name: trouble for name in loss.given_up}
        if loss.retried:
            _say(f"handed out again: {', '.join(loss.retried)}; {loss.seconds:.1f} s of work lost")

    def report(self) -> str:
        """Where the time went, over all workers. Raises InpoError if shards were given up."""
        if self._given_up:
            raise InpoError(
                f"{len(self._given_up)} shards could not be made: each was in the hands of four workers that died. "
                "All others are committed.",
                where=", ".join(sorted(self._given_up)[:8]),
                got=next(iter(self._given_up.values())),
                fix="look for what these shards have in common (memory, an image), then run the same command again",
            )
        whole = Timing()
        for timing in self._timings.values():
            whole.merge(timing)
        line = f"{whole.report()}, over {self._num_started} workers"
        if self._num_died:
            line += (
                f"; {self._num_died} of them died: {self._num_retried} shards handed out again, "
                f"{self._lost_seconds:.1f} s of work lost"
            )
        return line

    def close(self) -> None:
        """End the workers: all at once, so that shards in flight are dropped and nothing outlives the run."""
        import ray

        for worker in self._workers.values():
            ray.kill(worker.actor)


def _say(line: str) -> None:
    say(f"ray: {line}")
