"""What must hold of the documents beside the shards: lists of skipped rows, configurations, label sets."""

from collections import Counter
from collections.abc import Mapping

from inpo.common.cache import Cache
from inpo.common.cache.commits import skipped_rows
from inpo.common.cache.labels import label_sets, read_shard_labels
from inpo.common.cache.schema import CONFIGURATION_SEAL
from inpo.common.cache.store import digest
from inpo.common.errors import CacheCorrupt, CacheError, StorageError
from inpo.inspection.checks import Finding


def check_skipped(cache: Cache, not_checked: dict[str, StorageError]) -> tuple[int, list[Finding]]:
    """(rows looked at, findings): each commit's list of skipped rows is the one written, and says what the commit
    counts. Shards whose list the store refuses join those that are not checked."""
    num_rows, findings = 0, []
    for name, commit in cache.commits.items():
        path = f"skipped/{name}/{commit.attempt}.jsonl"
        problem = None
        try:
            data = cache.store.get(path)
            if data is None:
                problem = "no such file" if commit.skipped else None
            elif not commit.skipped:
                problem = "a list, and the commit skips nothing"
            elif commit.skipped_digest is not None and digest(data) != commit.skipped_digest:
                problem = "not the list that was written"
            else:
                rows = skipped_rows(data, cache.store.path(path))
                num_rows += len(rows)
                start, stop = commit.source.rows
                counted = Counter(row.reason for row in rows)
                if counted != commit.skipped:
                    problem = f"{dict(counted)}, and the commit counts {commit.skipped}"
                elif not all(start <= row.row < stop for row in rows):
                    problem = f"a row outside the shard's, {start} to {stop - 1}"
        except CacheError as error:
            problem = f"{error.what} Got {error.got}"
        except StorageError as error:
            not_checked.setdefault(name, error)
        if problem is not None:
            findings.append(Finding(shard=name, check="skipped", detail=f"{problem}; in {cache.store.path(path)}"))
    return num_rows, findings


def check_configurations(cache: Cache, files: Mapping[str, int]) -> tuple[int, list[Finding]]:
    """(documents looked at, findings). No reader needs one, so making a shard again cures nothing."""
    names = [name for name in files if name.startswith("configurations/") and name.endswith(".toml")]
    findings = []
    for name, data in zip(names, cache.store.get_many(names), strict=True):
        problem = None
        if isinstance(data, CacheError):
            problem = data.what
        elif data is not None:
            text, mark, seal = data.rpartition(CONFIGURATION_SEAL.encode())
            if not mark or seal != f"{digest(text)}\n".encode():
                problem = "not the configuration that was written; restore it from a copy, or remove it"
        if problem is not None:
            findings.append(Finding(shard=name, check="configurations", detail=problem, remake=False))
    return len(names), findings


def check_labels(cache: Cache, not_checked: dict[str, StorageError]) -> tuple[int, list[Finding]]:
    """(labels looked at, findings) over every label set, but for shards that the store refused, which those join whose
    labels it refuses. Making a shard again cures no label, so none is `remake`."""
    num_checked, findings = 0, []
    for name in label_sets(cache.store):
        for shard in (each for each in cache if each.name not in not_checked):
            try:
                labels = read_shard_labels(cache.store, name, shard.name)
                if labels is None:  # a set may be begun and not finished
                    continue
                num_checked += len(labels.pairs)
                if labels.attempt == shard.commit.attempt and set(labels.pairs) == set(shard.read("pair/id").tolist()):
                    continue
                detail = "not the labels of the committed pairs; run the same `inpo relabel` again"
            except CacheCorrupt as error:
                detail = f"{error.what} In {error.where}; {error.fix}"
            except CacheError as error:
                detail = f"{error.what} Got {error.got}, in {error.where}; {error.fix}"
            except StorageError as error:
                not_checked.setdefault(shard.name, error)
                continue
            findings.append(Finding(shard=shard.name, check="labels", detail=f"set {name}: {detail}", remake=False))
    return num_checked, findings


def labels_without_commit(
    cache: Cache, files: Mapping[str, int], unreadable: Mapping[str, CacheError]
) -> list[Finding]:
    """Labels are made for committed shards only: where there is none, and none in quarantine, a commit was removed."""
    findings = []
    for name in files:
        parts = name.split("/")
        if parts[0] != "labels" or len(parts) != 3 or not name.endswith(".json"):
            continue
        shard = parts[2].removesuffix(".json")
        if shard not in cache.commits and shard not in unreadable and f"quarantine/{shard}.json" not in files:
            detail = (
                f"set {parts[1]} has labels for it, and there is no commit: it was removed. Restore it from a copy, or "
                "run `inpo precompute` and `inpo relabel` again"
            )
            findings.append(Finding(shard=shard, check="labels", detail=detail, remake=False))
    return findings
