"""`inpo inspect drift`: how far the cached points are from those a trained model would invert to.

The released code inverts with the network in training; a cache inverts once, with the reference. What that costs is
measured here: the same pairs, settings and randomness, another network.
"""

import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from inpo.common.cache import Cache, open_cache
from inpo.common.errors import CacheCorrupt, InpoError, UsageError, command
from inpo.common.models import Model
from inpo.common.options import flags
from inpo.common.recipe import DataSection, ModelSection
from inpo.inspection.pair_table import nothing_readable, read_pair_table
from inpo.inspection.reinvert import choose_pairs, load_denoiser, reinvert
from inpo.inspection.summary import timestep_ranges

KEEP_BELOW, REFRESH_ABOVE = 0.1, 0.2
"""Relative RMS change of the target. Yardstick: the target of ddim with 10 steps is itself about 0.2 away from the
exact path's (docs/inversion.md), so that half of it is lost in the inverter's own error and more than all of it
is not."""


@dataclass(frozen=True, kw_only=True)
class DriftBin:
    """Records with low <= timestep < high: median relative RMS change; None in an empty bin."""

    low: int
    high: int
    num_records: int
    x_t: float | None
    target: float | None


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How far a model's inversion is from the cache's."""

    location: str
    model: str
    num_pairs: int
    num_sampled: int
    num_not_finite: int
    """Sampled pairs whose new inversion holds NaN or infinity; left out of the figures."""
    same_weights: bool
    x_t: float | None
    """Relative RMS change over all sampled records; None if no inversion was finite."""
    target: float | None
    bins: list[DriftBin]
    unreadable: list[str]
    verdict: str
    """keep, watch or refresh."""
    advice: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_drift(
    location: str, model: Model, *, num_sampled: int = 64, on_pairs: Callable[[int], None] = lambda count: None
) -> Drift:
    """Invert a sample of the cached pairs with `model` and compare. Damaged shards are named and left out.

    Raises CacheMismatch if the model cannot walk the cache's latents, CacheMissing if there is no readable pair.
    """
    bad: dict[str, Any] = {}
    cache = open_cache(location, damaged=bad)
    unreadable: dict[str, InpoError] = dict(bad)
    if cache.manifest.inverter.name == "recorded":
        raise UsageError(
            "Nothing was inverted here that another model could invert elsewhere.",
            where=cache.location,
            expected="a cache of inverted pairs",
            got="recorded points",
            fix="the model in training makes points of its own: `inpo sample` with it; or "
            f"`{command('precompute', '--like', cache.location, '--errors-only')}` for its errors at these",
        )
    table = read_pair_table(cache, unreadable)
    if not len(table):
        raise nothing_readable(cache, unreadable)
    denoiser = load_denoiser(cache, model)
    chosen = choose_pairs(table, num_sampled)
    timesteps: list[np.ndarray] = []
    changes: dict[str, list[np.ndarray]] = {"x_t": [], "target": []}
    num_sampled_pairs = num_not_finite = 0
    for again in reinvert(cache, table, chosen, denoiser, on_pairs, unreadable):
        finite = again.finite
        num_sampled_pairs += len(finite)
        num_not_finite += int((~finite).sum())
        timesteps.append(np.repeat(again.timestep[finite][:, None], 2, axis=1).ravel())
        for name, values in changes.items():
            values.append(again.change(name)[finite].ravel())
    if not timesteps:
        raise nothing_readable(cache, unreadable)
    timestep = np.concatenate(timesteps)
    x_t, target = np.concatenate(changes["x_t"]), np.concatenate(changes["target"])
    overall = {name: _rms(values) for name, values in (("x_t", x_t), ("target", target))}
    moved = float("inf") if overall["target"] is None else overall["target"]
    same = cache.manifest.fingerprints.get("network") == model.fingerprints.get("network")
    verdict = "refresh" if moved > REFRESH_ABOVE else "watch" if moved > KEEP_BELOW else "keep"
    return Drift(
        location=cache.location,
        model=model.name,
        num_pairs=cache.num_pairs,
        num_sampled=num_sampled_pairs,
        num_not_finite=num_not_finite,
        same_weights=same,
        **overall,
        bins=_bins(timestep, x_t, target, cache.manifest.num_train_timesteps),
        unreadable=sorted(unreadable),
        verdict=verdict,
        advice=_advice(cache, model, verdict),
    )


def _rms(values: np.ndarray) -> float | None:
    return float(np.sqrt((values.astype(np.float64) ** 2).mean())) if len(values) else None


def _bins(timestep: np.ndarray, x_t: np.ndarray, target: np.ndarray, num_train_timesteps: int) -> list[DriftBin]:
    bins = []
    for low, high in timestep_ranges(num_train_timesteps):
        inside = (timestep >= low) & (timestep < high)
        some = bool(inside.any())
        bins.append(
            DriftBin(
                low=low,
                high=high,
                num_records=int(inside.sum()) // 2,
                x_t=float(np.median(x_t[inside])) if some else None,
                target=float(np.median(target[inside])) if some else None,
            )
        )
    return bins


def _advice(cache: Cache, model: Model, verdict: str) -> str:
    if verdict == "keep":
        return "Keep the cache: the change is below the inverter's own error."
    if verdict == "watch":
        return "Keep the cache for now, and measure again later in training: the change nears the inverter's own error."
    return (
        "Refresh: the change is larger than the inverter's own error. The new cache's reference is the trained model:\n"
        f"  {refresh_command(cache, model)}"
    )


def refresh_command(cache: Cache, model: Model) -> str:
    """The precompute command that makes this cache anew with another model."""
    told = _last_configuration(cache)
    vae = model.vae_folder
    if vae is None and model.fingerprints.get("vae") != cache.manifest.fingerprints.get("vae"):
        vae = told.get("model", {}).get("vae")
    chosen = ModelSection(
        model=model.name,
        variant=model.variant,
        model_config_dir=str(model.folder) if model.file is not None and model.guessed_from is None else None,
        vae=None if vae is None else str(vae),
    )
    to = DataSection(cache=f"{cache.location}-refreshed")
    return command("precompute", "--like", cache.location, *flags(to, chosen))


def _last_configuration(cache: Cache) -> dict[str, dict[str, Any]]:
    """What the last precompute run was told, by section of the recipe; nothing if that is not kept.

    Raises CacheCorrupt for a document that is not the one that was written.
    """
    names = sorted(name for name in cache.store.listing("configurations") if name.endswith(".toml"))
    data = cache.store.get(f"configurations/{names[-1]}") if names else None
    try:
        return tomllib.loads(data.decode()) if data else {}
    except ValueError as error:
        raise CacheCorrupt(
            "What the last precompute run was told cannot be read.",
            where=cache.store.path(f"configurations/{names[-1]}"),
            expected="the recipe that the run wrote",
            got=str(error),
            fix="remove the file: it is kept for people",
        ) from None
