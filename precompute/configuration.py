"""From recipe and flags to a run's settings, and from these and a model to the identity of its cache."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from inpo.common.cache import open_cache
from inpo.common.cache.schema import LevelTables, Manifest
from inpo.common.cache_settings import CacheSettings
from inpo.common.choices import EMBEDDED_GUIDANCE, DtypeName
from inpo.common.denoiser import check_quantiser, compute_name, default_dtype
from inpo.common.errors import UsageError
from inpo.common.inversion import check_distinct, check_settings
from inpo.common.levels import TimeSettings
from inpo.common.models import Model
from inpo.common.processes import processes
from inpo.common.recipe import DataSection, ModelSection, Recipe, option_name, read_recipe, resolve, to_toml
from inpo.common.sizes import check_sides
from inpo.precompute.settings import PrecomputeSettings, RayOptions


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """The settings of a run, as resolved."""

    model_section: ModelSection
    data: DataSection
    settings: PrecomputeSettings
    section: str = "precompute"
    """Of the recipe, which has the settings."""

    def with_batch_size(self, pairs: int) -> "Configuration":
        """The same, where the batch size was to be found."""
        return replace(self, settings=self.settings.model_copy(update={"batch_size": pairs}))

    def to_toml(self, *, differing: bool = False) -> str:
        """As a recipe; `differing`: only what is not the default."""
        sections = {"model": self.model_section, "data": self.data, self.section: self.settings}
        return to_toml(sections, differing=differing)


def configure(
    recipe: Path | None, model_flags: Mapping[str, Any], data_flags: Mapping[str, Any], flags: Mapping[str, Any]
) -> Configuration:
    """Flags win over the recipe, the recipe over defaults. Raises UsageError for a bad value of any."""
    sections = _like(read_recipe(recipe), data_flags, flags)
    return Configuration(
        model_section=resolve(ModelSection, "model", sections, model_flags),
        data=resolve(DataSection, "data", sections, data_flags),
        settings=resolve(PrecomputeSettings, "precompute", sections, flags),
    )


def _like(sections: Recipe, data_flags: Mapping[str, Any], flags: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """The recipe, where a cache is named to be made again that cache's settings below it.

    Raises UsageError for options that do not go together.
    """
    own = sections.get("precompute", {})
    told = {**own, **{name: value for name, value in flags.items() if value is not None}}
    location, errors_only = told.get("like"), bool(told.get("errors_only"))
    if location is None:
        if errors_only:
            raise UsageError(
                "There are no points to keep.", where="--errors-only", expected="--like CACHE", fix="add --like CACHE"
            )
        return sections
    of_pairs = {name: data_flags.get(name) for name in ("pairs", "columns", "pairs_from", "allow_remote")}
    for name, given in {**of_pairs, "buckets": told.get("buckets")}.items():
        if given is not None:
            raise UsageError(
                "The pairs are the other cache's.",
                where=option_name(name),
                expected=f"no {option_name(name)} with --like",
                got=given,
                fix="leave one of them out",
            )
    settings = CacheSettings.of(open_cache(str(location)).manifest).model_dump(exclude_unset=True)
    asked = {name: value for name, value in told.items() if name in CacheSettings.model_fields and name != "dtype"}
    before, wanted = (
        resolve(CacheSettings, "precompute", {"precompute": settings}, each, may_idle=True) for each in ({}, asked)
    )
    changed = [name for name in asked if getattr(wanted, name) != getattr(before, name)]
    if errors_only and changed:
        raise UsageError(
            "--errors-only keeps the other cache's points, and all that they hang on.",
            where=", ".join(option_name(name) for name in changed),
            expected="the other cache's own settings, but for --dtype",
            got=", ".join(str(told[name]) for name in changed),
            fix="leave them out, or leave out --errors-only",
        )
    found = Recipe({**sections, "precompute": {**settings, **own}})
    found.path = sections.path
    return found


def build_manifest(
    settings: PrecomputeSettings, model: Model, *, device_type: str, levels_size: tuple[int, int] | None = None
) -> Manifest:
    """The identity of the cache that these settings and this model make. Raises UsageError for what cannot be made.
    `levels_size`: the size of image that a flow's levels are for; None: the settings' own.
    """
    vae = model.config("vae")
    family = model.family
    static = family.static(model.config)
    _refuse_unused(settings, model, static)
    network_dtype = settings.dtype or default_dtype(device_type)
    check_sides(settings.resolution, family.pixel_step(model.config), family.longest_side(model.config))
    latent_shape = family.latent_shape(model.config, settings.size)
    times = TimeSettings(
        density=settings.levels or "logit-normal",
        shift=settings.shift or "auto",
        latent_shape=family.latent_shape(model.config, levels_size or settings.size),
        network_dtype=network_dtype,
    )
    levels = family.levels(model.scheduler, times)
    identity = settings.inverter_identity(levels.num_train_timesteps)
    points = option_name("grid_points", type(settings).model_fields["grid_points"])
    check_settings(
        identity,
        num_train_timesteps=levels.num_train_timesteps,
        timesteps_per_pair=settings.timesteps_per_pair,
        option=points,
    )
    check_distinct(levels, settings.grid_points, option=points)
    # Some VAEs overflow in half precision; the configuration says whether a repaired one may run lower.
    check_quantiser(network_dtype)
    vae_dtype = "float32" if vae.get("force_upcast", True) else compute_name(network_dtype)
    if settings.faithful and settings.group not in (None, "pair"):
        raise UsageError(
            "--faithful draws its noise by pair.",
            where="--group",
            expected="pair",
            got=settings.group,
            fix="leave out --group or --faithful",
        )
    if settings.inverter == "tracked":
        _check_tracked(settings, model)
    if settings.faithful and settings.profile == "compact":
        raise UsageError(
            "--faithful rounds as the released code does.",
            where="--profile",
            expected="full or lean",
            got=settings.profile,
            fix="choose one of them, or leave out --faithful",
        )
    return Manifest(
        family=family.name,
        latent_shape=latent_shape,
        levels=LevelTables.of(levels),
        conditions=dict(family.conditions),
        static=static | ({} if settings.embedded_guidance is None else {EMBEDDED_GUIDANCE: settings.embedded_guidance}),
        profile=settings.profile,
        extra=settings.extra,
        seed=settings.seed,
        timesteps_per_pair=settings.timesteps_per_pair,
        group=settings.group or "pair",
        max_tokens=settings.max_tokens or family.max_tokens,
        resolution=settings.size,
        crop=settings.crop,
        flip=settings.flip,
        vae_latent=settings.vae_latent,
        vae_dtype=cast(DtypeName, vae_dtype),
        network_dtype=network_dtype,
        measure_inversion=settings.measure_inversion,
        inverter=identity,
        fingerprints=model.fingerprints,
        versions={name: version(name) for name in ("torch", "diffusers", "transformers", "zarr", "numpy", "pillow")},
    )


def _check_tracked(settings: PrecomputeSettings, model: Model) -> None:
    """Raise UsageError where the noise that an image was made from is not the noise at its levels."""
    if model.family.space != "velocity":
        raise UsageError(
            "An image's own noise is for flow models.",
            where="--inverter",
            expected=f"ddim, ab2, fireflow, fixed_point or noise for {model.family.title}",
            got="tracked",
            fix="the paths of other models bend: between an image and its own noise lie points that they never visit, "
            "and training there was worse than with fresh noise (docs/models.md)",
        )
    if settings.flip:
        raise UsageError(
            "A mirrored image was not made from its noise.",
            where="--flip",
            expected="no --flip with --inverter tracked",
            got="--flip",
            fix="leave one of them out",
        )


def _refuse_unused(settings: PrecomputeSettings, model: Model, static: Mapping[str, float]) -> None:
    """Raise UsageError for an option that this model has no use for."""
    is_flow = model.family.space == "velocity"
    for value, option, is_used, why in (
        (settings.levels, "--levels", is_flow, "its scheduler has a table of levels"),
        (settings.shift, "--shift", is_flow, "its scheduler has a table of levels"),
        (
            settings.embedded_guidance,
            "--embedded-guidance",
            EMBEDDED_GUIDANCE in static,
            "its network is told no guidance",
        ),
    ):
        if value is not None and not is_used:
            raise UsageError(
                "The model has no use for this option.",
                where=option,
                expected=f"no {option} for {model.family.title}: {why}",
                got=value,
                fix="leave it out",
            )
    model.family.check_tokens(settings.max_tokens)


def check_ray(settings: PrecomputeSettings, ray_options: RayOptions) -> None:
    """Raise UsageError for options of Ray where another engine does the work."""
    if settings.engine != "ray" and ray_options != RayOptions():
        raise UsageError(
            "Ray options without the ray engine.",
            where="--engine",
            expected="ray",
            got=settings.engine,
            fix="add --engine ray, or leave out --ray-address, --gpus-per-worker and --ray-workers",
        )


def device_type(settings: PrecomputeSettings, ray_options: RayOptions | None) -> str:
    """The device that will do the work. Ray's workers may have GPUs that this process has not, so the cluster is asked;
    without `ray_options` nothing is started and this machine stands for it."""
    if settings.engine == "ray" and ray_options is not None:
        from inpo.precompute.engines.ray_cluster import connect, has_gpus

        connect(ray_options)
        return "cuda" if has_gpus() else "cpu"
    return str(processes().device.type)
