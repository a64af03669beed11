"""Records in memory: what is read of a shard, and how micro-batches are gathered from it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, Int
from torch import Tensor

from inpo.common.conditions import Condition, owned, read_prompts, training_places
from inpo.common.errors import CacheCorrupt, CacheSchemaError, command
from inpo.train.losses import Lists
from inpo.train.selection import IndexedShard


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """A micro-batch of records. An image stands in one slot, whatever the number of records that it is part of."""

    x_t: Float16[Tensor, "slot c h w"]
    target: Float16[Tensor, "slot c h w"]
    """What the prediction is compared with: the array of that name, or the one that the objective takes instead."""
    reference_error: Float32[Tensor, " slot"]
    timestep: Int[Tensor, " slot"]
    sides: Int[Tensor, "record place"]
    """Slots of each record's images: win, lose; of a list all, and its first image again where it is shorter."""
    label: Float32[Tensor, " record"]
    prompts: Condition
    """What prompts own, one row per prompt."""
    prompt: Int[Tensor, " slot"]
    """The row of each slot's prompt."""
    images: Condition
    """What images own, one row per slot."""
    lists: Lists | None = None
    """Where records are lists: what is known of their images."""

    @property
    def num_records(self) -> int:
        return self.sides.shape[0]

    @property
    def condition(self) -> Condition:
        """One row per slot. Expanded where the batch is: on the GPU."""
        return Condition.build(self.prompts, self.prompt, self.images)

    @property
    def record_timestep(self) -> Int[Tensor, " record"]:
        return self.timestep[self.sides[:, 0]]

    def at_shape(self, latent_shape: tuple[int, ...]) -> "Batch":
        """This batch, or one like it whose latents are zeros of another shape (c, h, w): for what looks at shapes."""
        if tuple(self.x_t.shape[1:]) == latent_shape:
            return self
        blank = self.x_t.new_zeros(len(self.x_t), *latent_shape)
        return replace(self, x_t=blank, target=blank)

    def by_side(self, values: Float[Tensor, " slot"]) -> Float[Tensor, "record place"]:
        """Numbers of slots as each record's win and lose, or as each list's images."""
        return values[self.sides]

    def pin(self) -> "Batch":
        """The same batch in page-locked memory, so that the copy to the GPU overlaps with compute."""
        return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        moved: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None:
                moved[each.name] = value.map(function) if isinstance(value, Condition | Lists) else function(value)
        return Batch(**moved)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Which arrays a run reads, decided by its objective. Nothing else is read."""

    target: str = "target"
    eps_ref: bool = False
    """The reference error is computed from the reference's prediction, because the target is not the stored one."""


class LoadedShard:
    """The records of one shard that some micro-batches ask for, in memory: each image's once."""

    def __init__(
        self,
        indexed: IndexedShard,
        pairs: Int[np.ndarray, " record"],
        records: Int[np.ndarray, " record"],
        needs: Needs,
    ) -> None:
        """`pairs` numbers positions in `indexed.rows`, `records` which of its K each of them shows."""
        shard = indexed.shard
        self._shard = shard
        self.needs = needs
        num_records = shard.cache.manifest.timesteps_per_pair
        self._where = {key: number for number, key in enumerate(zip(pairs.tolist(), records.tolist(), strict=True))}
        sides = indexed.sides[pairs]
        there = sides >= 0
        keys, slots = np.unique((sides * num_records + records[:, None])[there], return_inverse=True)
        self._slots = np.split(slots, np.cumsum(there.sum(axis=1))[:-1])
        images, image_records = np.divmod(keys, num_records)
        self._target = shard.read_records(needs.target, images, image_records)
        self._x_t = self._points(images, image_records)
        self._timestep = shard.timesteps()[images, image_records].astype(np.int64)
        self._reference_error = self._errors(images, image_records)
        self._check_finite(images)
        self._label = indexed.labels(pairs, records)
        self._lists = (
            None
            if indexed.above is None or indexed.advantage is None
            else (indexed.above[pairs], indexed.advantage[pairs])
        )
        self._images = {name: shard.read(path, images) for name, path in owned(shard, "image").items()}
        groups, self._prompt = np.unique(shard.read("image/group", images), return_inverse=True)
        self._prompts = read_prompts(shard.cache.texts, training_places(shard, groups))

    def _points(self, images: Int[np.ndarray, " n"], records: Int[np.ndarray, " n"]) -> Float16[np.ndarray, "n c h w"]:
        """x_t; of a lean cache from the target that has been read already."""
        if "x_t" in self._shard.stored or self.needs.target != "target":
            return self._shard.read_records("x_t", images, records)
        return self._shard.derive_records(images, records, self._target)

    def _errors(self, images: Int[np.ndarray, " n"], records: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        if not self.needs.eps_ref:
            found: np.ndarray = self._shard.read("reference_error")[images, records]
            return found
        eps_ref = self._shard.read_records("eps_ref", images, records)
        return np.square(self._target.astype(np.float32) - eps_ref.astype(np.float32)).mean((-3, -2, -1))

    @property
    def shape(self) -> tuple[int, ...]:
        """[c, h, w] of its latents, which a micro-batch has one of."""
        return self._x_t.shape[1:]

    def record(self, pair: int, record: int) -> "LoadedRecord":
        """A record that was read: this shard, and its number here."""
        return self, self._where[pair, record]

    def slots_of(self, number: int) -> list[int]:
        """The images of a record: win, lose, or all of a list."""
        found: list[int] = self._slots[number].tolist()
        return found

    def list_of(self, number: int) -> tuple[np.ndarray, np.ndarray] | None:
        """(above, advantage) of the images of a record, if it is a list."""
        if self._lists is None:
            return None
        above, advantage = self._lists
        length = len(self._slots[number])
        return above[number, :length, :length], advantage[number, :length]

    def copy_slot(self, image: int, batch: dict[str, np.ndarray], slot: int) -> None:
        """Copy an image's numbers into a slot of a batch's arrays."""
        batch["x_t"][slot] = self._x_t[image]
        batch["target"][slot] = self._target[image]
        batch["reference_error"][slot] = self._reference_error[image]
        batch["timestep"][slot] = self._timestep[image]
        for name, values in self._images.items():
            batch[name][slot] = values[image]

    def label_of(self, number: int) -> float:
        return float(self._label[number])

    def prompt_of(self, image: int) -> int:
        """The row of an image's prompt in `prompt`."""
        return int(self._prompt[image])

    def copy_prompt(self, prompt: int, batch: dict[str, np.ndarray], row: int) -> None:
        """Copy what a prompt owns into a row of a batch's arrays."""
        for name, values in self._prompts.items():
            batch[name][row] = values[prompt]

    def empty_slots(self, number: int) -> dict[str, np.ndarray]:
        """Arrays for slots like this shard's, to be filled."""
        like = {"x_t": self._x_t, "target": self._target, "reference_error": self._reference_error}
        like |= {"timestep": self._timestep, **self._images}
        return {name: np.empty((number, *values.shape[1:]), values.dtype) for name, values in like.items()}

    def empty_prompts(self, number: int) -> dict[str, np.ndarray]:
        """Arrays for what prompts like this shard's own, to be filled."""
        return {name: np.empty((number, *values.shape[1:]), values.dtype) for name, values in self._prompts.items()}

    def check_fits(self, batch: dict[str, np.ndarray]) -> None:
        """Raise CacheSchemaError if this shard has other shapes than a batch's."""
        for name, values in (self.empty_slots(0) | self.empty_prompts(0)).items():
            if values.shape[1:] != batch[name].shape[1:]:
                raise CacheSchemaError(
                    f"Shard {self._shard.name} holds other embeddings than the shards beside it.",
                    where=self._shard.location,
                    expected=f"{name} {list(batch[name].shape[1:])} per record",
                    got=list(values.shape[1:]),
                    fix="leave this cache out, or make the shard again",
                )

    def _check_finite(self, images: Int[np.ndarray, " n"]) -> None:
        """A cache holds finite numbers only; one that does not is damaged, and says which pair."""
        shard = self._shard
        for name, values in (
            ("x_t", self._x_t),
            (self.needs.target, self._target),
            ("reference_error", self._reference_error),
        ):
            if _all_finite(values):
                continue
            bad = images[~np.isfinite(values.reshape(len(images), -1)).all(1)]
            pair_id = shard.read("pair/id")[np.isin(shard.sides(), bad).any(1)][0]
            raise CacheCorrupt(
                f"Array {name} of shard {shard.name} holds a number that is NaN or infinite.",
                where=f"{shard.location}/{name}, pair {pair_id}",
                expected="finite numbers: precompute quarantines others",
                fix=f"`{command('inspect', 'verify', shard.cache.location, '--quarantine')}`, then `inpo precompute` "
                "makes the shard again; or leave the pair out with --except",
            )


LoadedRecord = tuple[LoadedShard, int]
"""A record in memory: shard, number of the record there."""


def gather(records: Sequence[LoadedRecord]) -> Batch:
    """Records in the given order, from any shards of one model; every image once."""
    slots: dict[tuple[int, int], int] = {}
    prompts: dict[tuple[int, int], int] = {}
    shards = {id(shard): shard for shard, _ in records}
    sides = [
        [slots.setdefault((id(shard), image), len(slots)) for image in shard.slots_of(number)]
        for shard, number in records
    ]
    places = max(map(len, sides))
    prompt = [prompts.setdefault((owner, shards[owner].prompt_of(image)), len(prompts)) for owner, image in slots]
    arrays, of_prompts = records[0][0].empty_slots(len(slots)), records[0][0].empty_prompts(len(prompts))
    for shard in shards.values():
        shard.check_fits(arrays | of_prompts)
    for (owner, image), slot in slots.items():
        shards[owner].copy_slot(image, arrays, slot)
    for (owner, row), number in prompts.items():
        shards[owner].copy_prompt(row, of_prompts, number)
    names = ("x_t", "target", "reference_error", "timestep")
    tensors = {name: torch.from_numpy(values) for name, values in arrays.items()}
    return Batch(
        **{name: tensors.pop(name) for name in names},
        sides=torch.tensor([each + each[:1] * (places - len(each)) for each in sides]),
        label=torch.tensor([shard.label_of(number) for shard, number in records], dtype=torch.float32),
        prompts=Condition(**{name: torch.from_numpy(values) for name, values in of_prompts.items()}),
        prompt=torch.tensor(prompt),
        images=Condition(**tensors),
        lists=_lists([each for shard, number in records if (each := shard.list_of(number)) is not None], places),
    )


def _lists(found: Sequence[tuple[np.ndarray, np.ndarray]], places: int) -> Lists | None:
    """What is known of the images of a micro-batch's lists, each brought to as many places; None if there are none."""
    if not found:
        return None
    above = np.zeros((len(found), places, places), bool)
    advantage, there = np.zeros((len(found), places), np.float32), np.zeros((len(found), places), bool)
    for row, (prefers, weight) in enumerate(found):
        length = len(weight)
        above[row, :length, :length], advantage[row, :length], there[row, :length] = prefers, weight, True
    return Lists(above=torch.from_numpy(above), advantage=torch.from_numpy(advantage), there=torch.from_numpy(there))


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
