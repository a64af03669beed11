"""What a command tells people: through Python's logging, to standard error and to a file in the run's folder.

    say("...")      INFO      what is done; hidden by -q
    note("...")     WARNING   what a user may not expect
    warn("...")     WARNING   what may go wrong
    fail(error)     ERROR     what went wrong; its traceback is DEBUG: shown by -v, and always in the file

Standard output is for what a command was asked for: tables, JSON, paths. Of several processes the first one speaks.
The logger's name is `inpo`; whoever uses this as a library sets its level and handlers as of any other.
"""

import logging
import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from inpo.common.errors import refused
from inpo.common.printable import escaped, shown_message

LOG_FILE = "log.txt"
_MOST_KEPT = 1000
"""Records from before there is a folder."""


class _Terminal(logging.Handler):
    """Standard error, whatever it is by then: bars and tests put streams of their own in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


class _Kept(logging.Handler):
    """The last records, for a file that is opened later."""

    def __init__(self) -> None:
        super().__init__()
        self.records: deque[logging.LogRecord] = deque(maxlen=_MOST_KEPT)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class _File(logging.FileHandler):
    """A file that ends nothing: when its disk refuses, that is said once, and the rest goes without it."""

    def handleError(self, record: logging.LogRecord) -> None:
        if self in LOGGER.handlers:
            LOGGER.removeHandler(self)
            note(f"{self.baseFilename} cannot be written any more: {sys.exc_info()[1]}")


class _Lines(logging.Formatter):
    """Lines without secrets, also those of a library's errors, and without what a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped(shown_message(super().format(record)))


LOGGER = logging.getLogger("inpo")
_terminal, _kept = _Terminal(logging.INFO), _Kept()
_terminal.setFormatter(_Lines())
LOGGER.setLevel(logging.DEBUG)
LOGGER.propagate = False  # a library that sets up the root logger would repeat every line
LOGGER.addHandler(_terminal)
LOGGER.addHandler(_kept)


def set_level(level: int) -> int:
    """What the terminal gets from here on. Returns what it got before."""
    before = _terminal.level
    _terminal.setLevel(level)
    return before


def is_quiet() -> bool:
    """Whether the terminal gets warnings and errors alone."""
    return _terminal.level > logging.INFO


def say(text: str) -> None:
    """A line about what is done."""
    _log(logging.INFO, text)


def note(text: str) -> None:
    """A line about what a user may not expect."""
    _log(logging.WARNING, f"note: {text}")


def warn(text: str) -> None:
    """A line about what may go wrong."""
    _log(logging.WARNING, f"warning: {text}")


def fail(error: BaseException | str) -> None:
    """What went wrong; from any process."""
    if isinstance(error, BaseException):
        LOGGER.debug("the traceback of the error below:", exc_info=error)
    LOGGER.error("error: %s", error)


def _log(level: int, text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        LOGGER.log(level, "%s", text)


@contextmanager
def log_file(folder: Path | None) -> Iterator[None]:
    """While it is entered, whatever is said goes also to a file in `folder`, behind what is there; what was said before
    comes first. An error that leaves it is written with its traceback. None: no file.

    Raises StorageError if the file cannot be opened.
    """
    if folder is None or os.environ.get("RANK", "0") != "0":
        yield
        return
    try:
        handler = _File(folder / LOG_FILE, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise refused("open the log", folder / LOG_FILE, error.errno, str(error)) from error
    handler.setFormatter(_Lines("%(asctime)s %(levelname)s %(message)s"))
    while _kept.records:
        handler.handle(_kept.records.popleft())
    LOGGER.addHandler(handler)
    try:
        yield
    except Exception as error:
        left = (LOGGER.name, logging.ERROR, __file__, 0, "error: %s", (error,), sys.exc_info())
        handler.handle(LOGGER.makeRecord(*left))
        raise
    finally:
        LOGGER.removeHandler(handler)
        with suppress(OSError):  # of a full disk, which has been said
            handler.close()
        _kept.records.clear()
