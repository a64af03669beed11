"""Paths as users write them, settled once, where settings and options are parsed; and the short names of folders."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from inpo.common.errors import UsageError

_Place = TypeVar("_Place", bound=str | Path)
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""As a path has it, which knows no two slashes."""
_FILE = re.compile(r"\Afile:(//(?=[/~])|(?=/(?!/)))", re.IGNORECASE)


def settled(place: _Place) -> _Place:
    """A path or address in its one spelling: ~ and ~user at its beginning become the home folder, file:///x and file:/x
    the path /x; all else stays as it is.

    Paths go through libraries of which some expand and some make a folder named ~ or file:, so it is done here, once. A
    folder of that name is ./~. Raises ValueError for blanks alone, for a user without a home, for a name that is not
    UTF-8 (manifests, commits and recipes could not hold it) or has a null in it, for an address with one slash, and for
    any where a path on this machine is needed: it would name a folder here, `s3:`.
    """
    if isinstance(place, Path) and _ADDRESS.match(str(place)):
        raise ValueError("this is an address, and here a path on this machine is needed")
    path = _FILE.sub("", str(place))
    if (one_slash := _ADDRESS.match(path)) and not path.startswith("//", one_slash.end() - 1):
        raise ValueError(f"an address has two slashes, and a folder of that name is ./{one_slash[0][:-1]}")
    if path.lower().startswith("file://"):
        raise ValueError("a file on this machine is file:// and its whole path, or the path alone")
    if not path.strip():
        raise ValueError(
            "a path or address is needed, and this is blank, as a variable is that the shell does not have"
        )
    if "\0" in path:
        raise ValueError("a path has no null in it")
    if path.startswith("~"):
        expanded = os.path.expanduser(path)
        if expanded.startswith("~"):
            raise ValueError(f"there is no home folder for {path.partition('/')[0]}")
        path = expanded
    place = type(place)(path)
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("this name is not UTF-8, so nothing that is written down can hold it: rename it") from None
    return place


def home(value: Any) -> Any:
    """typer's callback for every option and argument that is a path or an address, and no setting of a section:
    `settled`. Raises UsageError."""
    try:
        return settled(value) if isinstance(value, str | Path) else value
    except ValueError as error:
        where = str(value).strip() or repr(value)
        raise UsageError("A path cannot be used.", where=where, got=str(error), fix="write another path") from None


def local_path(value: str | Path) -> Path:
    """typer's parser for those that are a path on this machine: `settled` of the text, since a Path takes a blank for
    the working folder. Raises typer's BadParameter, which names the option."""
    try:
        return Path(settled(Path(value) if str(value).strip() else value))
    except ValueError as error:
        from typer import BadParameter

        raise BadParameter(str(error)) from None


def short_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with as many parents as it takes to tell them apart; one folder twice has one name."""
    parts = [folder.resolve().parts for folder in folders]
    length = next(
        n for n in range(1, max(map(len, parts)) + 1) if len({each[-n:] for each in parts}) == len(set(parts))
    )
    return [str(Path(*each[-length:])) for each in parts]
