"""Where the processes of one run meet: they compare what each has found, and wait for one another at the end."""

import time
from datetime import timedelta
from typing import TypeVar

import torch.distributed
from accelerate import PartialState

from inpo.common.errors import InpoError

_LONGEST_WAIT = timedelta(days=60)
_T = TypeVar("_T")


class WaitingRoom:
    """All processes of a run call `gathered` equally often, in the same order. One process alone never waits.

    accelerate's own barrier gives up after hours (and blocks signals); this one is a gloo barrier with a time limit of
    its own, polled, so that SIGTERM ends the waiting at once.
    """

    def __init__(self, state: PartialState) -> None:
        self._group = (
            torch.distributed.new_group(backend="gloo", timeout=_LONGEST_WAIT) if state.num_processes > 1 else None
        )

    def gathered(self, mine: _T) -> list[_T]:
        """What every process has, by its number, once all have come, which may be days after this one. Raises InpoError
        if another process has gone."""
        if self._group is None:
            return [mine]
        found = [mine] * torch.distributed.get_world_size(self._group)
        try:
            barrier = torch.distributed.barrier(group=self._group, async_op=True)
            while not barrier.is_completed():
                time.sleep(0.1)
            barrier.wait()
            torch.distributed.all_gather_object(found, mine, group=self._group)
        except RuntimeError as error:  # gloo: a connection was closed
            raise InpoError(
                "Another process of this run has ended before its work was done.",
                got=str(error).splitlines()[0][:200],
                fix="see that process's own message, then run the same command again: what is committed stays",
            ) from error
        return found
