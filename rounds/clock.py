"""ROUND/seconds.json: how long each stage of a round took, over all processes that worked at it."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydantic import TypeAdapter

from inpo.common.durable import write_file

STAGES = ("points", "train", "evaluate")


class StageClock:
    """Adds up the seconds of a round's stages. One process of several keeps it."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "seconds.json"

    @contextmanager
    def running(self, stage: str) -> Iterator[None]:
        """Around the work of this process. Whoever is killed inside leaves null: its seconds cannot be known."""
        before = self.seconds().get(stage, 0.0)
        self._write(stage, None)
        start = time.perf_counter()
        try:
            yield
        finally:
            if before is not None:
                self._write(stage, round(before + time.perf_counter() - start, 1))

    def seconds(self) -> dict[str, float | None]:
        """{stage: its seconds, or None where they are not known}, of those that were begun."""
        try:
            return TypeAdapter(dict[str, float | None]).validate_json(self.file.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError:
            return dict.fromkeys(STAGES)

    def _write(self, stage: str, seconds: float | None) -> None:
        told: Mapping[str, float | None] = {**self.seconds(), stage: seconds}
        write_file(self.file, (json.dumps(told) + "\n").encode())
