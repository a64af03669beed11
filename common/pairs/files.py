"""Files of a source: local paths and fsspec URLs behind the same few calls.

Shards keep the location as a string and open it when they read, so they can be pickled to other processes and machines.
"""

import base64
import fnmatch
import glob
import hashlib
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import PurePosixPath
from types import TracebackType
from typing import Protocol, cast, runtime_checkable
from urllib.parse import unquote

import braceexpand
import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from inpo.common.errors import DataError
from inpo.common.pairs.columns import Reading
from inpo.common.pairs.signatures import Likely, likely_kind
from inpo.common.printable import shown

OBJECT_STORES = ("s3", "s3a", "gs", "az", "abfs", "abfss", "http", "https")
"""URL schemes read through obstore, the library that also holds the cache, so that one set of credentials serves."""
PASSING = (408, 425, 429)
"""Answers of a host that is asked too early or too often."""


@runtime_checkable
class ByteStream(Protocol):
    """An open binary file of any file system."""

    def read(self, size: int = -1, /) -> bytes: ...

    def readline(self) -> bytes: ...

    def seek(self, offset: int, whence: int = 0, /) -> int: ...

    def tell(self) -> int: ...

    def close(self) -> None: ...

    def __enter__(self) -> "ByteStream": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> object: ...


@lru_cache(maxsize=64)
def _object_store(protocol: str, login: str) -> fsspec.AbstractFileSystem:
    from obstore.fsspec import FsspecStore

    client: dict[str, object] = {}
    if protocol == "http":  # the user wrote it; obstore wants to be told that this is meant
        client["allow_http"] = True
    if login:  # obstore passes over what stands before the host
        client["default_headers"] = {"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"}
    options = {"client_options": client} if client else {}
    return FsspecStore(protocol, **options)  # type: ignore[call-overload]  # its overloads want a literal


def filesystem(location: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a location and the path in it. Raises DataError for an unknown or uninstalled scheme."""
    scheme, separator, rest = location.partition("://")
    if separator and scheme in OBJECT_STORES:
        if scheme in ("http", "https") and "?" in rest:
            raise DataError(
                "An address with a query cannot be opened as a source.",
                where=location,
                expected="an address without ?, which the library that reads by ranges would leave out",
                fix="download the file and name the copy, or name the bucket (s3://, gs://) and set its credentials",
            )
        login = rest.partition("/")[0].rpartition("@")[0]
        if scheme in ("http", "https"):
            return _object_store(scheme, unquote(login)), location
        if ":" in login:
            raise DataError(
                "A bucket's address has no login.",
                where=location,
                expected="an address without user and password, which would be passed over",
                fix="set the credentials in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the like)",
            )
        return _object_store(scheme, ""), location
    try:
        if scheme == "hf":
            _refuse_offline()
        fs, path = fsspec.core.url_to_fs(location)
    except Exception as error:  # every file system has exceptions of its own
        raise DataError(
            "This location cannot be opened.",
            where=location,
            expected="a local path or a URL that fsspec knows (s3://, gs://, https://, memory://, ...)",
            got=one_line(error)[:300],
            fix="check the address, install the package if the message names one, or copy the data to a local folder",
        ) from error
    return fs, path


def _refuse_offline() -> None:
    """Raise ConnectionError if the hub's client is told not to ask it: its file system would find nothing there."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("the hub is not asked: HF_HUB_OFFLINE is set")


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return isinstance(fs, LocalFileSystem)


@contextmanager
def _reaching(location: str) -> Iterator[None]:
    """Whatever a file system raises before anything is read: a host without an address, a refused key, no
    permission.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # every file system has exceptions of its own
        raise DataError(
            "This location cannot be reached.",
            where=location,
            got=one_line(error)[:300],
            fix="check the address, the network and the credentials (AWS_ACCESS_KEY_ID and the like; "
            "AWS_SKIP_SIGNATURE=true for a public bucket)",
        ) from error


def exists(location: str) -> bool:
    """Whether there is a file or folder. Raises DataError when that cannot be told."""
    fs, path = filesystem(location)
    with _reaching(location):
        return bool(fs.exists(path))


def is_folder(location: str) -> bool:
    """Whether there is a folder. Raises DataError when that cannot be told."""
    fs, path = filesystem(location)
    with _reaching(location):
        return bool(fs.isdir(path))


def open_binary(location: str, *, sequential: bool = True) -> ByteStream:
    """An open binary file. `sequential` keeps read-ahead for remote files; without it each read is one range request.

    Raises DataError, also for a file that is not there.
    """
    fs, path = filesystem(location)
    options = {} if is_local(fs) or sequential else {"cache_type": "none"}
    if is_local(fs) and os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
        raise unreadable_file(location, OSError("not a regular file"))
    try:
        return cast(ByteStream, fs.open(path, "rb", **options))
    except Exception as error:  # every file system has exceptions of its own
        raise unreadable_file(location, error) from error


def is_refusal(error: Exception) -> bool:
    """Whether a file system says that something is not to be had; else it is in trouble, and may have it later."""
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    denied = (FileNotFoundError, PermissionError, IsADirectoryError, PermissionDeniedError, UnauthenticatedError)
    status = getattr(error, "status", None)
    return isinstance(error, denied) or (isinstance(status, int) and 400 <= status < 500 and status not in PASSING)


def one_line(error: Exception) -> str:
    """An exception in one line: some libraries append pages of their inner state."""
    return f"{type(error).__name__}: {error}".split("\n", 1)[0]


def unreadable_file(location: str, error: Exception, *, what: str = "input shard") -> DataError:
    """The DataError for a file that cannot be read, with what it looks like where that explains it."""
    likely = _looks_like(location, error)
    return DataError(
        f"This {what} cannot be read.",
        where=location,
        got=one_line(error) if likely is None else f"{likely.what} ({one_line(error)})",
        fix=likely.fix if likely else "copy the file again, or leave it out; the other shards are not affected",
    )


def _looks_like(location: str, error: Exception) -> Likely | None:
    if (target := broken_link(location)) is not None:
        return Likely(f"a symbolic link to {target}, which is not there", "restore what it points to, or remove it")
    fs, path = filesystem(location)
    if isinstance(error, OSError) and not is_local(fs):
        return None  # the host's own trouble
    if is_local(fs) and not os.path.isfile(path):  # a pipe would be waited for
        return None
    try:
        with fs.open(path, "rb") as stream:
            likely = likely_kind(stream.read(512))
    except Exception:  # the error at hand says it
        return None
    # A file that begins as its name says is damaged further on.
    return None if likely is None or likely.fix == f"name it {PurePosixPath(location).suffix.lower()}" else likely


def broken_link(location: str) -> str | None:
    """Where a local symbolic link points that leads nowhere; None for everything else."""
    fs, path = filesystem(location)
    return os.readlink(path) if is_local(fs) and os.path.islink(path) and not os.path.exists(path) else None


def expand_pattern(location: str) -> list[str]:
    """The locations behind a brace pattern or a glob, sorted; the location itself when it is neither.

    The name of a file or folder that exists is never taken for a pattern, and in a web address ? begins a query. Braces
    may name files that are not there (each becomes an unreadable shard); a glob gives existing files only.
    """
    if not re.search(r"[{*?\[]", location) or re.match(r"https?://[^{*\[]*\?", location):
        return [location]
    fs, path = filesystem(location)
    base, rest = _literal_part(path if is_local(fs) and "://" in location else location)
    expanded: list[str] = []
    try:
        names = list(braceexpand.braceexpand(rest)) if "{" in rest else [rest]
    except ValueError:
        raise DataError(
            "A brace in this pattern of names does not close.",
            where=location,
            expected="a pattern such as pairs-{0000..0003}.tar, or the name of a file that is there",
            fix="write the other brace; quote the pattern, so that the shell leaves it alone",
        ) from None
    for name in names:
        folder, pattern = _literal_part(base + name)
        expanded.extend(_glob(folder, pattern) if re.search(r"[*?\[]", pattern) else [base + name])
    return sorted(set(expanded))


def _literal_part(location: str) -> tuple[str, str]:
    """(what is no pattern; the rest, which may be one): of a local location the longest beginning that exists."""
    if not is_local(filesystem(location)[0]):
        base = re.split(r"[^/]*[{*?\[]", location, maxsplit=1)[0]
    elif exists(location):
        base = location
    else:
        ends = [slash.end() for slash in re.finditer("/", location)]
        base = next((location[:end] for end in reversed(ends) if is_folder(location[:end])), "")
    return base, location[len(base) :]


def _glob(base: str, pattern: str) -> list[str]:
    """The files of a pattern below `base`: a folder and its slash, "" for the one that is worked in."""
    fs, root = filesystem(base or ".")
    if base and "/" not in pattern:
        # Listing one folder works on every file system and keeps the scheme; not every one can glob.
        folder = base if is_local(fs) else base[:-1]
        found = list_folder(folder).files if exists(folder) else []
        return [file for file in found if fnmatch.fnmatchcase(file.rpartition("/")[2], pattern)]
    with _reaching(base + pattern):
        if is_local(fs):  # fsspec's own does not go into folders that are symbolic links
            below = _glob_below(root, pattern) if "**" in pattern.split("/") else glob.iglob(pattern, root_dir=root)
            return [os.path.join(root, file) for file in below]
        address = base + pattern
        path = filesystem(address)[1]
        prefix = address[: len(address) - len(path)] if address.endswith(path) else ""
        return [prefix + str(file) for file in fs.glob(path)]


def _glob_below(root: str, pattern: str) -> Iterator[str]:
    """The files below a local folder of a pattern with **. Each folder is entered once, by the shortest way: a link to
    one above it would lead to every file again, and two such links to countless names.
    """
    matches = re.compile(glob_translate(re.sub(r"(?<=[^/])\*\*+|\*\*+(?=[^/])", "*", pattern))).match
    # A first part without a pattern is not there.
    folders = deque([""] if re.match(r"[^/]*[*?\[]", pattern) else [])
    seen: set[str] = set()
    while folders:
        folder = folders.popleft()
        real = os.path.realpath(os.path.join(root, folder))
        if real in seen or not os.path.isdir(real):
            continue
        seen.add(real)
        for name in sorted(os.listdir(real)):
            path = os.path.join(folder, name)
            if name.startswith("."):
                continue
            if os.path.isdir(os.path.join(root, path)):
                folders.append(path)
            elif matches(path):
                yield path


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What lies directly in a folder, each kind sorted. Symbolic links count as what they point to."""

    files: list[str] = field(default_factory=list)
    """Locations; also of links that lead nowhere, which cannot be opened."""
    folders: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    """Names of what is neither: pipes, sockets, devices."""
    hidden: int = 0
    """Number of names that begin with a dot, which are left out above."""


def list_folder(location: str) -> Listing:
    """What lies directly in a folder. Raises DataError."""
    fs, path = filesystem(location)
    try:
        entries = fs.ls(path, detail=True)
    except Exception as error:
        raise DataError(
            "This folder cannot be listed.",
            where=location,
            got=one_line(error)[:300],
            fix="check its owner and mode, or the address and the credentials",
        ) from error
    base = location.rstrip("/")
    files, folders, others, hidden = [], [], [], 0
    for entry in sorted(entries, key=lambda entry: str(entry["name"])):
        name = PurePosixPath(entry["name"]).name
        place = f"{base}/{name}"
        # A listing shows the link, opening follows it: what it leads to decides.
        if name.startswith("."):
            hidden += 1
        elif entry["type"] == "directory":
            folders.append(place)
        elif entry["type"] == "file" or fs.isfile(entry["name"]) or broken_link(place) is not None:
            files.append(place)
        elif fs.isdir(entry["name"]):
            folders.append(place)
        else:
            others.append(name)
    return Listing(files=files, folders=folders, others=others, hidden=hidden)


def shard_names(locations: Sequence[str]) -> list[str]:
    """One name for each location, unique among them: the first of its `possible_names` that tells all apart."""
    for names in zip(*map(possible_names, locations), strict=True):
        if len(set(names)) == len(names):
            return list(names)
    raise DataError("A file is named twice.", where=", ".join(map(shown, locations)), fix="name each file once")


def possible_names(location: str) -> tuple[str, str, str]:
    """What a file may be called, safe in any file system: its stem, that with the folder, that with a digest of the
    whole location."""
    location = shown(location)  # another password is no other name
    path = PurePosixPath(location)
    with_folder = _safe(f"{path.parent.name}-{path.stem}")
    return _safe(path.stem), with_folder, f"{with_folder}-{_digest(location)}"


def read_as(fingerprint: str, reading: Reading) -> str:
    """The fingerprint of a file that is read in some way: other columns make other rows of the same bytes."""
    if not reading.identity:
        return fingerprint
    return hashlib.blake2b(f"{fingerprint} {reading.identity}".encode(), digest_size=16).hexdigest()


def _safe(text: str) -> str:
    safe = re.sub(r"[^A-Za-z0-9._-]|^\.", "_", text)[:100]
    # Two names that differ in a replaced character must not become one.
    return safe if safe == text else f"{safe}-{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=4).hexdigest()
