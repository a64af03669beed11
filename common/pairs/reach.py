"""What a row of a list may name, and its bytes.

A list may be anybody's. A row names files below the list's own folder; another folder, another host or any other
address only with --allow-remote. Only regular files are opened, no image is read beyond its limit, whatever size it
announces, and a host has so many seconds to answer. A file that is not there may be in an archive on the way to it.
"""

import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from inpo.common.errors import DataError
from inpo.common.pairs.archive import read_member
from inpo.common.pairs.archives import Archives
from inpo.common.pairs.files import OBJECT_STORES, PASSING, filesystem, is_local, is_refusal, one_line
from inpo.common.pairs.pair import MAX_IMAGE_BYTES, RowProblem, check_text, too_large
from inpo.common.printable import shown, shown_message

SECONDS_PER_IMAGE = 30.0
"""A host that has not sent an image by then counts as unreachable."""
TRIES = 3
_SECONDS_TO_NEXT_TRY = 0.5
ROWS_PER_SILENT_HOST = 3
"""Images that are waited for at a host that gives none; the others of these rows are not asked for."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_LOCAL_SCHEMES = ("file", "local")
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class _Unreachable(Exception):
    """A host is in trouble, or is none."""


class _Refused(Exception):
    """A host says that this one object is not to be had."""


class _Elsewhere(Exception):
    """A host sends the request on to another one, which it names."""


class Reach:
    """Reads the images of some rows of one list, and counts how the hosts behave."""

    def __init__(self, list_file: str, *, allow_remote: bool) -> None:
        self._allow_remote = allow_remote
        self._folder = list_file.rpartition("/")[0] or ("/" if list_file.startswith("/") else ".")
        fs, inner = filesystem(list_file)
        self._local_folder = os.path.dirname(inner) if is_local(fs) else None
        self._own_folder = PurePosixPath(inner).stem
        self._archives = Archives(root=self._local_folder or self._folder, allowed=self._is_allowed)
        self._silent: dict[str, int] = {}
        self.num_read = 0
        self.last_unreachable: RowProblem | None = None

    def image(self, value: object, side: str) -> bytes | None:
        """The bytes of an image as a row has it: bytes, a `{bytes, path}` struct, or the name of a file or an address.
        Raises RowProblem.
        """
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if isinstance(data, bytes):
            return data
        named = path if data is None else data
        return None if named is None else self.read(named, side)

    def read(self, path: object, side: str) -> bytes:
        """The bytes of the image that a row names. Raises RowProblem."""
        path = check_text(path, what=side, missing="missing_image")
        if not path:
            raise RowProblem(reason="missing_image", detail=f"{side} is empty")
        scheme = _SCHEME.match(path)
        if scheme and scheme[0][:-3].lower() in _LOCAL_SCHEMES:
            data = self._read_local(
                LocalFileSystem._strip_protocol(scheme[0].lower() + path[scheme.end() :]), side, path
            )
        elif scheme:
            data = self._read_remote(scheme[0].lower() + path[scheme.end() :], side)
        elif self._local_folder is None and not path.startswith("/"):
            # A file's name, not a part of an address: in it ? and % are letters like others.
            name = quote(path) if self._folder.startswith(("http://", "https://")) else path
            data = self._read_remote(f"{self._folder}/{name}", side)
        else:
            data = self._read_local(path, side, path)
        self.num_read += 1
        return data

    def refuse_outage(self, list_file: str) -> None:
        """Raise DataError if hosts failed and not one image was read: nothing is lost by trying all rows again."""
        if self.last_unreachable is not None and not self.num_read:
            raise DataError(
                "No image of these rows could be fetched.",
                where=list_file,
                got=self.last_unreachable.detail,
                fix="check the network and the addresses, then run again; nothing of this shard is kept",
            )

    def _read_local(self, path: str, side: str, named: str) -> bytes:
        if self._local_folder is None:
            raise RowProblem(
                reason="not_allowed", detail=f"{side}: {shown(named)} is a local file, and the list is not"
            )
        missing = f"{side}: no file {named}{_name_hint(path)}"
        if "\0" in path:
            raise RowProblem(reason="missing_image", detail=missing)
        # HPDv2 has images of test.json in test/, and names them as if the list were there.
        for place in (path, os.path.join(self._own_folder, path)):
            real = os.path.realpath(os.path.join(self._local_folder, place))
            if not self._allow_remote and not _is_below(real, self._local_folder):
                raise RowProblem(
                    reason="not_allowed",
                    detail=f"{side}: {named} lies outside the list's folder; --allow-remote reads it",
                )
            try:
                return _read_regular(real, side, named)
            except (FileNotFoundError, NotADirectoryError):
                inside = os.path.relpath(os.path.join(self._local_folder, place), self._local_folder)
                data = self._read_packed(inside, side)
                if data is not None:
                    return data
            except OSError as error:  # no permission, a name too long: this image, not the source
                detail = f"{side}: {error.strerror or error}: {named}"
                raise RowProblem(reason="missing_image", detail=detail) from None
        raise RowProblem(reason="missing_image", detail=missing + self._archives.not_looked_into)

    def _read_packed(self, inside: str, side: str) -> bytes | None:
        """An image out of an archive beside the list or in a folder on the way to the image; None if none has it.
        Raises RowProblem, also where two have it, and DataError if the archive that may have it cannot be read.
        """
        if self._folder.startswith(("http://", "https://")):  # which cannot be listed
            return None
        member = self._archives.find(inside)
        return None if member is None else read_member(member, f"{side}: {inside}")

    def _is_allowed(self, file: str) -> bool:
        here = self._local_folder
        return self._allow_remote or here is None or _is_below(os.path.realpath(file), here)

    def _read_remote(self, address: str, side: str) -> bytes:
        if "::" in address and address.partition("://")[0] not in OBJECT_STORES:  # fsspec would follow both
            raise RowProblem(reason="not_allowed", detail=f"{side}: {shown(address)} joins two addresses")
        if not self._allow_remote and (self._local_folder is not None or not _is_below_address(address, self._folder)):
            raise RowProblem(
                reason="not_allowed",
                detail=f"{side}: {shown(address)} lies outside the list's folder; --allow-remote fetches it",
            )
        host = "/".join(address.split("/", 3)[:3])
        if self._silent.get(host, 0) >= ROWS_PER_SILENT_HOST:
            raise self._unreachable(f"{side}: {shown(host)} did not answer for the rows before")
        try:
            data = _fetch(address, redirects=self._allow_remote)
        except DataError as error:  # an unknown scheme
            raise self._unreachable(f"{side}: {shown_message(f'{address}: {error.got}')}") from None
        except _Elsewhere as error:
            raise RowProblem(
                reason="not_allowed", detail=f"{side}: {shown(address)} is sent on to {error}; --allow-remote follows"
            ) from None
        except _Unreachable as error:
            self._silent[host] = self._silent.get(host, 0) + 1
            raise self._unreachable(f"{side}: {shown_message(f'{address}: {error}')}") from None
        except (_Refused, FileNotFoundError) as error:
            packed = self._fetch_packed(address, side)
            if packed is None:
                self._silent[host] = 0
                raise RowProblem(
                    reason="missing_image",
                    detail=f"{side}: refused {shown_message(f'{address}: {error}')}{self._archives.not_looked_into}",
                ) from None
            data = packed
        self._silent[host] = 0
        if len(data) > MAX_IMAGE_BYTES:
            raise too_large(f"{side}: {shown(address)}")
        return data

    def _fetch_packed(self, address: str, side: str) -> bytes | None:
        """As `_read_packed`, of an image that is named by its address."""
        if not address.startswith(f"{self._folder}/"):
            return None
        found: list[bytes | None] = []

        def unpack() -> bytes:
            found.append(self._read_packed(address.removeprefix(f"{self._folder}/"), side))
            return b""

        try:
            _within(SECONDS_PER_IMAGE, unpack)
        except (RowProblem, DataError):
            raise
        except Exception as error:  # every file system has exceptions of its own
            raise self._unreachable(f"{side}: {shown_message(f'{address}: {one_line(error)}')}") from None
        return found[0]

    def _unreachable(self, detail: str) -> RowProblem:
        self.last_unreachable = RowProblem(reason="unreachable", detail=detail[:500])
        return self.last_unreachable


def _name_hint(path: str) -> str:
    """What is likely wrong with a name that no file has."""
    if path.startswith("~"):
        return " (~ is not expanded in a list)"
    if "\\" in path:
        return " (a backslash separates no folders here: write /)"
    return " (it begins or ends with a blank)" if path != path.strip() else ""


def _is_below(real: str, folder: str) -> bool:
    """Whether a path without links lies below `folder`, or where the hub's client keeps the files of this snapshot."""
    root = os.path.realpath(folder)
    roots = [root]
    # REPOSITORY/snapshots/REVISION/pairs.jsonl is a link into REPOSITORY/blobs, and so are the images.
    repository = re.match(r"(.+)/snapshots/[0-9a-f]{40}(?:/|$)", root)
    if repository:
        roots.append(f"{repository[1]}/blobs")
    return any(real.startswith(each.rstrip("/") + "/") for each in roots)


def _is_below_address(address: str, folder: str) -> bool:
    """Whether an address lies below another on the same host."""
    try:
        here, there = urlsplit(folder), urlsplit(address)
        same = here.scheme.lower() == there.scheme and here.netloc.rpartition("@")[2] == there.netloc.rpartition("@")[2]
    except ValueError:
        return False
    path = there.path
    while (plain := unquote(path)) != path:
        path = plain
    return same and path.startswith(here.path.rstrip("/") + "/") and ".." not in re.split(r"[/\\]", path)


def _read_regular(file: str, side: str, named: str) -> bytes:
    """Bytes of a regular file, at most one above the limit. Raises OSError and RowProblem."""
    _refuse_special(os.stat(file), side, named)
    # It may be another file by now: never wait for a pipe's other end, never follow a link.
    handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as stream:
        status = os.fstat(handle)
        _refuse_special(status, side, named)
        if status.st_size > MAX_IMAGE_BYTES:
            raise too_large(f"{side}: {named}", status.st_size)
        # Files of the kernel have no size and may have no end.
        data = stream.read(status.st_size + 1) if status.st_size else b""
        if len(data) > MAX_IMAGE_BYTES:
            raise too_large(f"{side}: {named}")
        return data


def _refuse_special(status: os.stat_result, side: str, named: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((word for test, word in _KINDS if test(status.st_mode)), "no file")
        raise RowProblem(reason="missing_image", detail=f"{side}: {named} is {kind}")


def _fetch(address: str, *, redirects: bool) -> bytes:
    """An image from another machine, at most one part above the limit, in bounded time.

    Raises _Unreachable, _Refused, _Elsewhere, and DataError for a scheme that cannot be opened.
    """
    scheme = address.partition("://")[0]
    tries = TRIES
    if scheme in ("http", "https"):
        fetch: Callable[[], bytes] = partial(_fetch_web, address, redirects=redirects)
    elif scheme in OBJECT_STORES:
        fetch, tries = partial(_fetch_object, address), 1  # it tries again by itself
    else:
        fetch = partial(_fetch_other, *filesystem(address))  # here: fsspec makes one for each thread

    def try_again() -> bytes:
        for number in range(1, tries):
            try:
                return fetch()
            except _Unreachable:
                time.sleep(_SECONDS_TO_NEXT_TRY * number)
        return fetch()

    return _within(SECONDS_PER_IMAGE, try_again)


def _fetch_web(address: str, *, redirects: bool) -> bytes:
    import requests  # here, as most lists name files

    try:
        with requests.get(
            address, stream=True, timeout=(SECONDS_PER_IMAGE / 3, SECONDS_PER_IMAGE), allow_redirects=redirects
        ) as answer:
            status = answer.status_code
            if answer.is_redirect:
                raise _Elsewhere(urlsplit(answer.headers["location"]).hostname or "another address")
            if status >= 500 or status in PASSING:
                raise _Unreachable(f"status {status}")
            if status >= 400:
                raise _Refused(f"status {status}")
            return _bounded(answer.iter_content(1 << 16))
    except (requests.RequestException, OSError, ValueError) as error:
        if isinstance(error, ValueError) and not isinstance(error, requests.ConnectionError | requests.Timeout):
            raise _Refused(one_line(error)) from None  # an address that is none
        raise _Unreachable(one_line(error)) from None


@lru_cache(maxsize=64)
def _bucket(root: str) -> Any:
    from obstore.store import from_url

    # No client options: they would take the place of those from the environment.
    retry_timeout = timedelta(seconds=SECONDS_PER_IMAGE / 2)
    return from_url(root, retry_config={"max_retries": TRIES - 1, "retry_timeout": retry_timeout})


def _fetch_object(address: str) -> bytes:
    import obstore
    from obstore.exceptions import InvalidPathError

    scheme, _, rest = address.partition("://")
    bucket, _, key = rest.partition("/")
    try:
        return _bounded(bytes(part) for part in obstore.get(_bucket(f"{scheme}://{bucket}"), key).stream())
    except Exception as error:
        # A name that no key has, as one with //, is nobody's trouble, and no later run helps.
        refused = isinstance(error, ValueError | InvalidPathError) or is_refusal(error)
        raise (_Refused if refused else _Unreachable)(one_line(error)) from None


def _fetch_other(fs: AbstractFileSystem, inner: str) -> bytes:
    if is_local(fs):
        raise _Refused("a local file")
    try:
        with fs.open(inner, "rb") as stream:
            return bytes(stream.read(MAX_IMAGE_BYTES + 1))
    except Exception as error:  # every file system has exceptions of its own
        raise (_Refused if is_refusal(error) else _Unreachable)(one_line(error)) from None


def _bounded(parts: Iterable[bytes]) -> bytes:
    """The parts joined, until the limit is passed."""
    data = bytearray()
    for part in parts:
        data += part
        if len(data) > MAX_IMAGE_BYTES:
            break
    return bytes(data)


def _within(seconds: float, work: Callable[[], bytes]) -> bytes:
    """What `work` gives, in a thread that is left behind when time is up: not every library has a limit on the whole
    of an answer. Raises _Unreachable then."""
    found: list[bytes | Exception] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, name="fetch", daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        raise _Unreachable(f"no whole answer in {seconds:g} s")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]
