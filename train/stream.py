"""The record stream: micro-batches of one rank, in the global order, read ahead in the background, resumable."""

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
from jaxtyping import Int

from inpo.common.errors import TrainingError
from inpo.common.seeding import library_seed
from inpo.train.index import Index
from inpo.train.order import GlobalOrder, OrderedShard, ShapeOrder, WindowKey
from inpo.train.records import Batch, LoadedRecord, LoadedShard, Needs, gather
from inpo.train.selection import IndexedShard

STATE_VERSION = 1
_BATCHES_AHEAD = 4
_BATCHES_MEASURED = 256
"""Micro-batches whose images are counted to find the number of slots."""


class RecordStream:
    """Endless micro-batches for rank `rank` of `world_size`.

    `state_dict` names the next micro-batch; a stream of the same arguments that loads it goes on exactly there, in the
    middle of an epoch too. That they are the same is part of a run's identity (train/identity.py).
    """

    def __init__(
        self,
        index: Index,
        needs: Needs,
        *,
        batch_size: int,
        window_shards: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        pin: bool = False,
    ) -> None:
        self.index = index
        self.needs = needs
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.pin = pin
        self.consumed = 0
        """Micro-batches this rank has handed out."""
        self.window_shards = window_shards
        self.seed = seed
        self._shapes = [ShapeStream(self, shards) for shards in _by_shape(index.training)]
        self.num_records = sum(shape.order.num_records for shape in self._shapes)
        self._turns = ShapeOrder(
            [shape.order.num_records for shape in self._shapes], records_per_turn=batch_size * world_size, seed=seed
        )
        self.num_slots = self._slots()
        """Images of a micro-batch: what a compiled network is made for."""
        self._thread: threading.Thread | None = None
        self._peeked: Batch | None = None
        self._stop = threading.Event()
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=_BATCHES_AHEAD)

    def _slots(self) -> int:
        """Two by record, or where images are shared or records are lists as many as the first micro-batches of all
        ranks have at most."""
        if all(each.above is None and each.num_images >= 2 * len(each.rows) for each in self.index.training):
            return 2 * self.batch_size
        return max(shape.most_images(_BATCHES_MEASURED) for shape in self._shapes)

    @property
    def latent_shapes(self) -> list[tuple[int, ...]]:
        """(c, h, w) of the micro-batches."""
        return [shape.shards[0].shard.cache.manifest.latent_shape for shape in self._shapes]

    @property
    def epoch(self) -> float:
        """Epochs begun, as a fraction: records handed out by all ranks over records there are."""
        return self.consumed * self.world_size * self.batch_size / self.num_records

    def state_dict(self) -> dict[str, Any]:
        return {"version": STATE_VERSION, "consumed": self.consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` stopped. Raises TrainingError for one of another version, whose order is not this one."""
        if self._thread is not None:
            raise RuntimeError("load_state_dict before the first batch is drawn")
        if state.get("version") != STATE_VERSION:
            raise TrainingError(
                "The checkpoint's record stream is of another version.",
                where="--resume",
                expected=STATE_VERSION,
                got=state.get("version"),
                fix="resume with the version of inpo that began the run, or start a new run in another --output",
            )
        self.consumed = int(state["consumed"])

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batch = self.peek()
            self._peeked = None
            self.consumed += 1
            yield batch

    def peek(self) -> Batch:
        """The next micro-batch, without handing it out."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._read_ahead, args=(self.consumed,), daemon=True)
            self._thread.start()
        if self._peeked is None:
            item = self._ready.get()
            if isinstance(item, BaseException):
                raise item
            self._peeked = item
        return self._peeked

    def close(self) -> None:
        """Stop reading ahead."""
        self._stop.set()
        with suppress(queue.Empty):  # who waits to hand over goes on, and sees the stop
            while True:
                self._ready.get_nowait()
        if self._thread is not None:
            self._thread.join()
        for shape in self._shapes:
            shape.close()

    def _read_ahead(self, first: int) -> None:
        turn = first
        try:
            while not self._stop.is_set():
                number, turn_of_shape = self._turns.turn(turn)
                batch = self._shapes[number].batch(turn_of_shape)
                self._put(batch.pin() if self.pin else batch)
                turn += 1
        except BaseException as error:  # raised again by the consumer
            self._put(error)

    def _put(self, item: Batch | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.2)
                return
            except queue.Full:
                continue


def _by_shape(shards: Sequence[IndexedShard]) -> list[tuple[IndexedShard, ...]]:
    """The shards of each shape of latents, in order."""
    found: dict[tuple[int, ...], list[IndexedShard]] = {}
    for shard in shards:
        found.setdefault(shard.shard.cache.manifest.latent_shape, []).append(shard)
    return [tuple(each) for each in found.values()]


class ShapeStream:
    """The micro-batches of one shape of latents: holds the current window in memory and reads the next one in the
    background.
    """

    def __init__(self, stream: RecordStream, shards: tuple[IndexedShard, ...]) -> None:
        self._stream = stream
        self.shards = shards
        self.order = GlobalOrder(
            [OrderedShard(group=shard.group, num_records=shard.num_kept, usable=shard.usable) for shard in shards],
            window_shards=stream.window_shards,
            seed=stream.seed,
        )
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="window")
        self._windows: dict[WindowKey, Future[Window]] = {}

    def most_images(self, batches: int) -> int:
        """As many images as one of the first micro-batches of all ranks has at most."""
        windows: dict[WindowKey, Int[np.ndarray, "record 3"]] = {}
        most = 0
        for number in range(batches):
            images = set()
            for position in self.order.micro_batch(number, self._stream.batch_size):
                if position.key not in windows:
                    windows = {position.key: self.order.shuffled(position.key)}
                shard, pair, record = windows[position.key][position.offset].tolist()
                found = self.shards[shard].sides[pair]
                images |= {(shard, image, record) for image in found[found >= 0].tolist()}
            most = max(most, len(images))
        return most

    def batch(self, turn: int) -> Batch:
        """Gather this rank's micro-batch of a turn; starts reading the window after its last one."""
        stream = self._stream
        positions = self.order.micro_batch(turn * stream.world_size + stream.rank, stream.batch_size)
        keys = list(dict.fromkeys(position.key for position in positions))
        following = self.order.following(keys[-1])
        for done in self._windows.keys() - {*keys, following}:
            self._windows.pop(done)
        for key in [*keys, following]:
            if key not in self._windows:
                self._windows[key] = self._pool.submit(Window, stream, self, key)
        return gather([self._windows[each.key].result().record(each.offset) for each in positions])

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class Window:
    """The records of one window that this rank will be asked for, in memory."""

    def __init__(self, stream: RecordStream, shape: ShapeStream, key: WindowKey) -> None:
        self._records = shape.order.shuffled(key)
        mine = self._records[_offsets_of_rank(stream, shape.order.first_record(key), len(self._records))]
        self._shards: dict[int, LoadedShard] = {}
        for shard in np.unique(mine[:, 0]).tolist():
            _, pairs, records = mine[mine[:, 0] == shard].T
            self._shards[shard] = LoadedShard(shape.shards[shard], pairs, records, stream.needs)

    def record(self, offset: int) -> LoadedRecord:
        """The record that is so far on in the window."""
        shard, pair, record = self._records[offset].tolist()
        return self._shards[shard].record(pair, record)


def _offsets_of_rank(stream: RecordStream, first: int, count: int) -> Int[np.ndarray, " offset"]:
    """Offsets in a window that fall into this rank's micro-batches."""
    numbers = first + np.arange(count)
    return np.flatnonzero((numbers // stream.batch_size) % stream.world_size == stream.rank)


def held_out_batches(index: Index, needs: Needs, *, batch_size: int, most_records: int, seed: int) -> list[Batch]:
    """A fixed sample of the held-out records, in batches of `batch_size`, on the CPU; [] if there are none."""
    if not index.held_out:
        return []
    records = [
        (number, record)
        for number, shard in enumerate(index.held_out)
        for record in range(len(shard.rows) * shard.num_kept)
        if shard.usable is None or shard.usable.flat[record]
    ]
    chosen = np.random.default_rng(library_seed(seed)).permutation(len(records))[:most_records]
    by_shard: dict[int, list[int]] = {}
    for each in sorted(chosen.tolist()):
        by_shard.setdefault(records[each][0], []).append(records[each][1])
    loaded: list[LoadedRecord] = []
    for number, wanted in by_shard.items():
        shard = index.held_out[number]
        pairs, of_pair = np.divmod(np.array(wanted), shard.shard.cache.manifest.timesteps_per_pair)
        here = LoadedShard(shard, pairs, of_pair, needs)
        loaded += [here.record(*each) for each in zip(pairs.tolist(), of_pair.tolist(), strict=True)]
    batches = []
    for shape in dict.fromkeys(shard.shape for shard, _ in loaded):
        alike = [each for each in loaded if each[0].shape == shape]
        batches += [gather(alike[start : start + batch_size]) for start in range(0, len(alike), batch_size)]
    return batches
