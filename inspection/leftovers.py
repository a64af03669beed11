"""What writers left behind: attempts that no commit names, finished or not, and documents that never got their name.

A writer that died, or lost the race for a shard, leaves its attempt folder; readers never see it. A writer that is
still at work looks the same, except that its files are young; and it may have slept. So a mark is left before the last
look at the commit, and removed last: the writer looks for it after its commit (common/cache/writer.py).
"""

import re
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from inpo.common.cache import Commit, TextCommit
from inpo.common.cache.commits import AnyCommit
from inpo.common.cache.document import ATTEMPT, SHARD_NAME
from inpo.common.cache.schema import MANIFEST, REMOVING
from inpo.common.cache.store import CacheStore
from inpo.common.errors import CacheError

GRACE = timedelta(hours=1)
"""Younger attempts may belong to a writer at work: a shard's files are all written within minutes."""


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """One attempt without a commit: its folder below shards/ or texts/, and its list of skipped pairs, if any."""

    kind: type[AnyCommit]
    """Of the commit that it lacks."""
    shard: str
    attempt: str
    num_bytes: int
    modified: datetime
    """UTC; the youngest of its files."""
    has_arrays: bool
    """False: the list alone, which `inpo precompute` leaves when it takes back the commit of a source without pairs."""

    @property
    def path(self) -> str:
        return f"{self.kind.arrays}/{self.shard}/{self.attempt}"

    def is_young(self, now: datetime | None = None) -> bool:
        return self.has_arrays and (now or datetime.now(UTC)) - self.modified < GRACE


@dataclass(frozen=True, kw_only=True)
class StagedDocument:
    """A document that a killed writer was about to give its name."""

    path: str
    """In the cache."""
    num_bytes: int
    modified: datetime
    """UTC."""

    def is_young(self) -> bool:
        return datetime.now(UTC) - self.modified < GRACE


def find_staged(store: CacheStore) -> list[StagedDocument]:
    """Every staged document outside of attempts and their lists, sorted. Other folders are not the cache's."""
    return [
        StagedDocument(path=name, num_bytes=size, modified=when)
        for name, size, when in sorted(store.files(""))
        if _STAGED.fullmatch(name) and name.rpartition("/")[0].split("/")[0] in _DOCUMENTS and _is_own(store, name)
    ]


def find_leftovers(store: CacheStore) -> list[Leftover]:
    """Every attempt that no commit names, sorted.

    Attempts of a shard whose commit cannot be read are left out: which of them was committed is not known.
    """
    sizes: dict[_Key, int] = {}
    modified: dict[_Key, datetime] = {}
    with_arrays: set[_Key] = set()
    for folder, kind in (("shards", Commit), ("skipped", Commit), ("texts", TextCommit)):
        for name, size, when in store.files(folder):
            parts = name.split("/")
            attempt = parts[1].partition(".")[0] if len(parts) > 1 else ""  # of a list, a mark, or one on its way
            if not SHARD_NAME.fullmatch(parts[0]) or not ATTEMPT.fullmatch(attempt):
                continue  # no writer left that, and without an attempt's name the whole shard would go
            key = (kind, parts[0], attempt)
            sizes[key] = sizes.get(key, 0) + size
            modified[key] = max(when, modified.get(key, when))
            if folder != "skipped" and len(parts) > 2:
                with_arrays.add(key)
    committed = {
        (kind, shard): committed_attempt(store, kind, shard) for kind, shard in {(key[0], key[1]) for key in sizes}
    }
    leftovers = [
        Leftover(
            kind=key[0],
            shard=key[1],
            attempt=key[2],
            num_bytes=sizes[key],
            modified=modified[key],
            has_arrays=key in with_arrays,
        )
        for key in sorted(sizes, key=lambda key: (key[0].arrays, *key[1:]))
        if committed[key[0], key[1]] not in (key[2], _UNKNOWN)
    ]
    return [leftover for leftover in leftovers if _is_own(store, leftover.path)]


def _is_own(store: CacheStore, name: str) -> bool:
    """False where links lead to what another cache, or this one under another name, has: its commits say what stays."""
    if store.remote:
        return True
    root = Path(store.location).resolve()
    place = (root / name).resolve()
    owner = next((each for each in place.parents if (each / MANIFEST).exists()), None)
    return owner is None or place == root / name


_Key = tuple[type[AnyCommit], str, str]
_UNKNOWN = "?"
_STAGED = re.compile(r".+\.[0-9a-f]{32}\.staged")
_DOCUMENTS = ("", "commits", "text-commits", "configurations", "labels")
"""Where documents lie beside those of attempts; "": beside the manifest."""


def committed_attempt(store: CacheStore, kind: type[AnyCommit], shard: str) -> str | None:
    """The attempt that a shard's commit names now; None: no commit; "?": a commit that cannot be read."""
    name = f"{kind.folder}/{shard}.json"
    try:
        data = store.get(name)
        return None if data is None else kind.from_json(data, store.path(name)).attempt
    except CacheError:
        return _UNKNOWN


def remove_leftover(store: CacheStore, leftover: Leftover | StagedDocument) -> bool:
    """Remove it. An attempt's commit is read again right before: False, and nothing removed, if it names it now."""
    if isinstance(leftover, StagedDocument):
        store.remove(leftover.path)
        return True
    # A mark of its own: who leaves an attempt alone takes its mark back, and not that of another who removes it.
    mark = f"{leftover.path}.{uuid.uuid4().hex}{REMOVING}"
    store.put_new(mark, b"")
    if committed_attempt(store, leftover.kind, leftover.shard) in (leftover.attempt, _UNKNOWN):
        store.remove(mark)
        return False
    store.remove(leftover.path)
    beside = [
        f"{top}/{leftover.shard}/{name}"
        for top in (leftover.kind.arrays, *(["skipped"] if leftover.kind is Commit else []))
        for name in store.listing(f"{top}/{leftover.shard}")
        if name.partition(".")[0] == leftover.attempt
    ]
    for path in sorted(beside, key=mark.__eq__):  # the mark last: a writer that finds it takes its commit back
        store.remove(path)
    return True
