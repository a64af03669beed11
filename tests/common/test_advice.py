"""Every command line that a message advises is one that the command line takes, whatever paths it is filled with."""

import ast
import math
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import typer

import inpo
from inpo.cli import app
from inpo.common.errors import command

PACKAGE = Path(inpo.__file__).parent
VALUE = "1"
"""Stands for what is not known before the run: a path, a name, a number."""


def lines_of(file: Path) -> Iterator[str]:
    """Command lines in a file's strings: `inpo ...` between ticks, and calls of command(...)."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "command":
            yield "inpo " + " ".join(_text(word) for word in node.args)
        elif isinstance(node, ast.Constant | ast.JoinedStr):
            yield from re.findall(r"`(inpo [^`]*)`", _text(node))


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    return "" if isinstance(node, ast.Starred) else VALUE


@cache
def advised() -> list[str]:
    files = [file for part in sorted(PACKAGE.iterdir()) if part.is_dir() for file in sorted(part.rglob("*.py"))]
    return sorted({line for file in files for line in lines_of(file)})


@cache
def command_line() -> Any:
    return typer.main.get_command(app)


def refusal(line: str) -> str | None:
    """What the command line has against a line. "..." stands for options that are left out, an option at the end of a
    line for itself."""
    words = [word for word in shlex.split(line)[1:] if word != "..."]
    found = command_line()
    while hasattr(found, "commands"):
        if not words:
            return None
        if words[0] not in found.commands:
            return f"no command {words[0]}"
        found = found.commands[words.pop(0)]
    options = {name: each for each in found.params for name in (*each.opts, *each.secondary_opts)}
    arguments = [each.nargs for each in found.params if each.param_type_name == "argument"]
    places = math.inf if -1 in arguments else sum(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            places -= 1
        elif word != "--help" and word not in options:
            return f"no option {word}"
        elif word != "--help" and not options[word].is_flag and words and words.pop(0).startswith("--"):
            return f"no value for {word}"
    return "too many words" if places < 0 else None


def test_there_are_such_lines() -> None:
    assert len(advised()) > 15
    assert refusal("inpo train --no-such-option 1") is not None
    assert refusal("inpo nothing") is not None
    assert refusal("inpo train --cache --model m") is not None
    assert refusal("inpo inspect verify a b") is not None


def test_every_advised_line_is_one_that_the_command_line_takes() -> None:
    assert {line: why for line in advised() if (why := refusal(line)) is not None} == {}


def test_paths_with_blanks_stay_one_word() -> None:
    assert shlex.split(command("inspect", "verify", "/my data/it's $HOME", "--quarantine")) == [
        "inpo",
        "inspect",
        "verify",
        "/my data/it's $HOME",
        "--quarantine",
    ]
