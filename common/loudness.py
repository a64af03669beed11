"""-v and -q, of every command: how much it says."""

import logging
from typing import Any

import typer
from typer.core import TyperGroup

from inpo.common.log import set_level


class Root(TyperGroup):
    """The front door's group, whose commands, however deep, have both options, and so has the group itself."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        _add(self, _options())


def _add(command: Any, options: list[Any]) -> None:
    command.params = [*command.params, *options]
    for each in getattr(command, "commands", {}).values():
        _add(each, options)


def _options() -> list[Any]:
    """Both, as Typer makes them for a command of no other use."""
    only = typer.Typer(add_completion=False)

    @only.command()
    def command(
        verbose: bool = typer.Option(
            False,
            "-v",
            "--verbose",
            help="Say more, and show the traceback of an error.",
            show_default=False,
            expose_value=False,
            is_eager=True,
            callback=_louder,
        ),
        quiet: bool = typer.Option(
            False,
            "-q",
            "--quiet",
            help="Say warnings and errors alone.",
            show_default=False,
            expose_value=False,
            is_eager=True,
            callback=_quieter,
        ),
    ) -> None:
        raise NotImplementedError

    return list(typer.main.get_command(only).params)


def _louder(given: bool) -> None:
    if given:
        set_level(logging.DEBUG)


def _quieter(given: bool) -> None:
    if given:
        set_level(logging.WARNING)
