"""Pairs sorted by the shape of their images: the rows of a source that belong to each bucket.

    input shards --sort_pairs--> {(height, width): PairSource}

Only the images' headers are read. A pair goes to the bucket that both its images fit best; a pair whose images fit two
of them is a row without a pair, `mixed_sizes`, and so it is counted. Where the rows of a file go is decided once and
kept: what can be reached differs from one moment to the next, and a shard's rows must not.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from inpo.common.errors import DataError
from inpo.common.pairs.columns import Reading
from inpo.common.pairs.images import shown_size
from inpo.common.pairs.pair import InputShard, Pair, PairSource, Skipped, SkipReason
from inpo.common.seeding import stable_hash

Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True, kw_only=True)
class BucketShard:
    """Those rows of an input shard that belong to one bucket."""

    base: InputShard
    picked: np.ndarray
    """int64: the rows of `base`, ascending."""
    size: Size
    sizes: Sequence[Size]
    """Of all buckets."""
    prompts_of: frozenset[int] | None = None
    """Hashes of the prompts of these rows; None: any of the file's, since some rows could not be read."""

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
            if isinstance(item, Pair) and _fitting(item, self.sizes) not in (None, {self.size}):
                item = Skipped(pair_id=item.pair_id, reason="mixed_sizes", detail=self._why(item), row=item.row)
            yield replace(item, row=places[item.row])

    def _why(self, item: Pair) -> str:
        fits = _fitting(item, self.sizes) or set()
        if len(fits) > 1:
            return "its images have the shapes of two buckets"
        height, width = min(fits)
        return f"its images fit bucket {height}x{width}, and could not be read when the pairs were sorted"

    def prompts(self, start: int, stop: int) -> Iterator[str]:
        """The prompts among the file's rows that are here."""
        wanted = self.picked[start:stop]
        if len(wanted):
            for prompt in self.base.prompts(int(wanted[0]), int(wanted[-1]) + 1):
                if self.prompts_of is None or stable_hash(prompt) in self.prompts_of:
                    yield prompt


@dataclass(kw_only=True)
class _Picked:
    """Rows of an input shard, by bucket; those of no bucket under None."""

    rows: dict[Size | None, list[int]] = field(default_factory=dict)
    prompts: dict[Size | None, set[int]] = field(default_factory=dict)
    may_come: bool = False
    """Whether a row has no image now and may have one later."""

    def add(self, size: Size | None, item: Pair | Skipped) -> None:
        self.rows.setdefault(size, []).append(item.row)
        if isinstance(item, Pair):
            self.prompts.setdefault(size, set()).add(stable_hash(item.prompt))
        else:
            self.may_come |= item.reason in _FOR_NOW

    def document(self, sizes: Sequence[Size], counts: Mapping[Size, int]) -> bytes:
        """Of each row the number of its bucket among `sizes`, and the prompts of each bucket, null for any.

        Rows without a pair, and mixed ones, are in the bucket with the most pairs; of a shard without any, in that of
        `counts`.
        """
        most = {size: len(self.rows.get(size, ())) for size in sizes}
        largest = max(sizes, key=(most if any(most.values()) else counts).__getitem__)
        place = {row: sizes.index(size or largest) for size, rows in self.rows.items() for row in rows}
        prompts: dict[str, list[int] | None] = {}
        for number, size in enumerate(sizes):
            keys = (size, None) if size == largest else (size,)
            prompts[str(number)] = sorted(set[int]().union(*(self.prompts.get(key, ()) for key in keys)))
        if self.may_come:
            prompts[str(sizes.index(largest))] = None
        if sum(map(len, self.prompts.values())) > _MOST_PROMPTS:
            prompts = dict.fromkeys(prompts)
        return json.dumps({"rows": [place[row] for row in sorted(place)], "prompts": prompts}).encode()


_MOST_PROMPTS = 1 << 20
"""In one file: the document of more would be larger than a cache reads. Then each bucket has the texts of all."""
_FOR_NOW = frozenset[SkipReason](
    {"missing_image", "not_allowed", "unreachable", "empty_image", "unreadable", "truncated"}
)
"""Reasons that pass when an image comes, or its host."""


def sort_pairs(
    source: PairSource,
    shards: Iterable[InputShard],
    sizes: Sequence[Size],
    *,
    get: Callable[[str], bytes | None] = lambda name: None,
    put: Callable[[str, bytes], object] = lambda name, data: None,
) -> tuple[dict[Size, PairSource], list[DataError]]:
    """Every bucket that has rows of these shards, and an error for each shard that cannot be read to its end, which is
    left out whole. Rows without a pair, and mixed ones, are in the bucket with the most pairs of their shard, so that
    each is counted once; a shard without any pair goes where most of the others are.

    Args:
        get: what is kept under a name: of an input shard that was sorted before, no image is read.
        put: keeps it, if nothing is kept under that name yet.
    """
    documents: dict[str, bytes] = {}
    fresh: dict[str, _Picked] = {}
    found: list[tuple[InputShard, str]] = []
    failures: list[DataError] = []
    for shard in shards:
        try:
            name = f"buckets/{shard.name}.{shard.fingerprint()}.json"
            if (data := get(name)) is not None:
                documents[name] = data
            else:
                picked = _Picked()
                for item in shard.rows(0, shard.num_rows):
                    picked.add(_place(item, sizes), item)
                fresh[name] = picked
        except DataError as error:
            failures.append(error)
        else:
            found.append((shard, name))
    counts = {size: sum(len(picked.rows.get(size, ())) for picked in fresh.values()) for size in sizes}
    for name, picked in fresh.items():
        put(name, picked.document(sizes, counts))
        documents[name] = get(name) or picked.document(sizes, counts)
    sorted_shards: dict[Size, list[BucketShard]] = {size: [] for size in sizes}
    for shard, name in found:
        places, prompts = _read(documents[name], shard, sizes, name)
        for number, size in enumerate(sizes):
            rows = np.flatnonzero(places == number)
            if len(rows):
                sorted_shards[size].append(
                    BucketShard(base=shard, picked=rows, size=size, sizes=sizes, prompts_of=prompts[number])
                )
    return {size: replace(source, shards=tuple(each)) for size, each in sorted_shards.items() if each}, failures


def _read(
    data: bytes, shard: InputShard, sizes: Sequence[Size], name: str
) -> tuple[np.ndarray, list[frozenset[int] | None]]:
    """(int64 [row], the number of each row's bucket; the prompts of each bucket) of a document. Raises DataError."""
    try:
        found = json.loads(data)
        places = np.array(found["rows"])
        if places.dtype != np.int64 or places.shape != (shard.num_rows,) or not set(places) <= set(range(len(sizes))):
            raise ValueError(f"not the number of a bucket for each of {shard.num_rows} rows")
        prompts = [found["prompts"][str(number)] for number in range(len(sizes))]
        return places, [None if each is None else frozenset(map(int, each)) for each in prompts]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(
            "The list that says which bucket a row is in cannot be read.",
            where=f"{name}, in the folder of the caches",
            expected="a number for each row, and prompts, as precompute has written it",
            got=f"{type(error).__name__}: {error}",
            fix="restore it from a copy; or remove it, and the rows are sorted anew: into the same buckets, if the "
            "same images can be read",
        ) from None


def _place(item: Pair | Skipped, sizes: Sequence[Size]) -> Size | None:
    """None for a row of no one bucket."""
    fits = None if isinstance(item, Skipped) else _fitting(item, sizes)
    return None if fits is None or len(fits) > 1 else min(fits)


def _fitting(pair: Pair, sizes: Sequence[Size]) -> set[Size] | None:
    """The buckets that its images fit best; None if one is no image: whoever decodes it says why."""
    shown = [shown_size(data) for data in (pair.win, pair.lose)]
    fits = {_nearest(each, sizes) for each in shown if each is not None}
    return None if None in shown else fits


def _nearest(shown: Size, sizes: Sequence[Size]) -> Size:
    """The size of the nearest shape."""
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - math.log(shown[0] / shown[1])))
