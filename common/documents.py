"""JSON files of models."""

import json
from pathlib import Path
from typing import Any

from inpo.common.errors import ModelError


def read_json(file: Path) -> dict[str, Any]:
    """A configuration file. Raises ModelError if it is not a JSON object."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError(f"{type(document).__name__}, not an object")
    except (OSError, ValueError) as error:
        raise ModelError(
            "A configuration file of the model cannot be read.",
            where=file,
            expected="a JSON object",
            got=str(error),
            fix="download the model again",
        ) from error
    return document
