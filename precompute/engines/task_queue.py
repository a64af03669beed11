"""The order in which one run goes through its tasks."""

import random
import threading
from collections.abc import Iterable, Iterator

from inpo.precompute.tasks import ShardTask


class TaskQueue(Iterator[ShardTask]):
    """The tasks of one run, in order, until another run is noticed at work on the same cache; then in random order.

    Two runs that go through the same shards in the same order would make each of them twice, for ever side by side.
    In random order they meet only now and then: about ln(n) times in n shards.
    """

    def __init__(self, tasks: Iterable[ShardTask]) -> None:
        self._tasks = list(tasks)
        self._lock = threading.Lock()

    def __next__(self) -> ShardTask:
        with self._lock:
            if not self._tasks:
                raise StopIteration
            return self._tasks.pop(0)

    def shuffle(self) -> None:
        """Somebody else committed one of ours: keep out of each other's way. The order changes no number."""
        with self._lock:
            random.SystemRandom().shuffle(self._tasks)
