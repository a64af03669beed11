"""[precompute]: every setting of the first stage, and the cache identity that follows from it and a model."""

from importlib.metadata import version
from typing import Literal

from pydantic import Field, field_validator

from inpo.common.cache.schema import EXTRAS, MAX_TIMESTEPS, InverterIdentity, LevelTables, Manifest
from inpo.common.denoiser import default_dtype, dtype_name
from inpo.common.errors import UsageError
from inpo.common.inversion import INVERTERS, check_settings
from inpo.common.models import Model
from inpo.common.recipe import Section


class PrecomputeSettings(Section):
    """What is stored, how it is made, and how the work is done. Only the last group leaves the cache unchanged."""

    steps: int = Field(10, ge=1, le=MAX_TIMESTEPS)
    """n: points of the inversion grid."""
    timesteps_per_pair: int = Field(4, ge=1, le=MAX_TIMESTEPS)
    """K: how many of the n points are kept as records."""
    inverter: str = "ddim"
    refine_start: int | None = Field(None, ge=0, le=16)
    """Extra path points near the clean end; unset: 3 for ab2, 0 otherwise."""
    noised_start: float = Field(0.0, ge=0.0, le=1.0)
    """Grid points below this share of T are noised instead of inverted."""
    guidance: float = Field(1.0, ge=0.0, le=1e6)
    """0: empty prompt (the paper); 1: caption, the reference error is free; more: classifier-free guidance."""
    iterations: int = Field(5, ge=1, le=10_000)
    """fixed_point: most network calls per step."""
    tolerance: float = Field(1e-3, ge=0.0, le=1e6)
    """fixed_point: relative RMS change at which a step is done."""
    caption_dropout: float = Field(0.0, ge=0.0, le=1.0)
    faithful: bool = False
    timestep_range: tuple[int, int] | None = None
    """Kept timesteps lie in [low, high); unset: all."""
    profile: Literal["full", "lean"] = "full"
    extra: tuple[str, ...] = ()
    resolution: int = Field(512, ge=8, le=1 << 16)
    """Side of the square images in pixels."""
    crop: Literal["center"] = "center"
    flip: bool = False
    """Mirror half of the pairs (both sides alike)."""
    vae_latent: Literal["mean", "sample"] = "mean"
    measure_inversion: float = Field(0.02, ge=0.0, le=1.0)
    """Share of the pairs whose round trip is measured."""
    dtype: str | None = None
    """Network dtype; unset: bfloat16 on a GPU, float32 on a CPU."""
    seed: int = Field(0, ge=-(2**63), lt=2**63)

    batch_size: int = Field(16, ge=1)
    """Pairs per network batch."""
    decode_workers: int = Field(4, ge=0)
    """Processes that decode and resize images, for each device; 0: the reading thread does it."""
    engine: Literal["local", "ray"] = "local"
    limit: int | None = Field(None, ge=1)
    """Stop after the shards that hold the first N rows."""

    @field_validator("inverter")
    @classmethod
    def _known_inverter(cls, value: str) -> str:
        if value not in INVERTERS:
            raise ValueError(f"unknown inverter {value!r}; there are {', '.join(INVERTERS)}")
        return value

    @field_validator("extra")
    @classmethod
    def _known_extra(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in EXTRAS:
                raise ValueError(f"unknown extra {name!r}; there are {', '.join(EXTRAS)}")
        return tuple(name for name in EXTRAS if name in value)

    def inverter_identity(self, num_train_timesteps: int) -> InverterIdentity:
        """The inverter's part of the identity; what the chosen inverter does not use is left out of it."""
        refine = self.refine_start if self.refine_start is not None else (3 if self.inverter == "ab2" else 0)
        is_noise = self.inverter == "noise"
        is_fixed_point = self.inverter == "fixed_point"
        return InverterIdentity(
            name=self.inverter,
            steps=self.steps,
            refine_start=0 if is_noise else refine,
            noised_start=1.0 if is_noise else self.noised_start,
            guidance=self.guidance,
            caption_dropout=self.caption_dropout,
            faithful=self.faithful,
            timestep_range=self.timestep_range or (0, num_train_timesteps),
            iterations=self.iterations if is_fixed_point else None,
            tolerance=self.tolerance if is_fixed_point else None,
        )


def build_manifest(settings: PrecomputeSettings, model: Model, *, device_type: str) -> Manifest:
    """The identity of the cache that these settings and this model make. Raises UsageError for what cannot be made."""
    levels = model.levels
    vae = model.config("vae")
    family = model.family
    factor = family.pixel_step(model.config)
    identity = settings.inverter_identity(levels.num_train_timesteps)
    check_settings(
        identity, num_train_timesteps=levels.num_train_timesteps, timesteps_per_pair=settings.timesteps_per_pair
    )
    network_dtype = dtype_name(settings.dtype or default_dtype(device_type))
    # Some VAEs overflow in half precision; the configuration says whether a repaired one may run lower.
    vae_dtype = "float32" if vae.get("force_upcast", True) else network_dtype
    if settings.resolution % factor:
        raise UsageError(
            "The resolution does not fit the model.",
            where="--resolution",
            expected=f"a multiple of {factor}",
            got=settings.resolution,
            fix=f"round it to {round(settings.resolution / factor) * factor}",
        )
    return Manifest(
        family=family.name,
        latent_shape=family.latent_shape(model.config, settings.resolution),
        levels=LevelTables.of(levels),
        conditions=dict(family.conditions),
        profile=settings.profile,
        extra=settings.extra,
        seed=settings.seed,
        timesteps_per_pair=settings.timesteps_per_pair,
        resolution=settings.resolution,
        crop=settings.crop,
        flip=settings.flip,
        vae_latent=settings.vae_latent,
        vae_dtype=vae_dtype,
        network_dtype=network_dtype,
        measure_inversion=settings.measure_inversion,
        inverter=identity,
        fingerprints=model.fingerprints,
        versions={name: version(name) for name in ("torch", "diffusers", "transformers", "zarr", "numpy", "pillow")},
    )
