"""What a run finds before it begins: the pairs it is to read, the shards that its cache holds already."""

from collections.abc import Collection, Sequence
from pathlib import Path

from inpo.common.cache import CacheWriter, Commit, Manifest, open_cache
from inpo.common.cache.commits import check_made_under, skipped_rows
from inpo.common.cache.identity import check_identity
from inpo.common.cache.schema import MANIFEST
from inpo.common.cache.store import CacheStore, digest, is_remote
from inpo.common.errors import CacheMismatch, DataError, InpoError, UsageError
from inpo.common.log import fail, note, say
from inpo.common.pairs import InputShard, PairSource
from inpo.common.pairs.names import known_names
from inpo.common.pairs.walk import count_not_read, not_read_words
from inpo.common.recipe import DataSection
from inpo.precompute.settings import PrecomputeSettings
from inpo.precompute.tasks import ShardTask, input_of, list_tasks


def list_work(data: DataSection, settings: PrecomputeSettings) -> tuple[PairSource, list[ShardTask], list[DataError]]:
    """The pair source, its shards, and an error for each input shard that cannot be read.

    Raises DataError if there is nothing to do: before there is a cache, since the next try may have other settings.
    """
    pairs, source = data.need("pairs"), data.open(with_noise=settings.inverter == "tracked")
    tasks, unreadable = list_tasks(source, limit=settings.limit)
    if not tasks:
        raise _nothing_to_read(pairs, unreadable)
    return source, tasks, unreadable


def grouped(settings: PrecomputeSettings, source: PairSource) -> PrecomputeSettings:
    """The settings with their groups chosen: by list where the pairs come from rankings, unless they say. Files beyond
    a limit are asked too: the cache is completed later."""
    if settings.group is not None or settings.faithful:
        return settings
    return settings.model_copy(update={"group": "list" if any(map(_has_lists, source.shards)) else "pair"})


def _has_lists(shard: InputShard) -> bool:
    try:
        return shard.has_lists
    except InpoError:  # the run itself meets and reports it
        return False


def print_inputs(source: PairSource, tasks: list[ShardTask], unreadable: list[DataError]) -> None:
    """Say on standard error which input shards cannot be read, and what no pair is made of."""
    for error in unreadable:
        fail(error)
    not_read = count_not_read(source, {task.input_shard.name: task.input_shard for task in tasks}.values())
    if not_read:
        note(f"not read, for no pair is made of it: {not_read_words(not_read)}")


def _nothing_to_read(pairs: str, unreadable: list[DataError]) -> DataError:
    """Why a source gives no work at all: what is wrong with its first file, or that its files hold no rows."""
    if not unreadable:
        return DataError(
            "The pair source has no rows.",
            where=pairs,
            expected="at least one pair",
            got="0 rows",
            fix="`inpo data check` shows what a source holds; docs/data.md shows the three kinds",
        )
    if len(unreadable) > 1:
        say(f"none of {len(unreadable)} input shards can be read; the first:")
    return unreadable[0]


def committed_shards(cache: str, manifest: Manifest) -> set[str]:
    """Names of shards done already; none for a cache that does not exist yet. Raises CacheMismatch for another's,
    CacheCorrupt if they were made under another manifest than lies there."""
    if not is_remote(cache) and not Path(cache).is_dir():
        if Path(cache).exists():
            raise UsageError("The cache is no folder.", where=cache, got="a file", fix="choose another --cache")
        return set()
    store = CacheStore(cache)
    data = store.get(MANIFEST)
    if data is None:
        # A manifest that another process is writing at this moment is no foreign file.
        foreign = [] if is_remote(cache) else [e.name for e in Path(cache).iterdir() if not e.name.startswith(MANIFEST)]
        if foreign and store.get(MANIFEST) is None:
            if "commits" in foreign:
                open_cache(cache)  # raises CacheMissing, which tells a cache that has lost its manifest
            raise CacheMismatch(
                "The folder is not empty and holds no cache.",
                where=cache,
                expected="a cache, or a new or empty folder",
                got=", ".join(sorted(foreign)[:6]),
                fix="choose another --cache, so that nothing of yours is mixed with the cache",
            )
        return set()
    existing: Manifest = Manifest.from_json(data, store.path(MANIFEST))
    committed = CacheWriter(store, existing).committed()
    try:
        check_identity(existing, manifest, cache)
        check_made_under(store, digest(data))
    except CacheMismatch as error:
        if not committed:  # what a first try leaves that failed for its model or its pairs
            error.fix = "nothing is committed here yet: remove this cache and run again, or repeat its settings"
        raise
    return committed


def named_texts(writer: CacheWriter) -> dict[str, tuple[str, ...]]:
    """{committed shard: the text shards that it names}."""
    return {name: commit.texts for name, commit in _commits(writer.store, writer.committed()).items()}


def _commits(store: CacheStore, committed: set[str]) -> dict[str, Commit]:
    paths = [f"{Commit.folder}/{name}.json" for name in sorted(committed)]
    documents = zip(sorted(committed), paths, store.get_many(paths), strict=True)
    return {name: Commit.from_json(data, store.path(path)) for name, path, data in documents if isinstance(data, bytes)}


def names_in_cache(cache: str, source: PairSource, committed: set[str]) -> tuple[dict[str, str], dict[str, DataError]]:
    """As `known_names`, of a cache with these shards; a commit is read for each name that is in question."""

    def made_from(names: Collection[str]) -> dict[str, tuple[str, str]]:
        first = {input_of(name): name for name in sorted(committed, reverse=True)}
        commits = _commits(CacheStore(cache), {first[name] for name in names})
        sources = [commit.source for commit in commits.values()]
        return {each.input_shard: (each.location, each.fingerprint) for each in sources}

    return known_names(source, {*map(input_of, committed)}, made_from)


def foreign_inputs(cache: str, tasks: Sequence[ShardTask], committed: set[str]) -> dict[str, DataError]:
    """{input shard: what is wrong} for those whose name another source's file has, from which this cache's shards of
    that name are made, lists of pairs being often called alike; and for those that have changed while they were made:
    rows stand in other places then, and would be lost or come twice."""
    mine = [task for task in tasks if task.name in committed]
    unfinished = {task.input_shard.name for task in tasks if task.name not in committed}
    commits = _commits(CacheStore(cache), {task.name for task in mine}) if mine else {}
    found: dict[str, DataError] = {}
    for task in mine:
        name, commit = task.input_shard.name, commits.get(task.name)
        if commit is None or name in found:
            continue
        is_here = commit.source.location == task.location
        if is_here and name not in unfinished:
            continue
        try:
            is_same = task.input_shard.fingerprint() == commit.source.fingerprint
        except InpoError:  # the run itself meets and reports it
            continue
        if is_same:
            continue
        if is_here:
            found[name] = DataError(
                "This file has changed since a part of its rows came into the cache, so that the others are left out.",
                where=f"{task.location}: {name}",
                expected=f"what shard {task.name} was made from",
                got="other rows",
                fix="give the file back as it was; rows that are new belong in a file of another name. Or make all of "
                f"it again: move {_commits_of(CacheStore(cache), name)} away",
            )
        else:
            found[name] = DataError(
                "Another source's file of this name is in the cache, so that this one is left out.",
                where=f"{task.location}: {name}",
                expected=f"what shard {task.name} was made from: {commit.source.location}",
                got="other rows",
                fix="rename the file, or take another --cache. If it is the same source, moved and changed since, give "
                f"the place that the cache knows, or move {_commits_of(CacheStore(cache), name)} away",
            )
    return found


def _commits_of(store: CacheStore, name: str) -> str:
    """The commits of all shards of an input, as a shell's pattern."""
    return store.path(f"{Commit.folder}/{name}-{'?' * 8}.json")


def input_warnings(writer: CacheWriter, tasks: list[ShardTask], committed: set[str]) -> list[str]:
    """What a user should know about inputs before days of work: a line per committed shard whose input file is not
    what it was or that lacks rows which --allow-remote reads, per such input that cannot be read any more, and per new
    input that is a committed one, renamed or copied."""
    commits = _commits(writer.store, committed)
    made_from = {commit.source.fingerprint: commit.source.input_shard for commit in commits.values()}
    present = {task.input_shard.name for task in tasks}
    lines: list[str] = []
    fingerprints: dict[str, str | None] = {}
    for task in tasks if commits else []:
        name, commit = task.input_shard.name, commits.get(task.name)
        is_first = name not in fingerprints
        if is_first:
            try:
                fingerprints[name] = task.input_shard.fingerprint()
            except InpoError as error:  # the run itself meets and reports it where there is work to do
                fingerprints[name] = None
                if commit is not None:
                    lines.append(f"input {name} cannot be compared with what its shards were made from: {error}")
        found = fingerprints[name]
        if found is None:
            continue
        if commit is not None and commit.source.fingerprint != found:
            more = task.stop - commit.source.rows[1]
            lines.append(
                f"input {name} has changed since shard {task.name} was committed from it; the committed shard stays"
                f"{f', and {more} rows are in no shard' if more > 0 else ''}. To make all of it again, move "
                f"{_commits_of(writer.store, name)} away"
            )
        if commit is not None and (count := _now_allowed(writer.store, task, commit)):
            lines.append(
                f"shard {task.name} was committed without {count} rows that --allow-remote reads, and stays so. To "
                f"make it again, move {writer.store.path(f'commits/{task.name}.json')} away"
            )
        if commit is None and is_first and made_from.get(found, name) != name:
            advice = "If the file was renamed or moved, stop and give it back its name"
            if made_from[found] in present:
                advice = "Both files are there: stop and leave one of them out"
            lines.append(
                f"input {name} holds what {made_from[found]} held when this cache was made from it: its pairs "
                f"come into the cache twice. {advice}"
            )
    return lines


def _now_allowed(store: CacheStore, task: ShardTask, commit: Commit) -> int:
    """How many rows a committed shard lacks for want of --allow-remote, if it is given now."""
    if not task.input_shard.reading.allow_remote or "not_allowed" not in commit.skipped:
        return 0
    path = f"skipped/{task.name}/{commit.attempt}.jsonl"
    rows = skipped_rows(store.get(path) or b"", store.path(path))
    # Joined addresses and a remote list's local files are refused with the option too.
    return sum(row.reason == "not_allowed" and "--allow-remote" in row.detail for row in rows)
