"""The commits of a cache: which of them a reader may believe."""

from typing import TypeVar

from inpo.common.cache.document import SHARD_NAME
from inpo.common.cache.schema import MANIFEST, AnyCommit, Manifest
from inpo.common.cache.store import CacheStore
from inpo.common.errors import CacheCorrupt, CacheError, CacheSchemaError

_C = TypeVar("_C", bound=AnyCommit)


def read_commits(
    store: CacheStore, manifest: Manifest, manifest_digest: str, *, kind: type[_C]
) -> tuple[dict[str, _C], dict[str, CacheError]]:
    """(commits by shard name, what is wrong with the others by shard name), under the manifest of this digest."""
    folder = kind.folder
    files = [name for name in store.listing(folder) if name.endswith(".json") and "/" not in name]
    commits: dict[str, _C] = {}
    bad: dict[str, CacheError] = {}
    owner: dict[str, str] = {}
    for file, document in zip(files, store.get_many([f"{folder}/{file}" for file in files]), strict=True):
        name = file.removesuffix(".json")
        if document is None:  # moved aside in between
            continue
        try:
            if isinstance(document, CacheError):
                raise document
            if not SHARD_NAME.fullmatch(name):
                raise CacheSchemaError(
                    "A commit has a name that no shard has.",
                    where=store.path(f"{folder}/{file}"),
                    expected="letters, digits, dots, dashes, underscores, the first no dot",
                    got=ascii(name)[:200],
                    fix="it is no file of this cache: move it away",
                )
            commit = kind.from_json(document, store.path(f"{folder}/{file}"))
            if commit.manifest != manifest_digest:
                raise CacheCorrupt(
                    f"The manifest is not the one that shard {name} was made under.",
                    where=store.path(MANIFEST),
                    expected=f"digest {commit.manifest} (from {folder}/{file})",
                    got=manifest_digest,
                    fix="manifest.json was edited or replaced: restore it from a copy; or the commit came from another "
                    "cache: remove it",
                )
            commit.check_files(manifest, store.path(f"{folder}/{file}"))
            first = owner.setdefault(commit.attempt, name)
            if first != name:
                raise CacheCorrupt(
                    f"Two commits name one attempt: those of shards {first} and {name}.",
                    where=store.path(f"{folder}/{file}"),
                    expected="an attempt of its own",
                    got=f"attempt {commit.attempt}",
                    fix="remove the one that is a copy: its pairs would count twice",
                )
            commits[name] = commit
        except CacheError as error:
            bad[name] = error
    return commits, bad
