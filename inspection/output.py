"""The file a command writes: refused before the work, if it cannot be written, and written whole."""

import errno
import os
from pathlib import Path

from inpo.common.durable import refuse_other_file, storage_errors, write_file
from inpo.common.errors import UsageError


def refuse_output(out: Path, *, what: str, suffix: str | None = None, begins: bytes = b"") -> None:
    """Raise StorageError if `out` cannot be written (a folder, below a file, no permission), so that nobody waits for
    it.

    Raises UsageError for a name that promises another format than `suffix`, and for a file that begins otherwise than
    what is written. Nothing is made or changed.
    """
    if suffix is not None and out.suffix and out.suffix.lower() != suffix:
        raise UsageError(
            f"The {what} is written as {suffix.removeprefix('.').upper()}.",
            where="--out",
            expected=f"*{suffix}",
            got=out,
            fix=f"--out {out.with_suffix(suffix)}",
        )
    with storage_errors(f"write the {what}", out):
        if out.is_dir():
            raise _refusal(errno.EISDIR, out)
        parent = out.absolute().parent
        while not os.path.lexists(parent):
            parent = parent.parent
        if not parent.is_dir():
            raise _refusal(errno.ENOTDIR, parent)
        nearest = out if out.exists() else parent
        if not os.access(nearest, os.W_OK):
            is_read_only = os.statvfs(nearest).f_flag & os.ST_RDONLY
            raise _refusal(errno.EROFS if is_read_only else errno.EACCES, out)
    refuse_other_file(out, what=what, is_own=lambda line: line.lower().startswith(begins))


def write_output(out: Path, content: str | bytes, *, what: str) -> None:
    """Write `content` (a text as UTF-8), with the folders above it. Raises StorageError."""
    write_file(out, content, action=f"write the {what}")


def _refusal(code: int, path: Path) -> OSError:
    return OSError(code, os.strerror(code), str(path))
