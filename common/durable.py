"""Writing whole or not at all: a file or folder gets its name when every byte of it is on disk, or never.

What is written is staged beside its target under a hidden name, flushed with its folders, and renamed. A write that
fails or is interrupted removes what it staged; a write that is killed leaves it, and the next one in that folder takes
it away. A disk that refuses is one StorageError, the same everywhere.
"""

import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from obstore.exceptions import BaseError
from safetensors import SafetensorError

from inpo.common.errors import InpoError, StorageError, UsageError, refused

_LINE_BYTES = 1 << 24
_LOCK = ".lock"
_STAGED = re.compile(r"\..+\.partial-[0-9a-f]{16}")


@contextmanager
def storage_errors(action: str, where: object) -> Iterator[None]:
    """Turn what a disk or an object store refuses into one StorageError that says what was being done and where.

    That is an OSError, an error of obstore (whose passing faults have been retried with backoff before they arrive
    here), or an error of a library that has the system's number in its text.
    """
    try:
        yield
    except InpoError:
        raise
    except OSError as error:
        named = error.filename  # a staged file has a name that nobody knows
        hidden = named is None or any(_STAGED.fullmatch(part) for part in Path(os.fsdecode(named)).parts)
        raise refused(action, where if hidden else named, error.errno, str(error)) from error
    except (BaseError, SafetensorError, RuntimeError) as error:
        lines = str(error).strip().splitlines()
        # obstore and safetensors wrap the system's error in their text.
        system = re.search(r"\(os error (\d+)\)", str(error))
        if system:
            raise refused(action, where, int(system[1]), lines[0]) from error
        if not isinstance(error, BaseError):
            raise
        raise StorageError(
            f"Could not {action}.",
            where=where,
            got=(lines[0] if lines else type(error).__name__)[:300],
            fix="check the address, the credentials and the free space, then run the same command again: "
            "what is committed stays",
        ) from error


def write_file(path: Path, data: bytes | str, *, action: str = "write") -> None:
    """Write a file (a text as UTF-8) and the folders above it. An older file of that name is replaced.

    A link is followed; what is no file (a pipe, a terminal) is written to as it is. Raises StorageError, whose first
    line says "Could not `action`".
    """
    with storage_errors(action, path), _staged_file(path) as staged:
        staged.write_bytes(data.encode() if isinstance(data, str) else data)


def refuse_other_file(out: Path, *, what: str, is_own: Callable[[bytes], bool]) -> None:
    """Raise UsageError if `out` is a file whose first line says that no earlier call wrote it: it may be the user's."""
    if not out.is_file():
        return
    with storage_errors(f"write the {what}", out), out.open("rb") as stream:
        first = stream.readline(_LINE_BYTES)
    if first and not is_own(first):
        raise UsageError(
            f"This file is there already, and is no {what}.",
            where="--out",
            expected=f"a new file, or a {what} that an earlier call wrote",
            got=out,
            fix="name another file",
        )


@contextmanager
def new_file(path: Path, *, action: str = "write") -> Iterator[Path]:
    """Yield the name of an empty file for a library to fill; at the end of the block it becomes `path`."""
    with storage_errors(action, path):
        remove_leftovers(path.parent)
        with _staged_file(path) as staged:
            yield staged


@contextmanager
def new_folder(path: Path, *, replace: bool = False, action: str = "write") -> Iterator[Path]:
    """Yield an empty folder to fill; at the end of the block it becomes `path`.

    `path` is absent or an empty folder, or, with `replace`, a folder that goes away once the new one is in its place.
    """
    with storage_errors(action, path):
        remove_leftovers(path.parent)
        with _staged(path, Path.mkdir, replace=replace) as staged:
            yield staged


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, their names on disk. Raises OSError."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        flush(each.parent)


def flush(path: Path | str) -> None:
    """Wait until a file's bytes, or a folder's names, are on disk. Raises OSError.

    A folder that may be entered and not listed cannot be waited for; its names are on disk when the system writes them.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        if os.path.isdir(path):
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers staged in `folder`; what a living one has staged is locked, and stays."""
    with suppress(OSError):
        for entry in [each for each in folder.iterdir() if _STAGED.fullmatch(each.name)]:
            with suppress(OSError):
                lock = _lock(entry, sweep=True)
                try:
                    remove(entry)
                finally:
                    os.close(lock)


def entries(folder: Path) -> list[str]:
    """Names of what lies in `folder`, sorted; none where there is no folder. Its lock is none of them, what is being
    staged there is not yet there, and what killed writers staged is removed.
    """
    remove_leftovers(folder)
    with storage_errors("list", folder):
        return (
            sorted(each.name for each in folder.iterdir() if each.name != _LOCK and not _STAGED.fullmatch(each.name))
            if folder.is_dir()
            else []
        )


@contextmanager
def _staged_file(path: Path) -> Iterator[Path]:
    if path.exists() and not path.is_file():  # to a folder the system says what it has to say
        yield path
    else:
        with _staged(path, Path.touch) as staged:
            yield staged


@contextmanager
def _staged(path: Path, make: Callable[[Path], None], *, replace: bool = False) -> Iterator[Path]:
    target = Path(os.path.realpath(path))
    make_folder(target.parent)
    while True:
        staged = _beside(target)
        make(staged)
        try:
            lock = _lock(staged)
            break
        except FileNotFoundError:  # another's sweep came before the lock
            pass
    try:
        yield staged
        for each in [*staged.rglob("*"), staged]:
            flush(each)
        if replace and target.exists():
            _exchange(staged, target)
        else:
            os.replace(staged, target)
    except BaseException:
        with suppress(OSError):  # the error that matters is the one before
            remove(staged)
        raise
    finally:
        os.close(lock)
    flush(target.parent)


def _exchange(staged: Path, target: Path) -> None:
    """Put a folder in another's place: no system call does it for folders that are not empty."""
    old, lock = _beside(target), _lock(target)  # under that name another's sweep would take it
    try:
        os.replace(target, old)
        try:
            os.replace(staged, target)
        except BaseException:
            os.replace(old, target)
            raise
        remove(old)
    finally:
        os.close(lock)


def _beside(target: Path) -> Path:
    # The beginning of its name, for people: the whole and what is added may be longer than a name can be.
    return target.with_name(f".{target.name[:50]}.partial-{uuid.uuid4().hex[:16]}")


def _lock(path: Path, *, sweep: bool = False) -> int:
    """The handle that holds the lock which tells a living writer from a dead one. Raises FileNotFoundError if another's
    sweep has taken away what was to be locked.

    A writer waits for the end of a sweep, and on a network file system without locks goes on without one. A `sweep`
    waits for nobody: OSError is raised if another holds the lock, or where there are none.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if sweep else 0))
        except OSError:
            if sweep:
                raise
        os.stat(path)  # no staged name comes twice: if it is there, it is what was locked
    except BaseException:
        os.close(handle)
        raise
    return handle


@contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock; False if another process holds it. It goes with the process, however that ends. A file
    system without locks tells nobody apart. Raises OSError.
    """
    handle, alone = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666), True
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            alone = False
        except OSError:
            pass
        yield alone
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link and not what it names. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
