"""What every command has: -v and -q, how much it says, and help whose names of options are whole."""

import logging
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

from inpo.common.log import set_level


class Root(TyperGroup):
    """The front door's group, whose commands, however deep, have both options and such help, and so has the group
    itself."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        _add(self, _options())


def _add(command: Any, options: list[Any]) -> None:
    command.params = [*command.params, *options]
    command.format_help = _whole_names(command, command.format_help)
    for each in getattr(command, "commands", {}).values():
        _add(each, options)


def _whole_names(command: Any, show: Callable[..., None]) -> Callable[..., None]:
    """`show` with the name that turns an option off below the one that turns it on. typer has columns for both side by
    side, and cuts them both where 80 columns do not hold them."""

    def format_help(*arguments: Any) -> None:
        names = [(each, each.opts, each.secondary_opts) for each in command.params]
        for each, on, off in names:
            each.opts, each.secondary_opts = (["\n".join([*on, *off])], []) if off else (on, off)
        try:
            show(*arguments)
        finally:
            for each, on, off in names:
                each.opts, each.secondary_opts = on, off

    return format_help


def _options() -> list[Any]:
    """Both, as Typer makes them for a command of no other use."""
    only = typer.Typer(add_completion=False)

    @only.command()
    def command(
        verbose: bool = _option("--verbose", "Say more, and show the traceback of an error.", logging.DEBUG),
        quiet: bool = _option("--quiet", "Say warnings and errors alone.", logging.WARNING),
    ) -> None:
        raise NotImplementedError

    return list(typer.main.get_command(only).params)


def _option(name: str, text: str, level: int) -> Any:
    def given(is_given: bool) -> None:
        if is_given:
            set_level(level)

    shown: dict[str, Any] = {"help": text, "show_default": False, "expose_value": False, "is_eager": True}
    return typer.Option(False, name[1:3], name, callback=given, **shown)
