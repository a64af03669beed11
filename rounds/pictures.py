"""The images of a cache of samples, beside it: pairs in webdataset tars, which every command reads as a source.

    CACHE-images/<shard>.tar            the pairs of a committed shard
    CACHE-images/<shard>.tar.<digest>   the same, before its commit

A tar is staged first, then its shard is committed, naming the tar's digest, then the tar gets its name. A writer that
dies in between leaves a tar that the next run names, or, without a commit that names it, removes. What the images
depend on beside the manifest stands in the cache, CACHE/sample.json.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inpo.common.cache.commits import Commit
from inpo.common.cache.schema import SAMPLE
from inpo.common.cache.store import CacheStore
from inpo.common.errors import CacheMismatch, DataError, StorageError
from inpo.common.pairs import Pair
from inpo.common.pairs.tars import TarShard
from inpo.data.pack import pack


def pictures_location(cache: CacheStore) -> str:
    """Where the images of a cache lie: one place, by whatever name the cache is called."""
    return f"{cache.address if cache.remote else os.path.realpath(cache.address)}-images"


class SampleTars:
    """The tars beside a cache."""

    def __init__(self, cache: CacheStore) -> None:
        self.cache = cache
        self.store = CacheStore(pictures_location(cache), create=True)

    def claim(self, identity: Mapping[str, Any], *, has_shards: bool) -> None:
        """Make the cache one of images with these properties. Raises CacheMismatch if it has others, if it `has_shards`
        and they are no samples, or if the place of the images holds something else."""
        told = json.dumps(identity, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        other = list(self.store.listing(""))
        if (has_shards or other) and self.cache.get(SAMPLE) is None:  # another process may have been quicker
            raise CacheMismatch(
                "The cache has shards, and they are no samples."
                if has_shards
                else "The folder for the images is not empty.",
                where=self.cache.location if has_shards else self.store.location,
                expected=f"{SAMPLE} in the cache" if has_shards else "a new or empty folder, beside a new cache",
                got="no such file" if has_shards else ", ".join(other[:5]),
                fix="choose another --cache, so that nothing is mixed, or remove what is left of a cache that is gone",
            )
        if self.cache.put_new(SAMPLE, told.encode()):
            return
        found = self._identity()
        wrong = [name for name in sorted({*identity, *found}) if identity.get(name) != found.get(name)]
        if wrong:
            raise CacheMismatch(
                "These samples were begun with other settings.",
                where=self.cache.path(SAMPLE),
                expected="; ".join(f"{name} = {found.get(name)}" for name in wrong) + " (in the cache)",
                got="; ".join(f"{name} = {identity.get(name)}" for name in wrong) + " (this run)",
                fix="repeat the cache's settings, or another --cache"
                if has_shards
                else "nothing is committed here yet: remove this cache and run again, or repeat its settings",
            )

    def _identity(self) -> dict[str, Any]:
        data = self.cache.get(SAMPLE) or b""
        try:
            found = json.loads(data)
            if not isinstance(found, dict):
                raise ValueError(f"{type(found).__name__}, not an object")
        except ValueError as error:
            raise DataError(
                "The settings of these samples cannot be read.",
                where=self.cache.path(SAMPLE),
                expected="a JSON object, as `inpo sample` wrote it",
                got=str(error),
                fix="restore the file from a copy, or sample into another --cache",
            ) from None
        return found

    def stage(self, name: str, tar: "Tar") -> None:
        """Keep the pairs of a shard that is about to be committed."""
        self.store.put_new(f"{name}.tar.{tar.fingerprint}", tar.data)

    def settle(self, name: str, fingerprint: str) -> None:
        """The commit of a shard says that its pairs are those of this digest: they get their name."""
        staged = f"{name}.tar.{fingerprint}"
        if staged in self.store.listing(""):
            try:
                self.store.move(staged, f"{name}.tar")  # over that of a commit that was moved away
            except StorageError:
                if staged in self.store.listing(""):  # else another writer was quicker
                    raise
        for file in self.store.listing(""):  # by writers that died, or lost the race
            if file.startswith(f"{name}.tar."):
                self.store.remove(file)

    def recover(self, commits: Mapping[str, Commit]) -> list[str]:
        """Give committed shards their tars, which a writer that died may have left unnamed. Returns the shards whose
        pairs are not there."""
        there = self.store.listing("")
        lost = []
        for name, commit in commits.items():
            if commit.num_pairs and f"{name}.tar.{commit.source.fingerprint}" in there:
                self.settle(name, commit.source.fingerprint)
            elif commit.num_pairs and f"{name}.tar" not in there:
                lost.append(name)
        return lost


class Tar:
    """Pairs as `inpo data pack` writes them: one tar, byte for byte the same for the same pairs."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        with tempfile.TemporaryDirectory(prefix="inpo-sample-") as folder:
            packed = Path(folder) / "pairs"
            pack((("samples", pair) for pair in pairs), output=packed, pairs_per_tar=len(pairs))
            (file,) = packed.glob("*.tar")
            self.data = file.read_bytes()
            self.fingerprint = TarShard(name="samples", file=str(file)).fingerprint()
