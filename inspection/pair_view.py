"""One cached pair, read for showing: whatever the cache stores or lets derive, and what it does not."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from inpo.common.cache import Cache, Shard
from inpo.common.errors import CacheIncomplete, InpoError
from inpo.inspection.pair_table import nothing_readable


@dataclass(frozen=True, kw_only=True, eq=False)
class PairView:
    """The tensors and facts of one pair. Latents are float32; None where the cache does not hold them."""

    space: str
    """What the target is of: noise or velocity."""
    pair_id: str
    prompt: str
    caption_dropped: bool
    label: float
    timestep: Int[np.ndarray, " record"]
    a: Float[np.ndarray, " record"]
    """x_t is a x0 + s target."""
    s: Float[np.ndarray, " record"]
    x0: Float[np.ndarray, "side c h w"]
    x_t: Float[np.ndarray, "side record c h w"]
    target: Float[np.ndarray, "side record c h w"]
    delta: Float[np.ndarray, "side record c h w"] | None
    x0_t: Float[np.ndarray, "side record c h w"] | None
    reference_error: Float[np.ndarray, "side record"]
    inversion_error: Float[np.ndarray, " side"]
    """NaN: not measured."""

    @property
    def delta_map(self) -> Float[np.ndarray, "side record h w"] | None:
        """|delta|: RMS over channels. A unit Gaussian gives values around 1."""
        return None if self.delta is None else np.sqrt((self.delta**2).mean(2))

    @property
    def target_map(self) -> Float[np.ndarray, "side record h w"]:
        """|target|: RMS over channels. In noise space a unit Gaussian gives values around 1."""
        return np.sqrt((self.target**2).mean(2))

    @property
    def error_map(self) -> Float[np.ndarray, "side record h w"] | None:
        """|target - prediction|: RMS over channels, the prediction delta, in velocity space delta - x0(t). Where delta
        is the reference's, its mean square is E_ref."""
        if self.delta is None or self.x0_t is None:
            return None
        prediction = self.delta if self.space == "noise" else self.delta - self.x0_t
        return np.sqrt(((self.target - prediction) ** 2).mean(2))


def find_pair(cache: Cache, pair_id: str | None, unreadable: dict[str, InpoError]) -> PairView:
    """The pair of this id, or the first readable one. Shards that cannot be searched for it land in `unreadable`.

    Raises CacheIncomplete if no readable shard has it, CacheCorrupt if its own latents are damaged, and CacheMissing if
    no pair is readable at all.
    """
    example: str | None = None
    for shard in cache:
        try:
            names = shard.read("pair/id")
        except InpoError as error:
            unreadable[shard.name] = error
            continue
        if pair_id is None:
            for row in range(len(names)):
                try:
                    return view_pair(cache, shard, row)
                except InpoError as error:
                    unreadable.setdefault(shard.name, error)
            continue
        rows = np.flatnonzero(names == pair_id)
        if len(rows):
            return view_pair(cache, shard, int(rows[0]))
        example = example or str(names[0])
    if example is None:
        raise nothing_readable(cache, unreadable)
    raise CacheIncomplete(
        f"No committed pair has the id {pair_id!r}.",
        where=cache.location,
        expected=f"an id like {example!r}",
        got=f"unreadable and not searched: {', '.join(sorted(unreadable))}" if unreadable else None,
        fix="`inpo inspect filter` lists pair ids, and CACHE/skipped names the pairs that were left out",
    )


def view_pair(cache: Cache, shard: Shard, row: int) -> PairView:
    """Read one pair. Raises CacheCorrupt, naming shard and array, for damaged bytes."""
    pair = np.array([row])
    (sides,), (group,) = shard.sides(pair), shard.groups(pair)

    def latents(path: str) -> np.ndarray:
        return shard.read(path, sides).astype(np.float32)

    timestep = shard.read("timestep")[group].astype(np.int64)
    a, s = cache.levels.mixture(timestep)
    return PairView(
        space=cache.levels.space,
        pair_id=str(shard.read("pair/id", pair)[0]),
        prompt=shard.prompts()[group],
        caption_dropped=bool(shard.dropped()[group]),
        label=float(shard.read("pair/label", pair)[0]),
        timestep=timestep,
        a=a,
        s=s,
        x0=latents("x0"),
        x_t=latents("x_t"),
        target=latents("target"),
        delta=latents("delta") if "delta" in shard.stored else None,
        x0_t=latents("x0_t") if "x0_t" in shard.stored else None,
        reference_error=shard.read("reference_error")[sides],
        inversion_error=shard.read("inversion_error")[sides],
    )
