"""Free space, and sizes in words."""

import shutil
from pathlib import Path


def free_bytes(path: Path) -> int:
    """Free space where `path` lies or would lie."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def human_bytes(size: int) -> str:
    """Decimal units, three digits."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5:  # what rounds to 1000 is one of the next unit
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} PB"
