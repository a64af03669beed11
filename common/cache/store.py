"""Bytes of a cache, on a local disk or in an object store, behind one small object.

Put-if-absent is obstore's conditional create, local and remote: of any number of writers one wins and the others are
told. Arrays are written through zarr's own stores. Local files are read with plain Python: obstore's threads do not
survive a fork, and a trainer's data workers are often forked.
"""

import hashlib
import os
import re
import stat
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import obstore
from obstore.exceptions import AlreadyExistsError, NotFoundError
from obstore.store import LocalStore, from_url
from zarr.abc.store import Store
from zarr.storage import LocalStore as ZarrLocalStore
from zarr.storage import ObjectStore

from inpo.common.durable import flush, remove, storage_errors
from inpo.common.errors import CacheMissing, CacheSchemaError, StorageError, UsageError
from inpo.common.paths import home
from inpo.common.printable import shown

if TYPE_CHECKING:
    from obstore.store import RetryConfig

RETRY: "RetryConfig" = {"max_retries": 6, "retry_timeout": timedelta(seconds=90)}
"""For what can pass (503, time-outs, dropped connections): backoff from 0.1 s, doubled each time, with jitter."""
_SAMPLE_BYTES = 4096
PARALLEL_READS = 16
"""At once, where each answer takes its time."""
_DOCUMENT_BYTES = 1 << 26
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_client_process: int | None = None
"""The process in which obstore's threads were started."""


def is_remote(location: str) -> bool:
    """True for s3://, gs:// and the like; false for a path. Of `settled` places (common/paths.py)."""
    return _ADDRESS.match(location) is not None


def digest(data: bytes) -> str:
    """blake2b with 128 bits, in hex."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _sample_spans(size: int) -> list[tuple[int, int]]:
    if size <= 3 * _SAMPLE_BYTES:
        return [(0, size)] if size else []
    middle = size // 2
    return [(0, _SAMPLE_BYTES), (middle, middle + _SAMPLE_BYTES), (size - _SAMPLE_BYTES, size)]


def digest_of_sample(data: memoryview) -> str:
    """What `CacheStore.sample_digest` gives for a file of these bytes."""
    return digest(b"".join(data[start:end] for start, end in _sample_spans(len(data))))


class CacheStore:
    """A rooted store: `put_new`, `get`, `listing`, `remove`, and a zarr store for any folder below the root."""

    def __init__(self, location: str, *, create: bool = False) -> None:
        """Open `location`. With `create` a missing local folder is made; without, CacheMissing is raised for it.

        Raises UsageError for an address that no store's keys can be made of.
        """
        location = home(location)  # who opens a cache by Python has parsed no settings
        self.remote = is_remote(location)
        self.address = location.rstrip("/") if self.remote else str(Path(location).absolute())
        """What opens this store again, secrets and all."""
        self.location = shown(self.address)
        """The same for messages and documents."""
        if self.remote:
            login = self.address.partition("://")[2].partition("/")[0].rpartition("@")[0]
            if ":" in login:
                raise StorageError(
                    "A bucket's address has no login: it would be passed over.",
                    where=self.location,
                    fix="set the credentials in the environment (AWS_ACCESS_KEY_ID and the like)",
                )
            _refuse_unaddressable(self.address, self.location)
            with storage_errors("open the object store", self.location):
                self._store: Any = _open_object_store(self.address)
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

    @property
    def client(self) -> Any:
        """obstore's store. Raises StorageError in a forked child, where every call would wait for ever."""
        check_process(self.location)
        return self._store

    def put_new(self, name: str, data: bytes) -> bool:
        """Write `name` only if it does not exist, whole and durably. Returns False, and writes nothing, if it does.

        Local: a staged file is flushed to disk first and then given its name, so that not even a power cut leaves a
        name without its bytes. Remote: one conditional PUT; if it was retried after a lost answer, the bytes in
        place tell whether it was ours that arrived. Raises StorageError for more than `get` takes.
        """
        if len(data) > _DOCUMENT_BYTES:
            raise StorageError(
                "This document is too large for a cache.",
                where=self.path(name),
                expected=f"at most {_DOCUMENT_BYTES} bytes",
                got=f"{len(data)} bytes",
                fix="split the input file that it is of",
            )
        with storage_errors("write", self.path(name)):
            if self.remote:
                try:
                    obstore.put(self.client, name, data, mode="create")
                except AlreadyExistsError:
                    return self.get(name) == data
                return True
            final = Path(self.location) / name
            if final.exists():
                return False
            final.parent.mkdir(parents=True, exist_ok=True)
            staged = final.with_name(f"{final.name}.{uuid.uuid4().hex}.staged")
            try:
                with staged.open("xb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                obstore.copy(self.client, str(staged.relative_to(self.location)), name, overwrite=False)
            except AlreadyExistsError:
                return False
            finally:
                with suppress(OSError):  # the error that matters is the one before
                    staged.unlink()
            flush(final.parent)
            flush(final.parent.parent)
        return True

    def get(self, name: str) -> bytes | None:
        """The bytes of the document `name`, or None if it does not exist.

        Raises CacheSchemaError for what is no file, or larger than any document, before its bytes are read.
        """
        with storage_errors("read", self.path(name)):
            try:
                if self.remote:
                    answer = obstore.get(self.client, name)
                    self._check_size(name, answer.meta["size"])
                    return bytes(answer.bytes())
                file = Path(self.location) / name
                found = file.stat()
                self._check_size(name, found.st_size if stat.S_ISREG(found.st_mode) else None)
                return file.read_bytes()
            except (NotFoundError, FileNotFoundError):
                return None

    def _check_size(self, name: str, size: int | None) -> None:
        if size is None or size > _DOCUMENT_BYTES:
            raise CacheSchemaError(
                "This is no document of a cache.",
                where=self.path(name),
                expected=f"a file of at most {_DOCUMENT_BYTES} bytes",
                got="something that is no file" if size is None else f"{size} bytes",
                fix="restore the file from a copy of the cache, or move it away",
            )

    def get_many(self, names: Sequence[str]) -> list[bytes | CacheSchemaError | None]:
        """`get` for many names, in their order; many at a time where each takes a round trip. What is no document
        gives its error."""

        def one(name: str) -> bytes | CacheSchemaError | None:
            try:
                return self.get(name)
            except CacheSchemaError as error:
                return error

        if not self.remote:
            return [one(name) for name in names]
        with ThreadPoolExecutor(PARALLEL_READS) as pool:
            return list(pool.map(one, names))

    def sample_digest(self, name: str, size: int) -> str:
        """Digest of the first, middle and last 4096 bytes of a file of `size` bytes (of all, if it is that small).

        Checksums inside a file tell damage; this tells a whole, healthy file in the wrong place, without reading it.
        The last bytes of two arrays of one shape are equal (zarr's chunk index), and one image often opens several
        pairs; the middle tells those apart.
        """
        spans = _sample_spans(size)
        with storage_errors("read", self.path(name)):
            try:
                return digest(b"".join(self.ranges(name, spans)))
            except (NotFoundError, FileNotFoundError):
                return "no such file"

    def ranges(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Bytes [start, end) of a file, for each span; fewer where the file ends before. Errors are the library's."""
        if self.remote:
            starts, ends = [start for start, _ in spans], [end for _, end in spans]
            return [bytes(part) for part in obstore.get_ranges(self.client, name, starts=starts, ends=ends)]
        parts = []
        with (Path(self.location) / name).open("rb") as stream:
            for start, end in spans:
                stream.seek(start)
                parts.append(stream.read(end - start))
        return parts

    def listing(self, prefix: str) -> dict[str, int]:
        """{path relative to `prefix`: bytes} of everything below the folder `prefix`; {} if there is no such folder."""
        return {name: size for name, size, _ in sorted(self.files(prefix))}

    def files(self, prefix: str) -> Iterator[tuple[str, int, datetime]]:
        """(path relative to `prefix`, bytes, UTC of the last change) of everything below the folder `prefix`."""
        prefix = prefix.rstrip("/")
        with storage_errors("list", self.path(prefix)):
            if not self.remote:
                yield from _local_files(Path(self.location) / prefix)
                return
            for batch in obstore.list(self.client, prefix, chunk_size=1000):
                for entry in batch:
                    yield entry["path"].removeprefix(f"{prefix}/"), entry["size"], entry["last_modified"]

    def remove(self, prefix: str) -> None:
        """Remove the folder or file `prefix` and everything below it; a link, and not what it names."""
        with storage_errors("remove", self.path(prefix)):
            if not self.remote:
                remove(Path(self.location) / prefix)
                return
            # A listing shows what lies below a prefix, not an object of that very name.
            names = [f"{prefix}/{name}" for name in self.listing(prefix)] or [prefix]
            with suppress(NotFoundError, FileNotFoundError):
                obstore.delete(self.client, names)

    def move(self, source: str, destination: str) -> None:
        """Rename one file inside the store."""
        with storage_errors("move", self.path(source)):
            if not self.remote:
                (Path(self.location) / destination).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(self.location) / source, Path(self.location) / destination)
                return
            obstore.rename(self.client, source, destination)

    def zarr(self, folder: str, *, read_only: bool = True) -> Store:
        """zarr's own store for a folder of the cache."""
        if self.remote:
            check_process(self.location)
            return ObjectStore(_open_object_store(f"{self.address}/{folder}"), read_only=read_only)
        return ZarrLocalStore(Path(self.location) / folder, read_only=read_only)

    def sync_folder(self, folder: str) -> None:
        """Make every file below `folder` durable (local: fsync of files and folders; object stores are so already)."""
        if self.remote:
            return
        with storage_errors("flush to disk", self.path(folder)):
            root = Path(self.location) / folder
            for place, folders, names in os.walk(root):
                for name in (*folders, *names):
                    flush(os.path.join(place, name))
            # The entries above the attempt too: shards/<name> and shards may be new.
            for parent in (root, root.parent, root.parent.parent, Path(self.location)):
                flush(parent)


def _open_object_store(address: str) -> Any:
    """obstore's client for a bucket and the key that a folder's names begin with, which is taken letter by letter:
    obstore reads an address as a URL's, would decode %20, and leave out what follows #."""
    scheme, _, rest = address.partition("://")
    bucket, slash, key = rest.partition("/")
    if scheme.lower() not in ("http", "https"):  # which are URLs
        key = quote(key)
    return from_url(f"{scheme}://{bucket}{slash}{key}", retry_config=RETRY)


def _refuse_unaddressable(address: str, location: str) -> None:
    """Raise UsageError for an address of which a part would be left out or read as another, so that another cache
    would be opened."""
    scheme, _, rest = address.partition("://")
    bucket, _, key = rest.partition("/")
    problem = None
    if "?" in rest:
        problem = "a ?, behind which an address has a query, and secrets that no message shows"
    elif "#" in (rest if scheme.lower() in ("http", "https") else bucket):
        problem = "a #, and what follows it is no part of the address"
    elif {"", ".", ".."} & set(key.split("/") if key else ()):
        problem = "an empty name, . or .. between slashes, which no key can have"
    if problem is not None:
        raise UsageError(
            "This address cannot be a cache's.",
            where=location,
            expected="a bucket and a key, as s3://bucket/path",
            got=problem,
            fix="choose another --cache",
        )


def check_process(where: object) -> None:
    """Raise StorageError if obstore was started before this process was forked: its threads stayed behind."""
    global _client_process
    if _client_process is None:
        _client_process = os.getpid()
    elif _client_process != os.getpid():
        raise StorageError(
            "This process was forked after the store was opened, and the store's client does not survive that.",
            where=where,
            fix="start workers with the 'spawn' or 'forkserver' method (DataLoader: multiprocessing_context='spawn')",
        )


def _local_files(folder: Path) -> Iterator[tuple[str, int, datetime]]:
    """(path relative to `folder`, bytes, UTC of the last change) of every file, also behind links. A folder that may
    not be listed, or a link to it that leads nowhere, is an error, not empty."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error
        for place in (folder, *folder.parents):
            if place.is_symlink() and not place.exists():
                raise StorageError(
                    "A link leads nowhere.",
                    where=place,
                    expected="the folder that it was made for",
                    got=f"no {os.readlink(place)}",
                    fix="mount the disk or bring the folder back, then run the same command again",
                )

    above = len(os.path.join(folder, ""))
    within: dict[str, tuple[tuple[int, int], ...]] = {os.fspath(folder): ()}
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        outer = within.pop(root)
        try:
            found = os.stat(root)
        except FileNotFoundError:  # gone in between
            folders.clear()
            continue
        here = (found.st_dev, found.st_ino)
        if here in outer:  # links in a circle
            folders.clear()
            continue
        within |= {os.path.join(root, each): (*outer, here) for each in folders}
        for name in names:
            file = os.path.join(root, name)
            try:
                found = os.stat(file)
            except FileNotFoundError:  # another writer's staged file
                continue
            yield file[above:], found.st_size, datetime.fromtimestamp(found.st_mtime, UTC)
