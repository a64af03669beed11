"""All rows of a source in order: duplicates marked across shards, unreadable shards noted and passed over."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from common.errors import DataError
from precompute.sources.pair import InputShard, Pair, PairSource, Skipped, mark_duplicates


@dataclass(kw_only=True)
class Walk:
    """One pass over a source. Iterating yields (input shard name, Pair or Skipped), one for each row."""

    source: PairSource
    on_unreadable: Callable[[str, DataError], None] = lambda name, error: None
    """Called once for each shard that cannot be read, when that is found."""
    unreadable: dict[str, DataError] = field(default_factory=dict)
    """The shards that could not be read to their end, by name."""

    def readable_shards(self) -> list[tuple[InputShard, int]]:
        """(shard, rows) of every shard whose rows can be counted; the others go to `unreadable`."""
        counted = []
        for shard in self.source.input_shards():
            try:
                counted.append((shard, shard.num_rows))
            except DataError as error:
                self._note(shard.name, error)
        return counted

    def __iter__(self) -> Iterator[tuple[str, Pair | Skipped]]:
        yield from self.rows(self.readable_shards())

    def rows(self, shards: list[tuple[InputShard, int]]) -> Iterator[tuple[str, Pair | Skipped]]:
        """The rows of these shards; a shard that fails on the way keeps the rows read before."""
        seen: set[str] = set()
        for shard, num_rows in shards:
            try:
                for item in mark_duplicates(shard.rows(0, num_rows), seen):
                    yield shard.name, item
            except DataError as error:
                self._note(shard.name, error)

    def _note(self, name: str, error: DataError) -> None:
        self.unreadable[name] = error
        self.on_unreadable(name, error)
