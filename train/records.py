"""Records in memory: what is read of a shard, and how micro-batches are gathered from it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, Int
from torch import Tensor

from common.cache.derive import derive_x_t
from common.cache.reader import Shard
from common.denoiser import Condition
from common.errors import CacheCorrupt
from train.index import IndexedShard


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """A micro-batch of records, both sides: win first."""

    x_t: Float16[Tensor, "record side c h w"]
    aim: Float16[Tensor, "record side c h w"]
    """What the prediction is compared with: the target, or what the objective aims at."""
    reference_error: Float32[Tensor, "record side"]
    timestep: Int[Tensor, "record"]
    label: Float32[Tensor, "record"]
    condition: Condition
    """One row per image: record 0 win, record 0 lose, record 1 win, ..."""

    @property
    def num_records(self) -> int:
        return self.x_t.shape[0]

    def pin(self) -> "Batch":
        """The same batch in page-locked memory, so that the copy to the GPU overlaps with compute."""
        return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        condition = self.condition
        return Batch(
            x_t=function(self.x_t),
            aim=function(self.aim),
            reference_error=function(self.reference_error),
            timestep=function(self.timestep),
            label=function(self.label),
            condition=Condition(
                embedding=function(condition.embedding),
                pooled=None if condition.pooled is None else function(condition.pooled),
                time_ids=None if condition.time_ids is None else function(condition.time_ids),
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Which arrays a run reads, decided by its objective. Nothing else is read."""

    aim: str = "target"
    eps_ref: bool = False
    """The reference error is computed from the reference's prediction, because the aim is not the stored target."""


class LoadedShard:
    """The rows of one shard that some micro-batches ask for, in memory."""

    def __init__(self, indexed: IndexedShard, used: Int[np.ndarray, "row"], needs: Needs) -> None:
        """`used` numbers positions in `indexed.rows`, ascending and distinct."""
        shard = indexed.shard
        rows = indexed.rows[used]
        # Reading single pairs costs a little more per byte than the whole array; reading what is not asked for, more.
        selection = None if len(rows) * 2 >= shard.num_pairs else rows
        self._where = {int(position): number for number, position in enumerate(used)}
        self._local = rows if selection is None else np.arange(len(rows))
        self._rows = rows
        self.aim = shard.read(needs.aim, selection)
        self.timestep = shard.read("timestep", selection)
        self.x_t = self._x_t(shard, selection, needs)
        self.reference_error = self._reference_error(shard, selection, needs)
        _check_finite(
            shard, self._local, rows, {"x_t": self.x_t, needs.aim: self.aim, "reference_error": self.reference_error}
        )
        self._label = indexed.label[used]
        dropped = shard.read("caption_dropped", rows)
        self._prompt = np.where(dropped, 0, shard.read("prompt_index", rows)).astype(np.int64)
        self._embedding = torch.from_numpy(shard.read("prompt/embedding"))
        is_sdxl = "prompt/pooled" in shard.stored
        self._pooled = torch.from_numpy(shard.read("prompt/pooled")) if is_sdxl else None
        self._time_ids = torch.from_numpy(shard.read("time_ids", rows)) if is_sdxl else None

    def _x_t(
        self, shard: Shard, selection: Int[np.ndarray, "row"] | None, needs: Needs
    ) -> Float16[np.ndarray, "pair step side c h w"]:
        """x_t; of a lean cache from the target that has been read already."""
        if "x_t" in shard.stored or needs.aim != "target":
            return shard.read("x_t", selection)
        schedule, timestep = shard.cache.schedule, self.timestep.astype(np.int64)
        a, s = schedule.a.numpy()[timestep], schedule.s.numpy()[timestep]
        return derive_x_t(shard.read("x0", selection), self.aim, a, s)

    def _reference_error(
        self, shard: Shard, selection: Int[np.ndarray, "row"] | None, needs: Needs
    ) -> Float[np.ndarray, "pair step side"]:
        if not needs.eps_ref:
            return shard.read("reference_error", selection)
        error = self.aim.astype(np.float32) - shard.read("eps_ref", selection).astype(np.float32)
        return np.square(error).mean((-3, -2, -1))

    def gather(self, pairs: Sequence[int], steps: Sequence[int]) -> Batch:
        """Records by (position in the indexed rows, step)."""
        number = np.array([self._where[pair] for pair in pairs])
        local, step = self._local[number], np.asarray(steps)
        record = (local, step)
        prompt = torch.from_numpy(self._prompt[number]).repeat_interleave(2)
        time_ids = None
        if self._time_ids is not None:
            time_ids = self._time_ids[torch.from_numpy(number)].reshape(-1, 6)
        return Batch(
            x_t=torch.from_numpy(self.x_t[record]),
            aim=torch.from_numpy(self.aim[record]),
            reference_error=torch.from_numpy(self.reference_error[record]).float(),
            timestep=torch.from_numpy(self.timestep[local, step].astype(np.int64)),
            label=torch.from_numpy(self._label[number]),
            condition=Condition(
                embedding=self._embedding[prompt],
                pooled=None if self._pooled is None else self._pooled[prompt],
                time_ids=time_ids,
            ),
        )


def concatenate(parts: Sequence[Batch], order: Int[np.ndarray, "record"]) -> Batch:
    """Batches joined, then brought into `order`."""
    index = torch.from_numpy(order)
    per_image = torch.stack([2 * index, 2 * index + 1], dim=1).flatten()

    def records(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])[index]

    def images(name: str) -> Tensor | None:
        values = [getattr(part.condition, name) for part in parts]
        return None if values[0] is None else torch.cat(values)[per_image]

    embedding = images("embedding")
    assert embedding is not None
    return Batch(
        x_t=records("x_t"),
        aim=records("aim"),
        reference_error=records("reference_error"),
        timestep=records("timestep"),
        label=records("label"),
        condition=Condition(embedding=embedding, pooled=images("pooled"), time_ids=images("time_ids")),
    )


def _all_finite(values: Float[np.ndarray, "..."]) -> bool:
    if values.dtype == np.float16:
        # All bits of the exponent set means NaN or infinity; numpy converts float16 one by one otherwise.
        return not bool(((values.view(np.uint16) & 0x7C00) == 0x7C00).any())
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
                fix=f"`inpo inspect verify {shard.cache.location} --quarantine`, then `inpo precompute` makes the "
                "shard again; or leave the pair out with --except",
            )
