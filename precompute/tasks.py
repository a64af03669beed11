"""The units of work: cache shards of at most 256 consecutive rows of one input shard, and who does which."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from inpo.common.cache.document import MAX_PAIRS_PER_SHARD
from inpo.common.errors import DataError
from inpo.common.pairs import InputShard, PairSource
from inpo.common.pairs.names import renamed


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One cache shard to be made: rows [start, stop) of an input shard. Picklable; sent to workers as it is."""

    name: str
    location: str
    """The pair source, for messages and commits."""
    input_shard: InputShard
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    def renamed(self, name: str) -> "ShardTask":
        """The same task where the input shard has another name."""
        return replace(self, name=_shard_name(name, self.start), input_shard=renamed(self.input_shard, name))

    def of(self, input_shard: InputShard | None) -> "ShardTask":
        """The same task with this input shard, or without one: it may be large, and many tasks share it."""
        return replace(self, input_shard=input_shard)  # type: ignore[arg-type]


def list_tasks(source: PairSource, *, limit: int | None = None) -> tuple[list[ShardTask], list[DataError]]:
    """Every shard of a source in order, and one error per input shard that cannot be read.

    `limit` counts rows and is rounded up to whole shards, so that a limited cache is later completed, never remade.
    The name hangs on the input shard's name and the first row alone.
    """
    tasks: list[ShardTask] = []
    unreadable: list[DataError] = []
    rows = 0
    for input_shard in source.shards:
        if limit is not None and rows >= limit:
            break
        try:
            num_rows = input_shard.num_rows
        except DataError as error:
            unreadable.append(error)
            continue
        for start in range(0, num_rows, MAX_PAIRS_PER_SHARD):
            if limit is not None and rows >= limit:
                break
            stop = min(start + MAX_PAIRS_PER_SHARD, num_rows)
            rows += stop - start
            tasks.append(
                ShardTask(
                    name=_shard_name(input_shard.name, start),
                    location=source.place,
                    input_shard=input_shard,
                    start=start,
                    stop=stop,
                )
            )
    return tasks, unreadable


def _shard_name(input_shard: str, start: int) -> str:
    return f"{input_shard}-{start:08d}"


def input_of(shard_name: str) -> str:
    """The name of the input shard that a shard is named after."""
    return shard_name.rpartition("-")[0]


def split(num_tasks: int, rank: int, world_size: int) -> Sequence[int]:
    """The tasks of one process: rank, rank + world_size, ...: disjoint and complete, whoever runs it."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in 0..{world_size - 1}")
    return range(rank, num_tasks, world_size)
