"""Caches side by side in one folder, one for each size of images, as `inpo precompute --buckets` makes them."""

import json
import re
from collections.abc import Callable

from inpo.common.cache.commits import Commit
from inpo.common.cache.reader import Cache, open_cache
from inpo.common.cache.schema import BUCKETS, MANIFEST
from inpo.common.cache.store import CacheStore
from inpo.common.errors import CacheMissing, CacheSchemaError


def read_buckets(location: str) -> list[str] | None:
    """The folders of the caches in this one; None if it is not such a folder. Raises CacheSchemaError."""
    store = CacheStore(location)
    data = store.get(BUCKETS)
    if data is None:
        return None
    try:
        names = json.loads(data)["buckets"]
        if not isinstance(names, list) or not all(re.fullmatch(r"\d{1,6}x\d{1,6}", name) for name in names):
            raise ValueError(f"{names!r:.100}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CacheSchemaError(
            "The list of buckets cannot be read.",
            where=store.path(BUCKETS),
            expected='{"buckets": ["1024x1024", ...]}',
            got=f"{type(error).__name__}: {error}",
            fix="restore it from a copy, or name the caches below this folder one by one",
        ) from None
    return [str(name) for name in names]


def open_caches(location: str, *, on_empty: Callable[[str], object] = lambda location: None) -> list[Cache]:
    """The cache at a location, or those of its buckets that have pairs; `on_empty` is called with the location of each
    bucket that was begun and has none. Raises as `open_cache` does.
    """
    names = read_buckets(location)
    if names is None:
        return [open_cache(location)]
    base = location.rstrip("/")
    found = []
    for name in names:
        try:
            store = CacheStore(f"{base}/{name}")
            if store.get(MANIFEST) is None and not store.listing(Commit.folder):
                continue
        except CacheMissing:  # no pair had this shape
            continue
        cache = open_cache(f"{base}/{name}", allow_empty=True)
        if cache.num_pairs:
            found.append(cache)
        else:
            on_empty(cache.location)
    if not found:
        raise CacheMissing(
            "No bucket here has a committed pair yet.",
            where=location,
            expected=f"one of {', '.join(names)}",
            fix="run the same `inpo precompute` again",
        )
    return found
