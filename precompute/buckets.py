"""Which buckets there are: their sizes, and the list beside their caches."""

import json
import math
from collections.abc import Iterable, Sequence

from inpo.common.cache.buckets import read_buckets
from inpo.common.cache.schema import BUCKETS, MANIFEST
from inpo.common.cache.store import CacheStore
from inpo.common.errors import CacheMismatch, CacheMissing, DataError, UsageError
from inpo.common.pairs import InputShard, PairSource
from inpo.common.pairs.buckets import Size, sort_pairs

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


def sort_into_buckets(
    cache: str, source: PairSource, shards: Iterable[InputShard], sizes: Sequence[Size], *, is_real: bool
) -> tuple[dict[Size, PairSource], list[DataError]]:
    """As `sort_pairs`, which keeps what it decides beside the caches if this `is_real`; raises CacheMismatch then for a
    folder that was sorted into other sizes."""
    if is_real:
        _claim(cache, sizes)
        store = CacheStore(cache)
        return sort_pairs(source, shards, sizes, get=store.get, put=store.put_new)
    try:
        return sort_pairs(source, shards, sizes, get=CacheStore(cache).get)
    except CacheMissing:
        return sort_pairs(source, shards, sizes)


def _claim(cache: str, sizes: Sequence[Size]) -> None:
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
