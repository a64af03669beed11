"""Records in memory: what is read of a shard, and how micro-batches are gathered from it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, Int
from torch import Tensor

from inpo.common.cache.derive import derive_x_t
from inpo.common.cache.reader import Shard
from inpo.common.conditions import Condition, owned
from inpo.common.errors import CacheCorrupt, CacheSchemaError, command
from inpo.train.buffers import Buffers
from inpo.train.index import IndexedShard


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """A micro-batch of records, both sides: win first. The sides share a caption, which is held once."""

    x_t: Float16[Tensor, "record side c h w"]
    aim: Float16[Tensor, "record side c h w"]
    """What the prediction is compared with: the target, or what the objective aims at."""
    reference_error: Float32[Tensor, "record side"]
    timestep: Int[Tensor, "record"]
    label: Float32[Tensor, "record"]
    prompts: Condition
    """What prompts own, one row per record."""
    images: Condition
    """What images own, one row per image: record 0 win, record 0 lose, record 1 win, ..."""

    @property
    def num_records(self) -> int:
        return self.x_t.shape[0]

    @property
    def condition(self) -> Condition:
        """One row per image. Expanded where the batch is: on the GPU."""
        return Condition(**self.prompts.repeat(2), **self.images)

    def pin(self) -> "Batch":
        """The same batch in page-locked memory, so that the copy to the GPU overlaps with compute."""
        return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return Batch(
            **{
                name: value.map(function) if isinstance(value, Condition) else function(value)
                for name, value in values.items()
            }
        )


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Which arrays a run reads, decided by its objective. Nothing else is read."""

    aim: str = "target"
    eps_ref: bool = False
    """The reference error is computed from the reference's prediction, because the aim is not the stored target."""


class LoadedShard:
    """The rows of one shard that some micro-batches ask for, in memory."""

    def __init__(
        self, indexed: IndexedShard, used: Int[np.ndarray, "row"], needs: Needs, buffers: Buffers | None = None
    ) -> None:
        """`used` numbers positions in `indexed.rows`, ascending and distinct. The big arrays lie in `buffers`'
        memory.
        """
        shard = indexed.shard
        self._shard = shard
        rows = indexed.rows[used]
        # Reading single pairs costs a little more per byte than the whole array; reading what is not asked for, more.
        selection = None if len(rows) * 2 >= shard.num_pairs else rows
        self._where = {int(position): number for number, position in enumerate(used)}
        self._local = rows if selection is None else np.arange(len(rows))
        self._rows = rows
        self._allocate = None if buffers is None else buffers.take
        self.aim = shard.read(needs.aim, selection, allocate=self._allocate)
        self.timestep = shard.read("timestep", selection)
        self.x_t = self._x_t(shard, selection, needs)
        self.reference_error = self._reference_error(shard, selection, needs)
        _check_finite(
            shard, self._local, rows, {"x_t": self.x_t, needs.aim: self.aim, "reference_error": self.reference_error}
        )
        self._label = indexed.label[used]
        dropped = shard.read("caption_dropped", rows)
        self._prompt = np.where(dropped, 0, shard.read("prompt_index", rows)).astype(np.int64)
        self._prompts = {name: shard.read(path) for name, path in owned(shard, "prompt").items()}
        self._images = {name: shard.read(path, rows) for name, path in owned(shard, "image").items()}

    def _x_t(
        self, shard: Shard, selection: Int[np.ndarray, "row"] | None, needs: Needs
    ) -> Float16[np.ndarray, "pair step side c h w"]:
        """x_t; of a lean cache from the target that has been read already."""
        if "x_t" in shard.stored or needs.aim != "target":
            return shard.read("x_t", selection, allocate=self._allocate)
        a, s = shard.cache.levels.at(self.timestep)
        return derive_x_t(shard.read("x0", selection), self.aim, a, s)

    def _reference_error(
        self, shard: Shard, selection: Int[np.ndarray, "row"] | None, needs: Needs
    ) -> Float[np.ndarray, "pair step side"]:
        if not needs.eps_ref:
            return shard.read("reference_error", selection)
        error = self.aim.astype(np.float32) - shard.read("eps_ref", selection).astype(np.float32)
        return np.square(error).mean((-3, -2, -1))

    def copy_record(self, pair: int, step: int, batch: dict[str, np.ndarray], place: int) -> None:
        """Copy the record of (position in the indexed rows, step) into row `place` of a batch's arrays."""
        number = self._where[pair]
        local, prompt = self._local[number], self._prompt[number]
        batch["x_t"][place] = self.x_t[local, step]
        batch["aim"][place] = self.aim[local, step]
        batch["reference_error"][place] = self.reference_error[local, step]
        batch["timestep"][place] = self.timestep[local, step]
        batch["label"][place] = self._label[number]
        for name, values in self._prompts.items():
            batch[name][place] = values[prompt]
        for name, values in self._images.items():
            batch[name][place] = values[number]

    def give_back(self, buffers: Buffers) -> None:
        """The end of this object: its big arrays' memory is another's now."""
        for array in (self.x_t, self.aim):
            buffers.give(array)

    def check_fits(self, batch: dict[str, np.ndarray]) -> None:
        """Raise CacheSchemaError if records of this shard have other shapes than a batch's."""
        for name, values in self.empty_batch(0).items():
            if values.shape[1:] != batch[name].shape[1:]:
                raise CacheSchemaError(
                    f"Shard {self._shard.name} holds other embeddings than the shards beside it.",
                    where=self._shard.location,
                    expected=f"{name} {list(batch[name].shape[1:])} per record",
                    got=list(values.shape[1:]),
                    fix="leave this cache out, or make the shard again",
                )

    def empty_batch(self, num_records: int) -> dict[str, np.ndarray]:
        """Arrays for a batch of records like these, to be filled."""
        like = {
            "x_t": self.x_t[0, 0],
            "aim": self.aim[0, 0],
            "reference_error": np.zeros(2, np.float32),
            "timestep": np.zeros((), np.int64),
            "label": np.zeros((), np.float32),
        }
        like |= {name: values[0] for name, values in {**self._prompts, **self._images}.items()}
        return {name: np.empty((num_records, *value.shape), value.dtype) for name, value in like.items()}

    def batch(self, arrays: dict[str, np.ndarray]) -> Batch:
        """The filled arrays of `empty_batch` as a micro-batch."""
        tensors = {name: torch.from_numpy(values) for name, values in arrays.items()}
        prompts = Condition(**{name: tensors.pop(name) for name in self._prompts})
        images = Condition(**{name: tensors.pop(name).flatten(0, 1) for name in self._images})
        return Batch(prompts=prompts, images=images, **tensors)


RecordPlace = tuple[LoadedShard, int, int]
"""A record in memory: shard, pair (a position in the indexed rows), step."""


def gather(places: Sequence[RecordPlace]) -> Batch:
    """Records in the given order, from any shards of one model. Every number is copied once."""
    arrays = places[0][0].empty_batch(len(places))
    for shard in {id(shard): shard for shard, _, _ in places}.values():
        shard.check_fits(arrays)
    for row, (shard, pair, step) in enumerate(places):
        shard.copy_record(pair, step, arrays, row)
    return places[0][0].batch(arrays)


_BLOCK = 1 << 18
"""Values looked at together: they fit into a processor's cache."""


def _all_finite(values: Float[np.ndarray, "..."]) -> bool:
    if values.dtype == np.float16:
        # All bits of the exponent set means NaN or infinity; numpy converts float16 one by one otherwise.
        bits = values.reshape(-1).view(np.uint16)
        return not any(
            bool(((bits[start : start + _BLOCK] & 0x7C00) == 0x7C00).any()) for start in range(0, bits.size, _BLOCK)
        )
    return bool(np.isfinite(values).all())


def _check_finite(
    shard: Shard, local: Int[np.ndarray, "row"], rows: Int[np.ndarray, "row"], arrays: dict[str, np.ndarray]
) -> None:
    """A cache holds finite numbers only; one that does not is damaged, and says which pair."""
    for name, values in arrays.items():
        if _all_finite(values):
            continue
        bad = ~np.isfinite(values[local].reshape(len(local), -1)).all(1)
        if bad.any():
            pair_id = shard.read("pair_id")[rows[int(np.argmax(bad))]]
            raise CacheCorrupt(
                f"Array {name} of shard {shard.name} holds a number that is NaN or infinite.",
                where=f"{shard.location}/{name}, pair {pair_id}",
                expected="finite numbers: precompute quarantines others",
                fix=f"`{command('inspect', 'verify', shard.cache.location, '--quarantine')}`, then `inpo precompute` "
                "makes the shard again; or leave the pair out with --except",
            )
