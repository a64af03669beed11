"""The small arrays of a whole cache as one table: one row per pair, read without touching any latent."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from inpo.common.cache import Cache, Shard
from inpo.common.errors import CacheMissing, InpoError, StorageError, command
from inpo.common.printable import is_printable


@dataclass(frozen=True, kw_only=True, eq=False)
class PairTable:
    """Columns over the readable pairs of a cache, in the order of shards and rows."""

    shard_names: tuple[str, ...]
    shard: Int[np.ndarray, " pair"]
    """Index into `shard_names`."""
    row: Int[np.ndarray, " pair"]
    image: Int[np.ndarray, "pair side"]
    """Rows of the images in their shard: win, lose."""
    num_images: Int[np.ndarray, " pair"]
    """Of the pair's group."""
    pair_id: np.ndarray
    prompt: np.ndarray
    """The original caption, also where it was dropped."""
    caption_dropped: Bool[np.ndarray, " pair"]
    label: Float[np.ndarray, " pair"]
    timestep: Int[np.ndarray, "pair record"]
    reference_error: Float32[np.ndarray, "pair side record"]
    inversion_error: Float32[np.ndarray, "pair side"]
    """NaN: not measured."""
    unreadable: dict[str, InpoError]
    """Shards left out, with the reason."""

    def __len__(self) -> int:
        return len(self.pair_id)

    @property
    def first_seen(self) -> Bool[np.ndarray, "pair side"]:
        """True where an image stands for the first time: it may be of several pairs."""
        key = self.shard[:, None] * (1 + self.image.max(initial=0)) + self.image
        first = np.zeros(key.size, dtype=bool)
        first[np.unique(key, return_index=True)[1]] = True
        return first.reshape(key.shape)

    @property
    def measured(self) -> Bool[np.ndarray, "pair side"]:
        """True for the images that have an inversion error, each at its first pair."""
        return self.first_seen & np.isfinite(self.inversion_error)

    @property
    def mean_reference_error(self) -> Float[np.ndarray, " pair"]:
        """Mean over the pair's timesteps and sides."""
        return self.reference_error.astype(np.float64).mean((1, 2))

    @property
    def gap(self) -> Float[np.ndarray, " pair"]:
        """Mean over timesteps of the win's reference error minus the lose's."""
        win, lose = self.reference_error.astype(np.float64).mean(2).T
        return win - lose

    @property
    def worst_inversion_error(self) -> Float[np.ndarray, " pair"]:
        """The larger of the two sides; NaN: not measured."""
        return self.inversion_error.astype(np.float64).max(1)


def read_pair_table(
    cache: Cache, unreadable: dict[str, InpoError] | None = None, on_shard: Callable[[], None] = lambda: None
) -> PairTable:
    """Read every committed shard's small arrays. A shard that cannot be read lands in `unreadable`, the rest stays."""
    unreadable = {} if unreadable is None else unreadable
    names: list[str] = []
    parts: list[dict[str, np.ndarray]] = []
    for shard in cache:
        try:
            columns = _columns(shard)
        except InpoError as error:
            unreadable[shard.name] = error
        else:
            columns["shard"] = np.full(shard.num_pairs, len(names))
            names.append(shard.name)
            parts.append(columns)
        on_shard()
    if not parts:
        records = cache.manifest.timesteps_per_pair
        parts = [
            {
                "shard": np.zeros(0, np.int64),
                "row": np.zeros(0, np.int64),
                "image": np.zeros((0, 2), np.int64),
                "num_images": np.zeros(0, np.int64),
                "pair_id": np.zeros(0, object),
                "prompt": np.zeros(0, object),
                "caption_dropped": np.zeros(0, bool),
                "label": np.zeros(0, np.float32),
                "timestep": np.zeros((0, records), np.int64),
                "reference_error": np.zeros((0, 2, records), np.float32),
                "inversion_error": np.zeros((0, 2), np.float32),
            }
        ]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return PairTable(shard_names=tuple(names), unreadable=unreadable, **joined)


def is_listable(pair_id: str) -> bool:
    """Whether a file with one id a line can hold this one."""
    return is_printable(pair_id) and pair_id == pair_id.strip()


def nothing_readable(cache: Cache, unreadable: dict[str, InpoError]) -> CacheMissing:
    """The error for a cache of which no shard can be read: each with what is wrong."""
    refused = all(isinstance(error, StorageError) for error in unreadable.values())
    again = f"`{command('inspect', 'verify', cache.location, '--quarantine')}`, then `inpo precompute` again"
    return CacheMissing(
        "This cache has no readable pair.",
        where=cache.location,
        got="; ".join(f"{name}: {error.what}" for name, error in sorted(unreadable.items())),
        fix="mend what the disk or the store refuses" if refused and unreadable else again,
    )


def _columns(shard: Shard) -> dict[str, np.ndarray]:
    sides, groups = shard.sides(), shard.groups()
    return {
        "row": np.arange(shard.num_pairs),
        "image": sides,
        "num_images": np.bincount(shard.read("image/group"))[groups],
        "pair_id": shard.read("pair/id").astype(object),
        "prompt": shard.prompts()[groups],
        "caption_dropped": shard.dropped()[groups],
        "label": shard.read("pair/label"),
        "timestep": shard.read("timestep")[groups].astype(np.int64),
        "reference_error": shard.read("reference_error")[sides],
        "inversion_error": shard.read("inversion_error")[sides],
    }
