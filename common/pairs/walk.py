"""All rows of a source in order: duplicates marked across shards, unreadable shards noted and passed over; and why a
source gave no pair.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from inpo.common.errors import DataError
from inpo.common.pairs.columns import brief
from inpo.common.pairs.pair import SKIP_REASONS, InputShard, Pair, PairSource, Skipped, mark_duplicates


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


_MOST_REASONS = 3
_RECORDS_LOOKED_AT = 20


@dataclass(kw_only=True)
class Reasons:
    """Why rows gave no pair: how often, and the first row of each reason."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, tuple[str, str]] = field(default_factory=dict)
    """{reason: (pair id, detail)}."""

    def add(self, reason: str, pair_id: str, detail: str) -> None:
        self.counts[reason] += 1
        self.examples.setdefault(reason, (pair_id, detail))

    def lines(self, shards: Iterable[InputShard]) -> list[str]:
        """The most frequent reasons, each with an example, and the fields that these shards have."""
        lines = []
        for reason, count in self.counts.most_common(_MOST_REASONS):
            pair_id, detail = self.examples[reason]
            meaning = SKIP_REASONS.get(reason, reason)  # type: ignore[call-overload]  # a cache has reasons of its own
            lines.append(f"{count:,} x {reason}: {meaning}; for instance {brief(pair_id)}: {detail}")
        names = found_fields(shards)
        if names:
            lines.append(f"fields found: {', '.join(map(brief, names[:24]))}{', ...' if len(names) > 24 else ''}")
            if self.counts["bad_metadata"]:
                lines.append("--columns win=NAME,lose=NAME,... says what they are; see `inpo data columns`")
        return lines


def found_fields(shards: Iterable[InputShard]) -> list[str]:
    """The names of the fields in the first records of the first shard that can be read."""
    for shard in shards:
        try:
            records = shard.head(_RECORDS_LOOKED_AT)
        except DataError:
            continue
        if records:
            return list(dict.fromkeys(name for record in records for name in record))
    return []
