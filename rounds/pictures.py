"""The images of a cache of samples, beside it: pairs in webdataset tars, which every command reads as a source.

    CACHE-images/sample.json            what they depend on beside the cache's manifest
    CACHE-images/<shard>.tar            the pairs of a committed shard
    CACHE-images/<shard>.tar.<digest>   the same, before its commit

A tar is staged first, then its shard is committed, naming the tar's digest, then the tar gets its name. A writer that
dies in between leaves a tar that the next run names, or, without a commit that names it, removes.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inpo.common.cache.commits import Commit
from inpo.common.cache.store import CacheStore
from inpo.common.errors import CacheMismatch, DataError, StorageError
from inpo.common.pairs import Pair
from inpo.common.pairs.tars import TarShard
from inpo.data.pack import pack

SAMPLE = "sample.json"


def pictures_location(cache: str) -> str:
    """Where the images of a cache lie."""
    return f"{cache.rstrip('/')}-images"


class SampleTars:
    """The tars beside a cache."""

    def __init__(self, cache: str) -> None:
        self.store = CacheStore(pictures_location(cache), create=True)

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Make this the place of images with these properties. Raises CacheMismatch if it has others, or holds
        something else."""
        told = json.dumps(identity, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        # Another process may be writing its claim.
        other = [file for file in self.store.listing("") if not file.startswith(SAMPLE)]
        if other and self.store.get(SAMPLE) is None:
            raise CacheMismatch(
                "The folder for the images is not empty.",
                where=self.store.location,
                expected=f"{SAMPLE}, or a new or empty folder",
                got=", ".join(other[:5]),
                fix="choose another --cache, so that nothing of yours is mixed with the images",
            )
        if self.store.put_new(SAMPLE, told.encode()):
            return
        found = self._identity()
        wrong = [name for name in sorted({*identity, *found}) if identity.get(name) != found.get(name)]
        if wrong:
            raise CacheMismatch(
                "These samples were begun with other settings.",
                where=self.store.path(SAMPLE),
                expected="; ".join(f"{name} = {found.get(name)}" for name in wrong) + " (in the folder)",
                got="; ".join(f"{name} = {identity.get(name)}" for name in wrong) + " (this run)",
                fix="repeat the folder's settings, or another --cache; without a tar in it, remove the folder",
            )

    def _identity(self) -> dict[str, Any]:
        data = self.store.get(SAMPLE) or b""
        try:
            found = json.loads(data)
            if not isinstance(found, dict):
                raise ValueError(f"{type(found).__name__}, not an object")
        except ValueError as error:
            raise DataError(
                "The settings of these samples cannot be read.",
                where=self.store.path(SAMPLE),
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
