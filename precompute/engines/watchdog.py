"""Says so when a worker has been at one thing for too long.

It warns and never kills: nobody knows how long a shard may take (256 pairs are a minute on one device and hours on
another), and a wrong guess would throw work away. A warning names what hangs and since when; Ray's idle workers make
the shard again meanwhile, and a process killed by hand loses only its shards in flight.
"""

import threading
import time
from types import TracebackType

from inpo.common.log import warn
from inpo.precompute.pipeline import Timing

_PATIENCE_SECONDS = 600.0
_TIMES_LONGEST = 5.0


class Watchdog:
    """Watches a Timing from a thread of its own, as a context manager.

    The first warning comes after ten minutes, or five times the slowest shard so far if that is longer; every later
    one after twice the time of the one before.
    """

    def __init__(
        self, timing: Timing, *, patience_seconds: float = _PATIENCE_SECONDS, name: str = "this worker"
    ) -> None:
        self.timing = timing
        self.patience_seconds = patience_seconds
        self.name = name
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()

    def _watch(self) -> None:
        since, limit = self.timing.since, 0.0
        while not self._stop.wait(min(10.0, self.patience_seconds / 4)):
            if since != self.timing.since:
                since, limit = self.timing.since, 0.0
            limit = max(limit, self.patience_seconds, _TIMES_LONGEST * self.timing.longest_computing)
            seconds = time.perf_counter() - since
            if seconds > limit:
                warn(
                    f"{self.name} has been {self.timing.activity} for {seconds / 60:.0f} min. If it hangs, "
                    "stop it and run the same command again: committed shards stay"
                )
                limit = 2 * seconds
