"""~ in paths, expanded once, where settings and options are parsed."""

import os
import re
from pathlib import Path
from typing import Any, TypeVar

from inpo.common.errors import UsageError

_Place = TypeVar("_Place", bound=str | Path)


def expand_home(place: _Place) -> _Place:
    """A path or address with ~ and ~user at its beginning replaced by the home folder; all else stays as it is.

    Paths go through libraries of which some expand and some make a folder named ~, so it is done here, once. A folder
    of that name is ./~. Raises ValueError for a user without a home.
    """
    scheme, path = re.match(r"(file://)?(.*)", str(place), flags=re.DOTALL).groups("")  # type: ignore[union-attr]
    if not path.startswith("~"):
        return place
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"there is no home folder for {path.partition('/')[0]}")
    return type(place)(scheme + expanded)


def home(value: Any) -> Any:
    """typer's callback for every option and argument that is a path and no setting of a section: `expand_home`."""
    try:
        return expand_home(value) if isinstance(value, str | Path) else value
    except ValueError as error:
        raise UsageError("A path cannot be expanded.", where=value, got=str(error), fix="write the path out") from None
