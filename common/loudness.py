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
