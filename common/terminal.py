"""Standard output and error that escape what is printed to them.

A prompt, an id or a file's name may hold codes that a terminal obeys: the front door puts this between them.
"""

import io
import re
import sys
from collections.abc import Iterable
from typing import Any

from inpo.common.printable import escaped

_BARS = re.compile(r"\r|(?:\x1b\[A)+$")
"""How the libraries' progress bars begin a write: back to the line's start, or a move up and nothing else."""


class _EscapingStream:
    """A text stream that escapes what is written to it."""

    def __init__(self, stream: Any) -> None:
        self.rich_proxied_file = stream
        """rich looks for this name: it writes codes of its own, and console.py escapes what is between them."""

    def write(self, text: str) -> int:
        begin = _BARS.match(text)
        kept = begin[0] if begin else ""
        self.rich_proxied_file.write(kept + escaped(text[len(kept) :]))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


def escape_streams() -> None:
    """From here on standard output and error escape what is printed, whoever prints it. What the terminal's encoding
    has no sign for is escaped too, as Python does on standard error.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = _EscapingStream(sys.stdout), _EscapingStream(sys.stderr)
