"""Whether a file is still what it was.

    state = file_state(file)        before the file is gone through
    with unchanged(file, state):    whenever rows of it are read

Shards find their rows once, and read them by what they found, days later or on another machine.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from inpo.common.errors import DataError
from inpo.common.pairs.files import filesystem, is_local, unreadable_file

_VERSIONS = ("e_tag", "ETag", "etag", "mtime", "last_modified", "LastModified", "created")
"""What file systems call what changes with a file."""


class FileState(NamedTuple):
    """What changes with a file's content."""

    size: int
    version: tuple[str, ...]
    """Of a local file its time; at an address what its host says. No number on a disk: a mounted store gives a file
    another one now and then, and so does another machine."""

    @classmethod
    def now(cls, location: str) -> "FileState":
        """The state that a file is in. Raises whatever its file system raises."""
        fs, path = filesystem(location)
        if is_local(fs):
            found = os.stat(path)
            return cls(found.st_size, (str(found.st_mtime_ns),))
        told = fs.info(path)
        return cls(int(told["size"] or 0), tuple(str(told[name]) for name in _VERSIONS if told.get(name) is not None))


def file_state(location: str) -> FileState:
    """The state that a file is in. Raises DataError."""
    try:
        return FileState.now(location)
    except Exception as error:  # every file system has exceptions of its own
        raise unreadable_file(location, error) from error


@contextmanager
def unchanged(location: str, state: FileState) -> Iterator[None]:
    """A block that reads a file by what was found in it when it was in this state. Raises DataError if it is in another
    one before or after: what is read by an old index are bytes of other rows."""
    refuse_changed(location, state)
    try:
        yield
    except Exception:
        refuse_changed(location, state)  # which would be why
        raise
    refuse_changed(location, state)


def refuse_changed(location: str, state: FileState) -> None:
    """Raise DataError if a file is not in this state any more."""
    if file_state(location) != state:
        raise DataError(
            "This file was written again while it was read.",
            where=location,
            expected="the file that this run began with, on every machine",
            got="another size, time or version",
            fix="let nothing write to it, and run the same command again; what is committed stays",
        )
