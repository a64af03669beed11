"""The one global order of records, from (seed, epoch) alone.

Shards are shuffled, cut into windows, and the records of a window are shuffled together. The epochs follow each other
without a gap: micro-batch b holds records b * B .. (b + 1) * B - 1 of the endless sequence, and rank r of W takes
micro-batches r, r + W, ...: so two ranks equal one rank with twice the accumulation, every record is used equally
often, and no rank ever waits for one that has run out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from inpo.common.seeding import generator


@dataclass(frozen=True, kw_only=True)
class WindowKey:
    """A window of the order: which epoch, which window of it."""

    epoch: int
    window: int


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a record of the endless sequence lies: its window and its position in the window's shuffled order."""

    key: WindowKey
    position: int


class GlobalOrder:
    """Positions of the endless record sequence, without reading anything.

    `records_per_shard` counts the records of every indexed shard.
    """

    def __init__(self, records_per_shard: Sequence[int], *, window_shards: int, seed: int) -> None:
        self.records_per_shard = np.asarray(records_per_shard, dtype=np.int64)
        self.window_shards = window_shards
        self.seed = seed
        self.num_records = int(self.records_per_shard.sum())
        self._epochs: dict[int, tuple[list[Int[np.ndarray, "shard"]], Int[np.ndarray, "window"]]] = {}

    def windows(self, epoch: int) -> list[Int[np.ndarray, "shard"]]:
        """The epoch's windows: numbers of the shards in each."""
        return self._epoch(epoch)[0]

    def _epoch(self, epoch: int) -> tuple[list[Int[np.ndarray, "shard"]], Int[np.ndarray, "window"]]:
        """(windows, where each ends in the epoch). Threads may ask for neighbouring epochs; old ones are forgotten."""
        if epoch not in self._epochs:
            shards = generator(self.seed, epoch, "shards").permutation(len(self.records_per_shard))
            cuts = range(0, len(shards), self.window_shards)
            windows = [shards[start : start + self.window_shards] for start in cuts]
            ends = np.cumsum([self.records_per_shard[part].sum() for part in windows])
            self._epochs[epoch] = (windows, ends)
            for old in [known for known in list(self._epochs) if known < epoch - 2]:
                self._epochs.pop(old, None)
        return self._epochs[epoch]

    def shuffled(self, key: WindowKey) -> Int[np.ndarray, "record 2"]:
        """The window's records in order, each as (shard number, record number in the shard)."""
        shards = self.windows(key.epoch)[key.window]
        records = np.concatenate(
            [
                np.stack([np.full(count, shard), np.arange(count)], axis=1)
                for shard in shards
                for count in [int(self.records_per_shard[shard])]
            ]
        )
        return generator(self.seed, key.epoch, key.window, "records").permutation(records)

    def place(self, record: int) -> Place:
        """Where record number `record` of the endless sequence lies."""
        epoch, offset = divmod(record, self.num_records)
        ends = self._epoch(epoch)[1]
        window = int(np.searchsorted(ends, offset, side="right"))
        start = int(ends[window - 1]) if window else 0
        return Place(key=WindowKey(epoch=epoch, window=window), position=offset - start)

    def micro_batch(self, number: int, batch_size: int) -> list[Place]:
        """The records of one micro-batch; may span windows and epochs."""
        return [self.place(record) for record in range(number * batch_size, (number + 1) * batch_size)]
