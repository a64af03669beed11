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


def expand_home(place: _Place) -> _Place:
    """A path or address with ~ and ~user at its beginning replaced by the home folder; all else stays as it is.

    Paths go through libraries of which some expand and some make a folder named ~, so it is done here, once. A folder
    of that name is ./~. Raises ValueError for a user without a home, for a name that is not UTF-8 (manifests, commits
    and recipes could not hold it) or has a null in it, and for an address where a path on this machine is needed: it
    would name a folder here, `s3:`.
    """
    if isinstance(place, Path) and _ADDRESS.match(str(place)):
        raise ValueError("this is an address, and here a path on this machine is needed")
    if "\0" in str(place):
        raise ValueError("a path has no null in it")
    scheme, path = re.match(r"(file://)?(.*)", str(place), flags=re.DOTALL).groups("")  # type: ignore[union-attr]
    if path.startswith("~"):
        expanded = os.path.expanduser(path)
        if expanded.startswith("~"):
            raise ValueError(f"there is no home folder for {path.partition('/')[0]}")
        place = type(place)(scheme + expanded)
    try:
        str(place).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("this name is not UTF-8, so nothing that is written down can hold it: rename it") from None
    return place


def home(value: Any) -> Any:
    """typer's callback for every option and argument that is a path, or a list of them, and no setting of a section:
    `expand_home`."""
    if isinstance(value, list):
        return [home(each) for each in value]
    try:
        return expand_home(value) if isinstance(value, str | Path) else value
    except ValueError as error:
        raise UsageError("A path cannot be used.", where=value, got=str(error), fix="write another path") from None


def short_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with as many parents as it takes to tell them apart; one folder twice has one name."""
    parts = [folder.resolve().parts for folder in folders]
    length = next(
        n for n in range(1, max(map(len, parts)) + 1) if len({each[-n:] for each in parts}) == len(set(parts))
    )
    return [str(Path(*each[-length:])) for each in parts]
