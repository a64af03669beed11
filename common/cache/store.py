"""Bytes of a cache, on a local disk or in an object store, behind one small object.

JSON documents go through obstore, whose `put(mode="create")` is the put-if-absent of the contract, local and remote:
of any number of writers one wins and the others are told. Arrays go through zarr's own stores.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import LocalStore, from_url
from zarr.abc.store import Store
from zarr.storage import LocalStore as ZarrLocalStore
from zarr.storage import ObjectStore

from common.errors import CacheMissing, InpoError, StorageError

_EDGE_BYTES = 4096
_RETRY = {"max_retries": 6, "retry_timeout": timedelta(seconds=90)}
_ADVICE = {
    errno.ENOSPC: "free some space or choose another folder, then run the same command again: what is committed stays",
    errno.EDQUOT: "raise the quota or choose another folder, then run the same command again: what is committed stays",
    errno.EROFS: "the file system is read-only; choose a folder you can write to",
    errno.EACCES: "check the owner and mode of the folder",
    errno.EPERM: "check the owner and mode of the folder",
}


@contextmanager
def storage_errors(action: str, where: object) -> Iterator[None]:
    """Turn an OSError or an obstore error into one StorageError that says what was being done and where.

    Passing faults of an object store (503, time-outs) have been retried with backoff before they arrive here.
    """
    try:
        yield
    except InpoError:
        raise
    except OSError as error:
        raise StorageError(
            f"Could not {action}: {error.strerror or error}.",
            where=error.filename or where,
            fix=_ADVICE.get(error.errno or 0, "check the folder, then run the same command again"),
        ) from error
    except BaseError as error:
        lines = str(error).strip().splitlines()
        raise StorageError(
            f"Could not {action}.",
            where=where,
            got=(lines[0] if lines else type(error).__name__)[:300],
            fix="check the address, the credentials and the free space, then run the same command again: "
            "what is committed stays",
        ) from error


def is_remote(location: str) -> bool:
    """True for s3://, gs:// and the like; false for a path."""
    return "://" in location and not location.startswith("file://")


def digest(data: bytes) -> str:
    """blake2b with 128 bits, in hex."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class CacheStore:
    """A rooted store: `put_new`, `get`, `listing`, `remove`, and a zarr store for any folder below the root."""

    def __init__(self, location: str, *, create: bool = False) -> None:
        """Open `location`. With `create` a missing local folder is made; without, CacheMissing is raised for it."""
        self.remote = is_remote(location)
        self.location = location.rstrip("/") if self.remote else str(Path(location.removeprefix("file://")).absolute())
        if self.remote:
            with storage_errors("open the object store", location):
                self._store = from_url(self.location, retry_config=_RETRY)  # type: ignore[arg-type]
            return
        root = Path(self.location)
        if create:
            with storage_errors("make the cache folder", root):
                root.mkdir(parents=True, exist_ok=True)
        elif not root.is_dir():
            raise CacheMissing(
                "There is no cache here.",
                where=root,
                expected="a folder with manifest.json",
                got="a file" if root.exists() else "nothing",
                fix="run `inpo precompute --cache` with this path first, or correct the path",
            )
        self._store = LocalStore(self.location)

    def path(self, name: str) -> str:
        """The full address of `name`, for messages."""
        return f"{self.location}/{name}"

    def put_new(self, name: str, data: bytes) -> bool:
        """Write `name` only if it does not exist, durably. Returns False, and writes nothing, if it does."""
        with storage_errors("write", self.path(name)):
            try:
                obstore.put(self._store, name, data, mode="create")
            except AlreadyExistsError:
                return False
            if not self.remote:
                _fsync(Path(self.location) / name)
                _fsync((Path(self.location) / name).parent)
        return True

    def get(self, name: str) -> bytes | None:
        """The bytes of `name`, or None if it does not exist."""
        with storage_errors("read", self.path(name)):
            try:
                return bytes(obstore.get(self._store, name).bytes())
            except (NotFoundError, FileNotFoundError):
                return None

    def edge_digest(self, name: str, size: int) -> str:
        """Digest of the first and last 4096 bytes of a file of `size` bytes (of all of it, if it is that small).

        Checksums inside a file tell damage; this tells a whole, healthy file in the wrong place, without reading it.
        """
        with storage_errors("read", self.path(name)):
            starts = [0, max(_EDGE_BYTES, size - _EDGE_BYTES)]
            ends = [min(_EDGE_BYTES, size), size]
            spans = [(start, end) for start, end in zip(starts, ends, strict=True) if end > start]
            data = obstore.get_ranges(
                self._store, name, starts=[span[0] for span in spans], ends=[span[1] for span in spans]
            )
            return digest(b"".join(bytes(part) for part in data))

    def listing(self, prefix: str) -> dict[str, int]:
        """{path relative to `prefix`: bytes} of everything below the folder `prefix`."""
        prefix = prefix.rstrip("/")
        with storage_errors("list", self.path(prefix)):
            if not self.remote:
                folder = Path(self.location) / prefix
                return {
                    str(file.relative_to(folder)): file.stat().st_size
                    for file in sorted(folder.rglob("*"))
                    if file.is_file()
                }
            found: dict[str, int] = {}
            for batch in obstore.list(self._store, prefix, chunk_size=1000):
                for entry in batch:
                    found[entry["path"][len(prefix) :].lstrip("/")] = entry["size"]
            return dict(sorted(found.items()))

    def remove(self, prefix: str) -> None:
        """Remove the folder or file `prefix` and everything below it."""
        with storage_errors("remove", self.path(prefix)):
            if not self.remote:
                target = Path(self.location) / prefix
                if target.is_dir():
                    shutil.rmtree(target)
                else:
                    target.unlink(missing_ok=True)
                return
            names = [f"{prefix}/{name}" if name else prefix for name in self.listing(prefix)]
            if names:
                obstore.delete(self._store, names)

    def move(self, source: str, destination: str) -> None:
        """Rename one file inside the store."""
        with storage_errors("move", self.path(source)):
            if not self.remote:
                (Path(self.location) / destination).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(self.location) / source, Path(self.location) / destination)
                return
            obstore.rename(self._store, source, destination)

    def zarr(self, folder: str, *, read_only: bool = True) -> Store:
        """zarr's own store for a folder of the cache."""
        if self.remote:
            store = from_url(f"{self.location}/{folder}", retry_config=_RETRY)  # type: ignore[arg-type]
            return ObjectStore(store, read_only=read_only)
        return ZarrLocalStore(Path(self.location) / folder, read_only=read_only)

    def sync_folder(self, folder: str) -> None:
        """Make every file below `folder` durable (local: fsync of files and folders; object stores are so already)."""
        if self.remote:
            return
        with storage_errors("flush to disk", self.path(folder)):
            root = Path(self.location) / folder
            for file in root.rglob("*"):
                _fsync(file)
            # The entries above the attempt too: shards/<name> and shards may be new.
            for parent in (root, root.parent, root.parent.parent, Path(self.location)):
                _fsync(parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
