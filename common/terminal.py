"""Standard output and error that escape what is printed to them, and rich's console with the same escapes.

A prompt, an id or a file's name may hold codes that a terminal obeys: the front door puts this between them.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.segment import Segment

from inpo.common.printable import escaped

_BARS = re.compile(r"\r|(?:\x1b\[A)+$")
"""How the libraries' progress bars begin a write: back to the line's start, or a move up and nothing else."""


class _EscapingStream:
    """A text stream that escapes what is written to it."""

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream
        """rich looks for this name: it writes codes of its own, and `console` escapes what is between them."""

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
    """From here on standard output and error escape what is printed, whoever prints it."""
    sys.stdout, sys.stderr = _EscapingStream(sys.stdout), _EscapingStream(sys.stderr)  # type: ignore[assignment]


def console(*, stderr: bool = False) -> Console:
    """A rich console that escapes the texts it is given, not its own codes."""
    made = Console(stderr=stderr)
    made.push_render_hook(_Escape())
    return made


class _Escape(RenderHook):
    """rich's hook before anything is rendered."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Escaped(renderable) for renderable in renderables]


class _Escaped:
    def __init__(self, renderable: ConsoleRenderable) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self._renderable, options):
            yield segment if segment.control else Segment(escaped(segment.text), segment.style)
