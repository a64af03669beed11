"""All rows of a source in order: duplicates marked across shards, unreadable shards noted and passed over."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from inpo.common.errors import DataError
from inpo.common.pairs.pair import InputShard, Pair, PairSource, Skipped, mark_duplicates


@dataclass(kw_only=True)
class Walk:
    """One pass over a source: first count the rows of its shards, then read them."""

    source: PairSource
    on_unreadable: Callable[[str, DataError], None] = lambda name, error: None
    """Called once for each shard that cannot be read, when that is found."""
    unreadable: dict[str, DataError] = field(default_factory=dict)
    """The shards that could not be read to their end, by name."""

    def readable_shards(self, shards: Iterable[InputShard]) -> list[tuple[InputShard, int]]:
        """(shard, rows) of every shard whose rows can be counted; the others go to `unreadable`."""
        counted = []
        for shard in shards:
            try:
                counted.append((shard, shard.num_rows))
            except DataError as error:
                self._note(shard.name, error)
        return counted

    def rows(self, shards: list[tuple[InputShard, int]]) -> Iterator[tuple[str, Pair | Skipped]]:
        """(input shard name, Pair or Skipped) for every row; a shard that fails on the way keeps its earlier rows."""
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


def count_not_read(source: PairSource, shards: Iterable[InputShard]) -> dict[str, int]:
    """What lies in a source and its readable shards and has no part in any pair: what it is, and how often."""
    total = Counter(source.not_read)
    for shard in shards:
        total.update(shard.not_read)
    return dict(sorted(total.items()))


def not_read_words(not_read: dict[str, int], *, most: int = 12) -> str:
    """The counts in one line: the most frequent ones, and how many kinds there are besides."""
    kinds = sorted(not_read, key=lambda kind: (-not_read[kind], kind))
    words = ", ".join(f"{kind} ({not_read[kind]:,})" for kind in kinds[:most])
    return words + (f" and {len(kinds) - most} kinds more" if len(kinds) > most else "")
