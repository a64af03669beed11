"""Which network LoRA layers were trained over: a file beside them, written by a run, read wherever they are laid."""

import json
from pathlib import Path

from inpo.common.errors import ModelError
from inpo.common.models import Model
from inpo.common.text import read_text

_FILE = "trained-over.json"
"""{"network": digest of the weights}."""


def write_over(folder: Path, model: Model) -> None:
    """Say beside LoRA layers over which network they were trained."""
    (folder / _FILE).write_text(json.dumps({"network": model.fingerprints["network"]}) + "\n", encoding="utf-8")


def says_over(folder: Path) -> bool:
    """Whether something is said there: layers from elsewhere come without."""
    return (folder / _FILE).exists()


def read_over(folder: Path, *, fix: str) -> str:
    """The digest of the network. Raises ModelError if there is none, or none that can be read."""
    file = folder / _FILE
    told = read_text(file, what="What the LoRA layers were trained over is not told.", error=ModelError, fix=fix)
    try:
        return str(json.loads(told)["network"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ModelError(
            "What the LoRA layers were trained over cannot be read.",
            where=file,
            expected='{"network": digest}',
            got=f"{type(error).__name__}: {error}",
            fix=fix,
        ) from None
