"""Inverting cached pairs again, from the cache alone: x0, texts and settings are all in it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from inpo.common.cache import Cache, Shard
from inpo.common.cache.identity import same_levels
from inpo.common.cache.schema import LevelTables
from inpo.common.conditions import Condition
from inpo.common.denoiser import Denoiser, prepare_for_inference
from inpo.common.errors import CacheError, CacheMismatch, InpoError
from inpo.common.inversion import Group, Inverted, evaluate_points, invert, own_noise, together
from inpo.common.models import Model
from inpo.common.seeding import stable_hash
from inpo.inspection.pair_table import PairTable


@dataclass(frozen=True, kw_only=True, eq=False)
class Again:
    """Some pairs of one shard, as cached and as inverted again. Latents float32, on the CPU."""

    shard: str
    pair_ids: list[str]
    timestep: Int[np.ndarray, "pair record"]
    timestep_again: Int[np.ndarray, "pair record"]
    cached_x_t: Float[np.ndarray, "pair side record c h w"]
    cached_target: Float[np.ndarray, "pair side record c h w"]
    cached_error: Float[np.ndarray, "pair side record"]
    error_at_stored: Float[np.ndarray, "pair side record"]
    """The reference error that this network gives at the stored x_t and target."""
    prediction_rms: Float[np.ndarray, "pair side record"]
    """RMS of its prediction there."""
    x_t: Float[np.ndarray, "pair side record c h w"]
    target: Float[np.ndarray, "pair side record c h w"]
    finite: Bool[np.ndarray, " pair"]
    """Whether both images' new inversions hold numbers."""

    def change(self, name: str) -> Float[np.ndarray, "pair side record"]:
        """Relative RMS change of x_t or target, per side and record."""
        cached = {"x_t": self.cached_x_t, "target": self.cached_target}[name]
        again = {"x_t": self.x_t, "target": self.target}[name]
        axes = (-3, -2, -1)
        return np.sqrt(((again - cached) ** 2).mean(axes) / np.maximum((cached**2).mean(axes), 1e-12))

    @property
    def error_change(self) -> Float[np.ndarray, "pair side record"]:
        """Relative change of the reference error when the network sees the stored x_t again."""
        return np.abs(self.error_at_stored - self.cached_error) / np.maximum(self.cached_error, 1e-12)

    def error_change_limit(self, tolerance: float) -> Float[np.ndarray, "pair side record"]:
        """What a prediction that is off by `tolerance` (relative RMS) can do: (2 sqrt(E) d + d^2) / E."""
        off = tolerance * self.prediction_rms
        return (2 * np.sqrt(self.cached_error) * off + off**2) / np.maximum(self.cached_error, 1e-12)


def choose_pairs(
    table: PairTable, count: int, *, among: Bool[np.ndarray, " pair"] | None = None
) -> Int[np.ndarray, " chosen"]:
    """`count` rows of the table, drawn by the hash of the pair id: the same on every run, spread over the cache."""
    rows = np.arange(len(table)) if among is None else np.flatnonzero(among)
    hashes = [stable_hash("inspect", table.pair_id[row]) for row in rows]
    return np.sort(rows[np.argsort(np.array(hashes, dtype=np.uint64), kind="stable")[:count]])


def load_denoiser(cache: Cache, model: Model) -> Denoiser:
    """The model's network in the cache's dtype, on the GPU if there is one.

    Raises CacheMismatch if it takes other latents or conditions or walks other levels than the cache's.
    """
    manifest = cache.manifest
    shape, levels = (
        model.family.latent_shape(model.config, manifest.resolution),
        LevelTables.of(model.levels_of(manifest)),
    )
    same = same_levels(levels, manifest.levels)
    # The very weights under another scheduler's configuration would be read as predicting something else.
    found, stored = model.fingerprints, manifest.fingerprints
    if found["network"] == stored.get("network") and found["scheduler"] != stored.get("scheduler"):
        same = False
    if shape != manifest.latent_shape or not same or model.family.name != manifest.family:
        raise CacheMismatch(
            "The model cannot walk this cache's latents.",
            where=model.name,
            expected=f"latents {list(manifest.latent_shape)} of a {manifest.family} model, the cache's levels "
            f"(T = {manifest.num_train_timesteps}) and scheduler",
            got=f"latents {list(shape)}, {model.family.name}, {'the same' if same else 'other'} levels or scheduler",
            fix="pass the model that the cache was made with, or one trained from it",
        )
    network = model.load_network()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prepare_for_inference(network, network_dtype=manifest.network_dtype, device=device)
    return model.denoiser(network, manifest, network_dtype=manifest.network_dtype)


def reinvert(
    cache: Cache,
    table: PairTable,
    chosen: Int[np.ndarray, " chosen"],
    denoiser: Denoiser,
    on_pairs: Callable[[int], None] = lambda count: None,
    unreadable: dict[str, InpoError] | None = None,
) -> Iterator[Again]:
    """Invert the chosen pairs with `denoiser` under the cache's own settings, shard by shard.

    A shard that cannot be read lands in `unreadable` and is left out; without `unreadable` its error is raised.
    """
    for index in np.unique(table.shard[chosen]):
        shard = cache.shards[table.shard_names[index]]
        rows = table.row[chosen[table.shard[chosen] == index]]
        try:
            again = _again(shard, rows, denoiser)
        except CacheError as error:
            if unreadable is None:
                raise
            unreadable[shard.name] = error
            continue
        yield again
        on_pairs(len(rows))


def _again(shard: Shard, rows: Int[np.ndarray, " pair"], denoiser: Denoiser) -> Again:
    manifest = shard.cache.manifest
    sides, groups = shard.sides(rows), shard.groups(rows)
    images, inverted = _invert_images(shard, sides, denoiser)
    at = np.searchsorted(images, sides)
    timestep = shard.read("timestep", groups).astype(np.int64)
    latent = (*sides.shape, manifest.timesteps_per_pair, *manifest.latent_shape)
    x_t, target = (shard.read(path, sides.ravel()).astype(np.float32).reshape(latent) for path in ("x_t", "target"))
    error, rms = _at_stored(denoiser, shard, sides, timestep, x_t, target)
    return Again(
        shard=shard.name,
        pair_ids=[str(name) for name in shard.read("pair/id", rows)],
        timestep=timestep,
        timestep_again=inverted.timestep.numpy()[np.searchsorted(np.unique(shard.read("image/group", images)), groups)],
        cached_x_t=x_t,
        cached_target=target,
        cached_error=shard.read("reference_error")[sides],
        error_at_stored=error,
        prediction_rms=rms,
        x_t=inverted.x_t.float().numpy()[at],
        target=inverted.target.float().numpy()[at],
        finite=np.all(inverted.finite.numpy()[at], axis=1),
    )


def _invert_images(
    shard: Shard, sides: Int[np.ndarray, "pair side"], denoiser: Denoiser
) -> tuple[Int[np.ndarray, " image"], Inverted]:
    """(rows, inversion) of some images and of those that walk with them, as precompute inverted them; of a large group
    no more than these. Recorded points are where they were."""
    manifest = shard.cache.manifest
    group = shard.read("image/group")
    if manifest.inverter.name == "recorded":
        images = np.unique(sides)
        groups, group_of = np.unique(group[images], return_inverse=True)
        x0, target = (torch.from_numpy(shard.read(path, images)) for path in ("x0", "target"))
        timestep = torch.from_numpy(shard.read("timestep", groups))
        caption = Condition.of(shard, images)
        return images, evaluate_points(denoiser, x0, target, timestep, group_of=group_of.tolist(), caption=caption)
    first, size = np.searchsorted(group, np.arange(shard.commit.num_groups)), np.bincount(group)
    wanted = {
        int(first[number]) + mate
        for image in np.unique(sides).tolist()
        for number in [group[image]]
        for mate in together(image - int(first[number]), int(size[number]))
    }
    images = np.array(sorted(wanted), dtype=np.int64)
    ids = shard.read("group/id")
    numbers, counts = np.unique(group[images], return_counts=True)
    inverted = invert(
        denoiser,
        torch.from_numpy(shard.read("x0", images)),
        [Group(id=str(ids[number]), num_images=int(count)) for number, count in zip(numbers, counts, strict=True)],
        identity=manifest.inverter,
        seed=manifest.seed,
        timesteps_per_pair=manifest.timesteps_per_pair,
        caption=Condition.of(shard, images),
        empty=Condition.empty(shard, images),
        compact=manifest.profile == "compact",
        own_noise=own_noise(shard, images) if manifest.inverter.name == "tracked" else None,
    )
    return images, inverted


@torch.inference_mode()
def _at_stored(
    denoiser: Denoiser,
    shard: Shard,
    sides: Int[np.ndarray, "pair side"],
    timestep: Int[np.ndarray, "pair record"],
    x_t: Float[np.ndarray, "pair side record c h w"],
    target: Float[np.ndarray, "pair side record c h w"],
) -> tuple[Float[np.ndarray, "pair side record"], Float[np.ndarray, "pair side record"]]:
    """(MSE(target - eps), RMS of eps) with eps the network's prediction, of what the target
    is of, at the stored x_t under the caption."""
    errors, sizes = np.empty(x_t.shape[:3], np.float32), np.empty(x_t.shape[:3], np.float32)
    for pair, images in enumerate(sides):
        condition = Condition.of(shard, images).to(denoiser.device)
        for record in range(timestep.shape[1]):
            x = torch.from_numpy(x_t[pair, :, record]).to(denoiser.device)
            label = torch.full((2,), int(timestep[pair, record]), device=denoiser.device)
            eps = denoiser(x, label, condition).cpu().numpy()
            errors[pair, :, record] = ((target[pair, :, record] - eps) ** 2).mean((1, 2, 3))
            sizes[pair, :, record] = np.sqrt((eps**2).mean((1, 2, 3)))
    return errors, sizes
