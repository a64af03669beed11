"""The local engine: one process, or as many as `accelerate launch` starts, with a static split of the shards."""

from collections.abc import Callable, Sequence

from accelerate import PartialState

from common.cache import CacheWriter
from common.models import Model
from precompute.pipeline import Outcome, Timing, run_tasks
from precompute.settings import PrecomputeSettings
from precompute.tasks import ShardTask, split
from precompute.worker import ShardWorker, load_components


def run_local(
    tasks: Sequence[ShardTask],
    *,
    model: Model,
    writer: CacheWriter,
    settings: PrecomputeSettings,
    on_outcome: Callable[[Outcome], None],
) -> Timing:
    """Make this process's share of `tasks` on its own device, then wait for the other processes.

    The split covers all tasks of the source, done or not, so it does not depend on when a process looked.
    """
    state = PartialState()
    mine = [tasks[index] for index in split(len(tasks), state.process_index, state.num_processes)]
    timing = Timing()
    committed = writer.committed()
    mine = [task for task in mine if task.name not in committed]
    if mine:
        worker = ShardWorker(
            components=load_components(model, writer.manifest, state.device),
            writer=writer,
            pairs_per_batch=settings.batch_size,
            decode_threads=settings.decode_threads,
        )
        try:
            for outcome in run_tasks(worker, mine, timing):
                on_outcome(outcome)
        finally:
            worker.close()
    state.wait_for_everyone()
    return timing
