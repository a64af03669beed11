"""Pairs sorted by the shape of their images: the rows of a source that belong to each bucket.

    input shards --sort_pairs--> {(height, width): PairSource}

Only the images' headers are read. A pair goes to the bucket that both its images fit best; a pair whose images fit two
of them is a row without a pair, `mixed_sizes`, and so it is counted.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from inpo.common.errors import DataError
from inpo.common.pairs.columns import Reading
from inpo.common.pairs.images import shown_size
from inpo.common.pairs.pair import InputShard, Pair, PairSource, Skipped
from inpo.common.seeding import stable_hash

Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True, kw_only=True)
class BucketShard:
    """Those rows of an input shard that belong to one bucket."""

    base: InputShard
    picked: np.ndarray
    """int64: the rows of `base`, ascending."""
    mixed: frozenset[int] = frozenset()
    """Rows whose images belong to two buckets."""
    prompts_of: frozenset[int] = frozenset()
    """Hashes of the prompts of these rows."""

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def reading(self) -> Reading:
        return self.base.reading

    @property
    def num_rows(self) -> int:
        return len(self.picked)

    @property
    def not_read(self) -> Mapping[str, int]:
        return self.base.not_read

    @property
    def has_lists(self) -> bool:
        return self.base.has_lists

    def group_sizes(self, start: int, stop: int) -> np.ndarray:
        """Of the file's rows among which these are, or as if each were a pair of its own: what is less."""
        wanted = self.picked[start:stop]
        pairs = np.full(len(wanted), 2)
        sizes = self.base.group_sizes(int(wanted[0]), int(wanted[-1]) + 1) if len(wanted) else pairs
        return min(pairs, sizes, key=np.sum)

    def head(self, count: int) -> list[dict[str, Any]]:
        return self.base.head(count)

    def fingerprint(self) -> str:
        """Of the file, and of which of its rows are here."""
        told = self.base.fingerprint().encode() + self.picked.astype("<i8").tobytes()
        return hashlib.blake2b(told, digest_size=16).hexdigest()

    def rows(self, start: int, stop: int) -> Iterator[Pair | Skipped]:
        """The picked rows start..stop-1, numbered among the picked ones, as they are asked for."""
        wanted = self.picked[start:stop]
        if not len(wanted):
            return
        places = {row: start + place for place, row in enumerate(wanted.tolist())}
        for item in self.base.rows(int(wanted[0]), int(wanted[-1]) + 1):
            if item.row not in places:
                continue
            if item.row in self.mixed and isinstance(item, Pair):
                detail = "its images have the shapes of two buckets"
                item = Skipped(pair_id=item.pair_id, reason="mixed_sizes", detail=detail, row=item.row)
            yield replace(item, row=places[item.row])

    def prompts(self, start: int, stop: int) -> Iterator[str]:
        """The prompts among the file's rows that are here."""
        wanted = self.picked[start:stop]
        if len(wanted):
            for prompt in self.base.prompts(int(wanted[0]), int(wanted[-1]) + 1):
                if stable_hash(prompt) in self.prompts_of:
                    yield prompt


@dataclass(kw_only=True)
class _Picked:
    """Rows of an input shard, by bucket; those of no bucket under None."""

    rows: dict[Size | None, list[int]] = field(default_factory=dict)
    mixed: set[int] = field(default_factory=set)
    prompts: dict[Size | None, set[int]] = field(default_factory=dict)

    def add(self, size: Size | None, item: Pair | Skipped) -> None:
        self.rows.setdefault(size, []).append(item.row)
        if isinstance(item, Pair):
            self.prompts.setdefault(size, set()).add(stable_hash(item.prompt))


def sort_pairs(
    source: PairSource, shards: Iterable[InputShard], sizes: Sequence[Size]
) -> tuple[dict[Size, PairSource], list[DataError]]:
    """Every bucket that has rows of these shards, and an error for each shard that cannot be read to its end, which is
    left out whole. Rows without a pair, and mixed ones, are in the bucket with the most pairs of their shard, so that
    each is counted once.

    Where a row goes hangs on its own input shard alone: whatever else is read now or later, a committed shard's rows
    stay what they were. (A shard without any pair goes where most of the others are.)
    """
    found: list[tuple[InputShard, _Picked]] = []
    failures: list[DataError] = []
    for shard in shards:
        picked = _Picked()
        try:
            for item in shard.rows(0, shard.num_rows):
                picked.add(_place(item, sizes, picked), item)
        except DataError as error:
            failures.append(error)
        else:
            found.append((shard, picked))
    counts = {size: sum(len(picked.rows.get(size, ())) for _, picked in found) for size in sizes}
    sorted_shards: dict[Size, list[BucketShard]] = {size: [] for size in sizes}
    for shard, picked in found:
        largest = max(sizes, key=lambda size: (len(picked.rows.get(size, ())), counts[size]))
        for size in sizes:
            keys = (size, None) if size == largest else (size,)
            rows = sorted(row for key in keys for row in picked.rows.get(key, ()))
            prompts = frozenset[int]().union(*(picked.prompts.get(key, ()) for key in keys))
            if rows:
                sorted_shards[size].append(
                    BucketShard(
                        base=shard,
                        picked=np.array(rows, dtype=np.int64),
                        mixed=frozenset(picked.mixed) if size == largest else frozenset(),
                        prompts_of=prompts,
                    )
                )
    return {size: replace(source, shards=tuple(each)) for size, each in sorted_shards.items() if each}, failures


def _place(item: Pair | Skipped, sizes: Sequence[Size], picked: _Picked) -> Size | None:
    if isinstance(item, Skipped):
        return None
    shown = [shown_size(data) for data in (item.win, item.lose)]
    fits = {_nearest(each, sizes) for each in shown if each is not None}
    if None in shown or not fits:  # no image: whoever decodes it says why
        return None
    if len(fits) > 1:
        picked.mixed.add(item.row)
        return None
    return fits.pop()


def _nearest(shown: Size, sizes: Sequence[Size]) -> Size:
    """The size of the nearest shape."""
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - math.log(shown[0] / shown[1])))
