"""Inverting cached pairs again, from the cache alone: x0, embeddings and settings are all in it."""

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
from inpo.common.inversion import Inverted, invert
from inpo.common.models import Model
from inpo.common.seeding import stable_hash
from inpo.inspection.pair_table import PairTable


@dataclass(frozen=True, kw_only=True, eq=False)
class Again:
    """Some pairs of one shard, as cached and as inverted again. Latents float32, on the CPU."""

    shard: str
    pair_ids: list[str]
    timestep: Int[np.ndarray, "pair step"]
    cached_x_t: Float[np.ndarray, "pair step side c h w"]
    cached_target: Float[np.ndarray, "pair step side c h w"]
    cached_error: Float[np.ndarray, "pair step side"]
    error_at_stored: Float[np.ndarray, "pair step side"]
    """The reference error that this network gives at the stored x_t and target."""
    prediction_rms: Float[np.ndarray, "pair step side"]
    """RMS of its noise prediction there."""
    inverted: Inverted

    def change(self, name: str) -> Float[np.ndarray, "pair step side"]:
        """Relative RMS change of x_t or target, per record and side."""
        cached = {"x_t": self.cached_x_t, "target": self.cached_target}[name]
        again = getattr(self.inverted, name).float().numpy()
        axes = (-3, -2, -1)
        return np.sqrt(((again - cached) ** 2).mean(axes) / np.maximum((cached**2).mean(axes), 1e-12))

    @property
    def error_change(self) -> Float[np.ndarray, "pair step side"]:
        """Relative change of the reference error when the network sees the stored x_t again."""
        return np.abs(self.error_at_stored - self.cached_error) / np.maximum(self.cached_error, 1e-12)

    def error_change_limit(self, tolerance: float) -> Float[np.ndarray, "pair step side"]:
        """What a prediction that is off by `tolerance` (relative RMS) can do: (2 sqrt(E) d + d^2) / E."""
        off = tolerance * self.prediction_rms
        return (2 * np.sqrt(self.cached_error) * off + off**2) / np.maximum(self.cached_error, 1e-12)


def choose_pairs(
    table: PairTable, count: int, *, among: Bool[np.ndarray, "pair"] | None = None
) -> Int[np.ndarray, "chosen"]:
    """`count` rows of the table, drawn by the hash of the pair id: the same on every run, spread over the cache."""
    rows = np.arange(len(table)) if among is None else np.flatnonzero(among)
    hashes = [stable_hash("inspect", table.pair_id[row]) for row in rows]
    return np.sort(rows[np.argsort(np.array(hashes, dtype=np.uint64), kind="stable")[:count]])


def load_denoiser(cache: Cache, model: Model) -> Denoiser:
    """The model's network in the cache's dtype, on the GPU if there is one.

    Raises CacheMismatch if it takes other latents or conditions or walks other levels than the cache's.
    """
    manifest = cache.manifest
    shape, levels = model.family.latent_shape(model.config, manifest.resolution), LevelTables.of(model.levels)
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
    return model.denoiser(network, cache.levels, network_dtype=manifest.network_dtype)


def reinvert(
    cache: Cache,
    table: PairTable,
    chosen: Int[np.ndarray, "chosen"],
    denoiser: Denoiser,
    on_pairs: Callable[[int], None] = lambda count: None,
    damaged: dict[str, InpoError] | None = None,
) -> Iterator[Again]:
    """Invert the chosen pairs with `denoiser` under the cache's own settings, shard by shard.

    A shard that cannot be read lands in `damaged` and is left out; without `damaged` its error is raised.
    """
    for index in np.unique(table.shard[chosen]):
        shard = cache.shards[table.shard_names[index]]
        rows = table.row[chosen[table.shard[chosen] == index]]
        try:
            again = _again(shard, rows, denoiser)
        except CacheError as error:
            if damaged is None:
                raise
            damaged[shard.name] = error
            continue
        yield again
        on_pairs(len(rows))


def _again(shard: Shard, rows: Int[np.ndarray, "pair"], denoiser: Denoiser) -> Again:
    manifest = shard.cache.manifest
    pair_ids = [str(name) for name in shard.read("pair_id")[rows]]
    timestep = shard.read("timestep", rows).astype(np.int64)
    x_t, target = (shard.read(path, rows).astype(np.float32) for path in ("x_t", "target"))
    inverted = invert(
        denoiser,
        torch.from_numpy(shard.read("x0", rows)),
        pair_ids,
        identity=manifest.inverter,
        seed=manifest.seed,
        timesteps_per_pair=manifest.timesteps_per_pair,
        caption=Condition.of(shard, rows),
        empty=Condition.empty(shard, rows),
    )
    error, rms = _at_stored(denoiser, shard, rows, timestep, x_t, target)
    return Again(
        shard=shard.name,
        pair_ids=pair_ids,
        timestep=timestep,
        cached_x_t=x_t,
        cached_target=target,
        cached_error=shard.read("reference_error")[rows],
        error_at_stored=error,
        prediction_rms=rms,
        inverted=inverted,
    )


@torch.inference_mode()
def _at_stored(
    denoiser: Denoiser,
    shard: Shard,
    rows: Int[np.ndarray, "pair"],
    timestep: Int[np.ndarray, "pair step"],
    x_t: Float[np.ndarray, "pair step side c h w"],
    target: Float[np.ndarray, "pair step side c h w"],
) -> tuple[Float[np.ndarray, "pair step side"], Float[np.ndarray, "pair step side"]]:
    """(MSE(target - eps), RMS of eps) with eps the network's prediction at the stored x_t under the caption."""
    errors, sizes = [], []
    for index, row in enumerate(rows):
        condition = Condition.of(shard, np.array([row])).to(denoiser.device)
        for step in range(timestep.shape[1]):
            x = torch.from_numpy(x_t[index, step]).to(denoiser.device)
            label = torch.full((2,), int(timestep[index, step]), device=denoiser.device)
            eps = denoiser(x, label, condition).cpu().numpy()
            errors.append(((target[index, step] - eps) ** 2).mean((1, 2, 3)))
            sizes.append(np.sqrt((eps**2).mean((1, 2, 3))))
    shape = (*timestep.shape, 2)
    return np.stack(errors).reshape(shape), np.stack(sizes).reshape(shape)
