"""The errors a user can meet, as one small tree.

    InpoError                     exit code 1
    ├── UsageError(ValueError)    exit code 2: options that contradict each other or are out of range
    ├── DataError(ValueError)     a pair source that cannot be read
    ├── ModelError(ValueError)    a model that cannot be loaded or is not supported
    ├── StorageError(OSError)     a disk or an object store that refuses: full, read-only, unreachable
    ├── OutOfMemory(MemoryError)  a device, or this machine, whose memory is too small for what was asked
    ├── TrainingError(RuntimeError)   a run that cannot go on: not finite, no records, wrong checkpoint
    └── CacheError
        ├── CacheMissing(FileNotFoundError)   no cache, or no committed pair in it
        ├── CacheMismatch(ValueError)         the cache's identity is not the one asked for
        ├── CacheIncomplete(LookupError)      a tensor, pair or label set that this cache does not hold
        ├── CacheCorrupt(OSError)             bytes that are not the committed ones
        └── CacheSchemaError(ValueError)      a manifest or commit this version cannot read

Each message tells what, where, expected, got, and what to do. The front door prints it without a traceback. Addresses
in it are shown without their secrets, and what a terminal would obey is escaped.
"""

import errno
import os
import shlex

from inpo.common.printable import escaped, shown_message


def command(*words: object) -> str:
    """A command line as a shell takes it, whatever blanks and signs its paths have: `inpo ...`, without the ticks."""
    return shlex.join(["inpo", *map(str, words)])


class InpoError(Exception):
    """Base of every error a user can meet.

    `what` is one sentence, `fix` what to do; the parts are printed one a line.
    """

    exit_code = 1

    def __init__(
        self, what: str, *, where: object = None, expected: object = None, got: object = None, fix: str
    ) -> None:
        self.what = what
        self.where = where
        self.expected = expected
        self.got = got
        self.fix = fix
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [self.what]
        for name, value in (("where", self.where), ("expected", self.expected), ("got", self.got)):
            if value is not None:
                lines.append(f"  {name + ':':<10}{escaped(str(value), line=True)}")
        lines.append(f"  {'to do:':<10}{self.fix}")
        return escaped(shown_message("\n".join(lines)))

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling, and errors cross process borders (workers, Ray).
        return (_rebuild, (type(self), self.what, self.where, self.expected, self.got, self.fix))


def _rebuild(kind: type[InpoError], what: str, where: object, expected: object, got: object, fix: str) -> InpoError:
    return kind(what, where=where, expected=expected, got=got, fix=fix)


class UsageError(InpoError, ValueError):
    """Options that contradict each other or are out of range."""

    exit_code = 2


class DataError(InpoError, ValueError):
    """A pair source that cannot be read."""


class ModelError(InpoError, ValueError):
    """A model that cannot be loaded or is not supported."""


class StorageError(InpoError, OSError):
    """A disk or an object store that refuses."""


_ADVICE = {
    errno.ENOSPC: "free some space or choose another folder, then run the same command again: what is committed stays",
    errno.EDQUOT: "raise the quota or choose another folder, then run the same command again: what is committed stays",
    errno.EFBIG: "raise the file size limit (ulimit -f), then run the same command again: what is committed stays",
    errno.EROFS: "the file system is read-only; choose a folder you can write to",
    errno.EACCES: "check the owner and mode of the folder",
    errno.EPERM: "check the owner and mode of the folder",
    errno.EISDIR: "a folder has that name: choose another path, or name a file in it",
    errno.ENOTDIR: "a file lies where a folder is needed: choose another path",
    errno.EEXIST: "a file, or a link that leads nowhere, lies where a folder is needed: choose another path",
}


def refused(action: str, where: object, code: int | None, text: str) -> StorageError:
    """What to say of a system's refusal, by its number, or where there is none by its text."""
    return StorageError(
        f"Could not {action}: {os.strerror(code) if code else text}.",
        where=where,
        fix=_ADVICE.get(code or 0, "check the folder, then run the same command again: what is committed stays"),
    )


class OutOfMemory(InpoError, MemoryError):
    """A device, or this machine, whose memory is too small for what was asked."""


class TrainingError(InpoError, RuntimeError):
    """A training run that cannot go on."""


class CacheError(InpoError):
    """Base of everything that is wrong with a cache."""


class CacheMissing(CacheError, FileNotFoundError):
    """No cache there, or no committed pair in it."""


class CacheMismatch(CacheError, ValueError):
    """The cache's identity is not the one asked for."""


class CacheIncomplete(CacheError, LookupError):
    """A tensor, pair or label set that this cache does not hold."""


class CacheCorrupt(CacheError, OSError):
    """Bytes that are not the committed ones."""


class CacheSchemaError(CacheError, ValueError):
    """A manifest or commit that this version cannot read."""
