"""Pairs sorted by the shape of their images: a cache for each bucket, side by side in one folder.

    input shards --sort_pairs--> {(height, width): BucketSource}

Only the images' headers are read. A pair goes to the bucket that both its images fit best; a pair whose images fit two
of them is a row without a pair, `mixed_sizes`, and so it is counted.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from inpo.common.cache.buckets import read_buckets
from inpo.common.cache.schema import BUCKETS, MANIFEST
from inpo.common.cache.store import CacheStore
from inpo.common.errors import CacheMismatch, DataError, UsageError
from inpo.common.pairs import InputShard, Pair, PairSource, Skipped
from inpo.common.pairs.columns import Reading
from inpo.common.pairs.images import shown_size
from inpo.common.seeding import stable_hash

Size = tuple[int, int]
"""(height, width) in pixels."""
_SDXL_BASE = 1024
_SDXL: tuple[Size, ...] = (
    (1024, 1024),
    (896, 1152),
    (1152, 896),
    (832, 1216),
    (1216, 832),
    (768, 1344),
    (1344, 768),
    (640, 1536),
    (1536, 640),
)
"""The sizes that SDXL's images are usually made in, of its own list of training sizes."""
_WIDEST = 2.0
"""Ratio of the sides of the outermost of N buckets."""


def bucket_sizes(name: str, base: Size, step: int) -> list[Size]:
    """The sizes of `sdxl`, or of N buckets evenly spaced in the logarithm of their shape from 1:2 to 2:1; each of about
    as many pixels as `base`, a square, and with sides that are multiples of `step`. Raises UsageError.
    """
    side = base[0]
    if base[0] != base[1]:
        raise UsageError(
            "Buckets are made around a square.",
            where="--resolution",
            expected="one number with --buckets",
            got=f"{base[0]}x{base[1]}",
            fix="say how many pixels an image has by the side of a square",
        )
    if name == "sdxl":
        exact = [(side * h / _SDXL_BASE, side * w / _SDXL_BASE) for h, w in _SDXL]
    else:
        count = int(name)
        places = [0.0] if count == 1 else [2 * i / (count - 1) - 1 for i in range(count)]
        roots = [_WIDEST ** (place / 2) for place in places]
        exact = [(side * root, side / root) for root in roots]
        step = math.lcm(step, max(step, side // 16))  # as coarse as the usual lists are
    sizes = [(max(step, round(h / step) * step), max(step, round(w / step) * step)) for h, w in exact]
    return list(dict.fromkeys(sizes))


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

    def head(self, count: int) -> list[dict[str, Any]]:
        return self.base.head(count)

    def fingerprint(self) -> str:
        """Of the file, and of which of its rows are here."""
        told = self.base.fingerprint().encode() + self.picked.astype("<i8").tobytes()
        return hashlib.blake2b(told, digest_size=16).hexdigest()

    def rows(self, start: int, stop: int) -> Iterator[Pair | Skipped]:
        """The picked rows start..stop-1, with the numbers that they have in the file."""
        wanted = self.picked[start:stop]
        if not len(wanted):
            return
        here = set(wanted.tolist())
        for item in self.base.rows(int(wanted[0]), int(wanted[-1]) + 1):
            if item.row not in here:
                continue
            if item.row in self.mixed and isinstance(item, Pair):
                detail = "its images have the shapes of two buckets"
                yield Skipped(pair_id=item.pair_id, reason="mixed_sizes", detail=detail, row=item.row)
            else:
                yield item

    def prompts(self, start: int, stop: int) -> Iterator[str]:
        """The prompts among the file's rows that are here."""
        wanted = self.picked[start:stop]
        if len(wanted):
            for prompt in self.base.prompts(int(wanted[0]), int(wanted[-1]) + 1):
                if stable_hash(prompt) in self.prompts_of:
                    yield prompt


@dataclass(frozen=True, kw_only=True)
class BucketSource:
    """The pairs of one bucket."""

    location: str
    kind: Any
    not_read: Mapping[str, int]
    shards: tuple[BucketShard, ...]

    def input_shards(self) -> Sequence[BucketShard]:
        return self.shards


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
) -> tuple[dict[Size, BucketSource], list[DataError]]:
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
    return {
        size: BucketSource(location=source.location, kind=source.kind, not_read=source.not_read, shards=tuple(each))
        for size, each in sorted_shards.items()
        if each
    }, failures


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


def claim_buckets(cache: str, sizes: Sequence[Size]) -> None:
    """Write the list of buckets, which caches are sorted by from now on. Raises CacheMismatch for another list: the
    same folder would hold other pairs.
    """
    names = [f"{height}x{width}" for height, width in sizes]
    store = CacheStore(cache, create=True)
    if store.get(MANIFEST) is not None:
        raise CacheMismatch(
            "The folder is a cache itself, and buckets are caches below it.",
            where=store.location,
            got=MANIFEST,
            fix="choose another --cache, or leave --buckets out",
        )
    data = json.dumps({"buckets": names}).encode()
    store.put_new(BUCKETS, data)
    if store.get(BUCKETS) != data:
        raise CacheMismatch(
            "The folder has been sorted by other buckets.",
            where=store.path(BUCKETS),
            expected=", ".join(names),
            got=", ".join(read_buckets(cache) or ()),
            fix="repeat --buckets and --resolution, or choose another --cache",
        )
