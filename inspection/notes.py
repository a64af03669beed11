"""What lies in a cache and is not a fault in itself, and what cannot be known from there."""

from collections.abc import Iterable, Mapping

from inpo.common.cache import Cache
from inpo.common.cache.schema import MANIFEST, REMOVING, SAMPLE
from inpo.common.errors import CacheError
from inpo.common.log import LOG_FILE
from inpo.inspection.checks import TEXTS


def notes_of(cache: Cache, files: Mapping[str, int], unreadable: Mapping[str, CacheError]) -> list[str]:
    """What a commit that is not there leaves behind, files that belong to nothing, and what cannot be known.

    Args:
        files: {path below the cache: bytes} of all that lies there.
        unreadable: commits that are there and cannot be read.
    """
    texts = {shard.name: shard.commit for shard in cache.texts}
    without: dict[str, set[str]] = {}
    strays = []
    for name in files:
        folder, *rest = name.split("/")
        shard = rest[0] if rest else ""
        known = {
            MANIFEST: not rest,
            SAMPLE: not rest,
            LOG_FILE: not rest,
            "commits": len(rest) == 1 and name.endswith(".json"),
            "text-commits": len(rest) == 1 and name.endswith(".json"),
            "quarantine": (len(rest) == 1 or (len(rest) == 2 and shard == "texts")) and name.endswith(".json"),
            "configurations": len(rest) == 1 and name.endswith(".toml"),
            "labels": len(rest) == 2 and name.endswith(".json"),
            "skipped": len(rest) == 2 and name.endswith(".jsonl"),
            "shards": len(rest) > 2 or name.endswith(REMOVING),
            "texts": len(rest) > 2 or name.endswith(REMOVING),
        }.get(folder, False)
        commit = (texts if folder == "texts" else cache.commits).get(shard)
        if known and folder in ("shards", "texts") and commit is not None and rest[1] == commit.attempt:
            known = "/".join(rest[2:]) in commit.files
        if not known and not name.endswith(".staged"):
            strays.append(name)
        owner = f"{TEXTS}{shard}" if folder == "texts" else shard
        if known and folder in ("shards", "texts", "skipped") and commit is None and owner not in unreadable:
            without.setdefault(owner, set()).add(folder)
    notes = []
    attempts = [shard for shard, folders in without.items() if folders != {"skipped"}]
    if attempts:
        notes.append(
            f"{len(attempts)} shards have an attempt and no commit ({few(attempts)}): a writer is at work or died, or "
            "the commit was moved or removed; `inpo precompute` makes them again"
        )
    lists = [shard for shard in without if shard not in attempts]
    if lists:
        notes.append(
            f"{len(lists)} shards have nothing but a list of skipped rows ({few(lists)}): no pair was kept, and the "
            "commit was taken back or removed; `inpo precompute` reads their rows again"
        )
    gaps = _gaps(cache)
    if gaps:
        notes.append(f"rows before committed ones have no commit ({few(gaps)}): not made yet, or their commit is gone")
    if strays:
        notes.append(f"{len(strays)} files belong to no document of the cache ({few(strays)})")
    if cache.commits:
        notes.append(
            "not known from here: whether the source has more rows than those after which nothing is committed; the "
            "same `inpo precompute` says how much is left"
        )
    return notes


def _gaps(cache: Cache) -> list[str]:
    """Rows of an input shard without a commit, before the last one with a commit."""
    spans: dict[str, list[tuple[int, int]]] = {}
    for commit in cache.commits.values():
        spans.setdefault(commit.source.input_shard, []).append(commit.source.rows)
    gaps = []
    for name, rows in sorted(spans.items()):
        reached = 0
        for start, stop in sorted(rows):
            if start > reached:
                gaps.append(f"{name} {reached} to {start - 1}")
            reached = max(reached, stop)
    return gaps


def few(names: Iterable[str]) -> str:
    """The first three, as they may be printed."""
    shown = [ascii(name)[1:-1] for name in names]
    return ", ".join(shown[:3]) + (", ..." if shown[3:] else "")
