"""rich's console, escaping what it is given to print as terminal.py does: rich itself lets codes in a text through."""

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.segment import Segment

from inpo.common.printable import escaped


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
