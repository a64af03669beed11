"""The one global order of records, from (seed, epoch) alone.

An epoch is K slices. Each visits every pair once, at another of its K records, so that a short run meets as many pairs
as it has records: the K records of a pair are correlated (docs/training.md). Where not all records may be used, the
last slices visit fewer pairs. The pairs of a group stand at the same record and follow each other, so that a
micro-batch meets their images once. In a slice shards are shuffled and cut into windows, and the groups of a window are
shuffled together.

The slices and epochs follow each other without a gap: micro-batch b holds records b * B .. (b + 1) * B - 1 of the
endless sequence, and rank r of W takes micro-batches r, r + W, ...: so every record is used equally often, no rank ever
waits for one that has run out, and two ranks equal one rank with twice the accumulation. With latents of several shapes
all but the last holds: ranks take one shape at a time together, where one rank may take two in a step.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int

from inpo.common.seeding import generator


@dataclass(frozen=True, kw_only=True)
class WindowKey:
    """A window of the order: which epoch, which slice of it, which window of that."""

    epoch: int
    slice: int
    window: int


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a record of the endless sequence lies: its window, and how far on in the window's shuffled order."""

    key: WindowKey
    offset: int


@dataclass(frozen=True, kw_only=True)
class OrderedShard:
    """What the order needs to know of a shard: the group of each of its pairs, K, and which records may be used."""

    group: Int[np.ndarray, " pair"]
    num_records: int
    usable: Bool[np.ndarray, "pair record"] | None = None
    """None: all."""

    @property
    def num_pairs(self) -> int:
        return len(self.group)

    @property
    def num_usable(self) -> int:
        return self.num_pairs * self.num_records if self.usable is None else int(self.usable.sum())

    @cached_property
    def usable_by_group(self) -> Bool[np.ndarray, "group record"]:
        """True: some pair of the group may use the record."""
        found = np.zeros((int(self.group.max()) + 1, self.num_records), bool)
        np.logical_or.at(found, self.group, True if self.usable is None else self.usable)
        return found

    @cached_property
    def num_slices(self) -> int:
        """Slices of an epoch that have a record of this shard."""
        return self.num_records if self.usable is None else int(self.usable_by_group.sum(axis=1).max())


@dataclass(frozen=True, kw_only=True)
class _Epoch:
    """An epoch's windows, one after the other, and where each ends."""

    keys: tuple[WindowKey, ...]
    shards: tuple[Int[np.ndarray, " _"], ...]
    ends: Int[np.ndarray, " window"]


class GlobalOrder:
    """Positions of the endless record sequence, without reading anything."""

    def __init__(self, shards: Sequence[OrderedShard], *, window_shards: int, seed: int) -> None:
        self.shards = shards
        self.window_shards = window_shards
        self.seed = seed
        self.num_records = sum(shard.num_usable for shard in shards)
        self._epochs: dict[int, _Epoch] = {}

    def _epoch(self, epoch: int) -> _Epoch:
        """Threads may ask for neighbouring epochs; old ones are forgotten."""
        if epoch not in self._epochs:
            keys, windows, sizes = [], [], []
            for number in range(max(shard.num_slices for shard in self.shards)):
                # Shards of fewer records have no part in an epoch's last slices.
                has = np.flatnonzero([shard.num_slices > number for shard in self.shards])
                shuffled = generator(self.seed, epoch, number, "shards").permutation(has)
                for window, start in enumerate(range(0, len(shuffled), self.window_shards)):
                    keys.append(WindowKey(epoch=epoch, slice=number, window=window))
                    windows.append(shuffled[start : start + self.window_shards])
                    sizes.append(sum(self._num_visited(epoch, shard, number) for shard in windows[-1].tolist()))
            self._epochs[epoch] = _Epoch(keys=tuple(keys), shards=tuple(windows), ends=np.cumsum(sizes))
            for old in [known for known in list(self._epochs) if known < epoch - 2]:
                self._epochs.pop(old, None)
        return self._epochs[epoch]

    def following(self, key: WindowKey) -> WindowKey:
        """The window after one."""
        keys = self._epoch(key.epoch).keys
        number = keys.index(key) + 1
        return keys[number] if number < len(keys) else self._epoch(key.epoch + 1).keys[0]

    def first_record(self, key: WindowKey) -> int:
        """Number, in the endless sequence, of a window's first record."""
        found = self._epoch(key.epoch)
        number = found.keys.index(key)
        return key.epoch * self.num_records + (int(found.ends[number - 1]) if number else 0)

    def shuffled(self, key: WindowKey) -> Int[np.ndarray, "record 3"]:
        """The window's records in order, each as (shard number, pair of the shard, record of the pair)."""
        found = self._epoch(key.epoch)
        parts = []
        for shard in found.shards[found.keys.index(key)].tolist():
            pairs, records = self._pairs(key.epoch, shard, key.slice)
            group = self.shards[shard].group[pairs]
            parts.append(np.stack([np.full(len(pairs), shard), pairs, records, group], axis=1))
        rows = np.concatenate(parts)
        _, number = np.unique(rows[:, [0, 3]], axis=0, return_inverse=True)
        turn = generator(self.seed, key.epoch, key.slice, key.window, "groups").permutation(number.max() + 1)
        order = np.argsort(turn[number.ravel()], kind="stable")
        return rows[order, :3]

    def _pairs(self, epoch: int, shard: int, slice_: int) -> tuple[Int[np.ndarray, " pair"], Int[np.ndarray, " pair"]]:
        """The pairs of a shard that a slice visits, and the record that each shows."""
        ordered = self.shards[shard]
        records = self._records(epoch, shard)[ordered.group, slice_]
        pairs = np.arange(ordered.num_pairs)
        if ordered.usable is not None:
            pairs = np.flatnonzero(ordered.usable[pairs, records])
        return pairs, records[pairs]

    def _num_visited(self, epoch: int, shard: int, slice_: int) -> int:
        """Pairs of a shard that a slice visits."""
        ordered = self.shards[shard]
        return ordered.num_pairs if ordered.usable is None else len(self._pairs(epoch, shard, slice_)[0])

    def _records(self, epoch: int, shard: int) -> Int[np.ndarray, "group record"]:
        """Which record each group of a shard shows in each slice of an epoch: a permutation by group, what nobody may
        use last."""
        ordered = self.shards[shard]
        rows = np.tile(np.arange(ordered.num_records), (int(ordered.group.max()) + 1, 1))
        shuffled = generator(self.seed, epoch, shard, "records").permuted(rows, axis=1)
        if ordered.usable is None:
            return shuffled
        unusable = ~np.take_along_axis(ordered.usable_by_group, shuffled, axis=1)
        return np.take_along_axis(shuffled, np.argsort(unusable, axis=1, kind="stable"), axis=1)

    def position(self, record: int) -> Position:
        """Where record number `record` of the endless sequence lies."""
        epoch, offset = divmod(record, self.num_records)
        found = self._epoch(epoch)
        window = int(np.searchsorted(found.ends, offset, side="right"))
        start = int(found.ends[window - 1]) if window else 0
        return Position(key=found.keys[window], offset=offset - start)

    def micro_batch(self, number: int, batch_size: int) -> list[Position]:
        """The records of one micro-batch; may span windows, slices and epochs."""
        return [self.position(record) for record in range(number * batch_size, (number + 1) * batch_size)]


class ShapeOrder:
    """Which micro-batch is of which shape of latents, where caches of several are trained on together.

    Each shape has an endless order of its own. They take turns in blocks of an epoch, shuffled by (seed, block). By the
    end of a block each shape has had as many turns, since the first block, as its records of so many epochs fill, to
    the nearest whole one: what one block rounds away a later one gives, so that no record falls behind the others. All
    ranks take the same shape.
    """

    def __init__(self, num_records: Sequence[int], *, records_per_turn: int, seed: int) -> None:
        self._num_records = num_records
        self._records_per_turn = records_per_turn
        self._seed = seed
        self._block: tuple[int, list[int], Int[np.ndarray, " turn"]] = (0, [], np.empty(0, dtype=np.int64))
        """The last block asked for: number of its first turn, turns of each shape before it, the shapes of its own."""

    def turn(self, number: int) -> tuple[int, int]:
        """(shape, turn of that shape) of a turn."""
        first, before, turns = self._block
        if not first <= number < first + len(turns):
            first, before, turns = self._block = self._block_of(number)
        offset = number - first
        shape = int(turns[offset])
        return shape, before[shape] + int((turns[:offset] == shape).sum())

    def _block_of(self, number: int) -> tuple[int, list[int], Int[np.ndarray, " turn"]]:
        """The block that a turn lies in; blocks of fewer records than half a turn may be empty."""
        # Each shape's turns are rounded by half a turn at most.
        most = (number + len(self._num_records)) * self._records_per_turn // sum(self._num_records)
        block = bisect_right(range(most + 1), number, key=lambda each: sum(self._turns_before(each))) - 1
        before, after = self._turns_before(block), self._turns_before(block + 1)
        turns = np.repeat(np.arange(len(before)), np.subtract(after, before))
        return sum(before), before, generator(self._seed, block, "shapes").permutation(turns)

    def _turns_before(self, block: int) -> list[int]:
        """Turns of each shape before a block."""
        per_turn = self._records_per_turn
        return [(2 * block * number + per_turn) // (2 * per_turn) for number in self._num_records]
