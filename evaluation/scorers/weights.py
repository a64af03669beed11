"""Where a scorer's weights are, and one plain error when they are not.

The folder named by the environment variable INPO_SCORERS comes first (FOLDER/<name>: a model folder or a file), then
the hub, whose client keeps what it has downloaded.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from inpo.common.errors import ModelError

VARIABLE = "INPO_SCORERS"


def local_weights(name: str) -> Path | None:
    """FOLDER/<name> of INPO_SCORERS, if it is there."""
    folder = os.environ.get(VARIABLE)
    path = Path(folder) / name if folder else None
    return path if path is not None and path.exists() else None


def model_location(name: str, hub_id: str) -> str:
    """A local model folder, or else the hub id."""
    return str(local_weights(name) or hub_id)


@contextmanager
def loading(scorer: str, what: str, fix: str) -> Iterator[None]:
    """Turn whatever a library raises for absent or damaged weights into one ModelError that says what to do."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # hub clients and loaders raise many kinds; each means the weights cannot be used
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"The weights of scorer {scorer} could not be loaded.", where=what, got=lines[0][:200], fix=fix
        ) from error


def missing_package(scorer: str, package: str) -> ModelError:
    return ModelError(f"Scorer {scorer} needs the package {package}.", where=scorer, fix=f"pip install {package}")


def device() -> torch.device:
    """This process's device: under accelerate, its own GPU."""
    from inpo.common.processes import processes

    own: torch.device = processes().device
    return own
