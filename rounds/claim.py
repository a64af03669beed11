"""OUTPUT/round.json: what the rounds of a folder were begun with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inpo.common.durable import entries, write_file
from inpo.common.errors import UsageError

_IDENTITY = "round.json"


def claim_rounds(output: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder these rounds', or go on with it. Raises UsageError if it was begun with other settings."""
    file = output / _IDENTITY
    if not file.is_file():
        other = entries(output)
        if other:
            raise UsageError(
                "The folder of the rounds holds something else.",
                where=output,
                expected="a new or empty folder, or one of these rounds",
                got=", ".join(other[:5]),
                fix="choose another --output",
            )
        write_file(file, (json.dumps(identity, indent=1, ensure_ascii=False) + "\n").encode())
        return
    try:
        found = json.loads(file.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"{type(found).__name__}, not an object")
    except ValueError as error:
        raise UsageError(
            "What these rounds were begun with cannot be read.",
            where=file,
            expected="a JSON object, as it was written",
            got=str(error),
            fix="restore the file from a copy, or choose another --output",
        ) from None
    wrong = [name for name in {**identity, **found} if identity.get(name) != found.get(name)]
    if wrong:
        raise UsageError(
            "These rounds were begun with other settings.",
            where=file,
            expected="; ".join(f"{name} = {found.get(name)}" for name in wrong) + " (in the folder)",
            got="; ".join(f"{name} = {identity.get(name)}" for name in wrong) + " (this run)",
            fix="repeat the folder's settings, or choose another --output",
        )
