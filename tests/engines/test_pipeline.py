"""Overlap, bounded memory, and a clean end from every state of the three threads."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState

from inpo.common.cache import CacheWriter, Commit, ShardData
from inpo.common.errors import DataError, StorageError
from inpo.common.models import open_model
from inpo.common.pairs import InputShard, Pair, Skipped, open_source
from inpo.common.pairs.columns import Reading
from inpo.common.pairs.decode import DecodePool
from inpo.precompute.components import Components, load_components
from inpo.precompute.configuration import build_manifest
from inpo.precompute.engines.local import in_order
from inpo.precompute.engines.watchdog import Watchdog
from inpo.precompute.phases import TEXTS
from inpo.precompute.pipeline import Timing, run_tasks
from inpo.precompute.settings import PrecomputeSettings
from inpo.precompute.tasks import ShardTask, list_tasks
from inpo.precompute.texts import TextTable, list_texts
from inpo.precompute.worker import PreparedShard, ShardWorker
from tests.engines.runs import World, until


class WatchedWorker(ShardWorker):
    """The real worker, with a hook called as `hook(stage, shard number)` before each stage."""

    hook: Callable[[str, int], None] = staticmethod(lambda stage, number: None)

    def read(self, task: ShardTask) -> PreparedShard:
        self.hook("read", _number(task.name))
        return super().read(task)

    def compute(self, prepared: PreparedShard) -> ShardData:
        self.hook("compute", _number(prepared.task.name))
        return super().compute(prepared)

    def write(self, task: ShardTask, data: ShardData) -> Commit | None:
        self.hook("write", _number(task.name))
        return super().write(task, data)


def _number(name: str) -> int:
    return int(name.split("-")[0])


@pytest.fixture(scope="module")
def components(world: World, tmp_path_factory: pytest.TempPathFactory) -> Components:
    model = open_model(str(world.model))
    return load_components(model, build_manifest(_SETTINGS, model, device_type="cpu"), PartialState(cpu=True).device)


_SETTINGS = PrecomputeSettings(
    resolution=32, grid_points=2, timesteps_per_pair=1, measure_inversion=0.0, dtype="float32"
)


@pytest.fixture
def worker(world: World, components: Components, tmp_path: Path) -> Iterator[WatchedWorker]:
    model = open_model(str(world.model))
    writer = CacheWriter.open(str(tmp_path / "cache"), build_manifest(_SETTINGS, model, device_type="cpu"))
    texts = list_texts(list_tasks(open_source(str(world.pairs)))[0], {}, TextTable(writer), by_length=False)
    text_worker = TEXTS.worker(model, writer, _SETTINGS, PartialState(cpu=True).device)
    for task in texts.values():
        text_worker.write(task, text_worker.compute(task))
    made = WatchedWorker(
        components=components, writer=writer, table=TextTable(writer), pairs_per_batch=4, decode=DecodePool(0)
    )
    yield made
    made.close()
    until(lambda: not _threads())


def _threads() -> list[str]:
    """Threads of the pipeline that are still alive."""
    return [each.name for each in threading.enumerate() if each.name.startswith(("read-ahead", "write-behind"))]


@pytest.fixture
def tasks(world: World) -> list[ShardTask]:
    return list_tasks(open_source(str(world.pairs)))[0][:5]


class Deadly(bytes):
    """Ends the process that takes it out of a pickle, as a crashing decoder would."""

    def __reduce__(self) -> tuple[object, ...]:
        return (os._exit, (139,))


@dataclass(frozen=True, kw_only=True)
class DeadlyShard:
    """An input shard whose third row ends decoding processes."""

    shard: InputShard

    @property
    def name(self) -> str:
        return self.shard.name

    @property
    def num_rows(self) -> int:
        return self.shard.num_rows

    @property
    def reading(self) -> Reading:
        return self.shard.reading

    @property
    def not_read(self) -> Mapping[str, int]:
        return self.shard.not_read

    @property
    def has_lists(self) -> bool:
        return self.shard.has_lists

    def fingerprint(self) -> str:
        return self.shard.fingerprint()

    def prompts(self, start: int, stop: int) -> Iterator[str]:
        return self.shard.prompts(start, stop)

    def head(self, count: int) -> list[dict[str, Any]]:
        return self.shard.head(count)

    def rows(self, start: int, stop: int) -> Iterator[Pair | Skipped]:
        for item in self.shard.rows(start, stop):
            yield replace(item, win=Deadly(b"x")) if isinstance(item, Pair) and item.row == start + 2 else item


def test_a_shard_whose_images_end_two_processes_is_an_error_that_names_the_pair(
    worker: WatchedWorker, tasks: list[ShardTask]
) -> None:
    """No quarantine: memory that ran out would leave pairs out by chance. The other shards are made."""
    worker.decode = DecodePool(1)
    tasks[1] = replace(tasks[1], input_shard=DeadlyShard(shard=tasks[1].input_shard))
    pair = list(tasks[1].input_shard.rows(tasks[1].start, tasks[1].stop))[2].pair_id
    outcomes = {outcome.task.name: outcome for outcome in run_tasks(worker, tasks[:3], Timing())}
    error = outcomes.pop(tasks[1].name).error
    assert error is not None
    assert f"{tasks[1].input_shard.name}, pair {pair}" in str(error)
    assert "--decode-workers" in str(error)
    assert all(outcome.commit is not None for outcome in outcomes.values())
    assert len(outcomes) == 2


def test_reading_computing_and_writing_overlap(worker: WatchedWorker, tasks: list[ShardTask]) -> None:
    """Each stage waits until another has begun: without overlap this would never end."""
    begun = {(stage, number): threading.Event() for stage in ("read", "compute", "write") for number in range(5)}

    def hook(stage: str, number: int) -> None:
        begun[stage, number].set()
        if stage == "compute" and number == 0:
            assert begun["read", 2].wait(60), "nothing is read ahead while the device computes"
        if stage == "write" and number == 1:
            assert begun["compute", 2].wait(60), "nothing is computed while a shard is written"

    worker.hook = hook
    outcomes = list(run_tasks(worker, tasks, Timing()))
    assert sorted(outcome.task.name for outcome in outcomes) == [task.name for task in tasks]
    assert all(outcome.commit is not None for outcome in outcomes)


def test_at_most_four_shards_are_in_memory(worker: WatchedWorker, tasks: list[ShardTask]) -> None:
    most = 0

    def hook(stage: str, number: int) -> None:
        nonlocal most
        if stage == "read":
            most = max(most, number + 1 - len(worker.writer.committed()))
        if (stage, number) == ("write", 0):
            threading.Event().wait(0.5)  # gives the reader every chance to run ahead

    worker.hook = hook
    assert len(list(run_tasks(worker, tasks, Timing()))) == 5
    assert 2 <= most <= 4


# The signal may fall between a file's opening and its with statement, as it may for any user: Python closes the file.
@pytest.mark.filterwarnings(
    r"ignore:Exception ignored in. <_io\.FileIO name=.* mode='rb':pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("stage", ["read", "compute", "write"])
def test_an_interrupt_in_any_state_ends_without_hanging_and_loses_no_committed_shard(
    worker: WatchedWorker, tasks: list[ShardTask], stage: str, request: pytest.FixtureRequest
) -> None:
    """The signal arrives while another thread is at work on shard 2: reading (this thread waits for input), computing
    (this thread), writing (this thread waits for the disk or computes)."""
    main = threading.main_thread().ident
    assert main is not None
    # A shell starts what it puts into the background without SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def hook(now: str, number: int) -> None:
        if (now, number) == (stage, 2):
            signal.pthread_kill(main, signal.SIGINT)

    worker.hook = hook
    seen: set[str] = set()

    def run() -> None:
        for outcome in run_tasks(worker, tasks, Timing()):
            seen.add(outcome.task.name)

    with pytest.raises(KeyboardInterrupt):
        run()
    worker.close()
    until(lambda: not _threads())
    committed = worker.writer.committed()
    assert seen <= committed
    assert len(committed) < len(tasks)
    if stage == "write":
        assert tasks[2].name in committed, "the shard that was being written is finished"
    folders = {path.parent.name for path in Path(worker.writer.store.location).glob("shards/*/*")}
    assert folders == committed, "no torn attempt is left"


def test_a_caller_that_stops_leaves_no_thread(worker: WatchedWorker, tasks: list[ShardTask]) -> None:
    outcomes = run_tasks(worker, tasks, Timing())
    first = next(outcomes)
    outcomes.close()
    until(lambda: not _threads())
    assert first.task.name in worker.writer.committed()


def test_a_refusing_disk_is_one_clear_error_and_what_is_committed_stays(
    worker: WatchedWorker, tasks: list[ShardTask]
) -> None:
    root = Path(worker.writer.store.location)

    def hook(stage: str, number: int) -> None:
        if (stage, number) == ("write", 2):
            os.rename(root / "shards", root / "moved")
            (root / "shards").write_text("a file in the way")

    worker.hook = hook
    with pytest.raises(StorageError, match="Could not write a shard"):
        list(run_tasks(worker, tasks, Timing()))
    assert worker.writer.committed() == {task.name for task in tasks[:2]}


def test_an_unreadable_input_is_an_outcome_and_the_others_go_on(worker: WatchedWorker, tasks: list[ShardTask]) -> None:
    def hook(stage: str, number: int) -> None:
        if (stage, number) == ("read", 1):
            raise DataError("The input shard cannot be read.", fix="mend it")

    worker.hook = hook
    outcomes = {_number(outcome.task.name): outcome for outcome in run_tasks(worker, tasks, Timing())}
    assert isinstance(outcomes[1].error, DataError)
    assert [number for number, outcome in outcomes.items() if outcome.commit is None] == [1]


def test_a_shard_committed_by_somebody_else_is_neither_read_nor_computed(
    worker: WatchedWorker, tasks: list[ShardTask]
) -> None:
    """Shard 0 before it is read, shard 1 between reading and computing."""
    list(run_tasks(worker, tasks[:1], Timing()))
    work: list[tuple[str, int]] = []

    def hook(stage: str, number: int) -> None:
        work.append((stage, number))
        if (stage, number) == ("compute", 2):
            until(lambda: ("read", 3) in work)  # so shard 1 has been read and waits
            Path(worker.writer.store.location, "commits", f"{tasks[1].name}.json").write_text("{}")

    worker.hook = hook
    order = [tasks[0], tasks[2], tasks[1], tasks[3]]
    outcomes = {_number(outcome.task.name): outcome for outcome in run_tasks(worker, order, Timing())}
    assert {number: outcome.lost_race for number, outcome in outcomes.items()} == {0: True, 1: True, 2: False, 3: False}
    assert ("read", 0) not in work
    assert ("read", 1) in work
    assert ("compute", 1) not in work


def test_tasks_keep_their_order_until_another_run_is_met(tasks: list[ShardTask]) -> None:
    many, met = [replace(tasks[0], name=f"{number:03d}") for number in range(200)], threading.Event()
    order = in_order(many, met)
    assert [next(order) for _ in range(100)] == many[:100]
    met.set()
    left = list(order)
    assert left != many[100:]
    assert sorted(left, key=lambda task: task.name) == many[100:]
    assert not met.is_set()


def test_the_report_says_where_the_time_went() -> None:
    timing = Timing(waiting_for_input=1.0, computing=2.0, waiting_for_writing=1.0, stages={"read": 0.5})
    other = Timing(computing=6.0, stages={"read": 0.25, "invert": 5.0})
    timing.merge(other)
    assert timing.report() == (
        "network and VAE 80%, waiting for images 10%, waiting for the disk 10% of 10.0 s "
        "(by stage, overlapped: read 0.8 s, invert 5.0 s)"
    )


def test_the_watchdog_names_what_hangs_and_does_not_interrupt_it(capsys: pytest.CaptureFixture[str]) -> None:
    timing = Timing()
    timing.begin("computing shard 0007")
    said: list[str] = []

    def has_spoken() -> bool:
        said.append(capsys.readouterr().err)
        return "has been computing shard 0007 for" in "".join(said)

    with Watchdog(timing, patience_seconds=0.05):
        until(has_spoken)
