"""The settings that make a cache what it is: what is stored, and how it is made.

[precompute] adds how the work is done. They live here because looking at a cache ends in advice how to make it anew.
"""

from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from pydantic import Field, field_validator

from inpo.common.choices import (
    EMBEDDED_GUIDANCE,
    MAX_TIMESTEPS,
    NOISING,
    ChosenInverter,
    DensityName,
    ExtraName,
    GroupName,
    InverterName,
    NetworkDtypeName,
    Profile,
)
from inpo.common.recipe import Section
from inpo.common.sizes import ImageSize, sides, size_text

if TYPE_CHECKING:
    from inpo.common.cache.schema import InverterIdentity, Manifest


class CacheSettings(Section):
    """Everything that a user chooses of a cache's identity."""

    panels: ClassVar = {"grid_points": "Inversion", "profile": "What is stored"}
    recipe_only: ClassVar = frozenset({"crop"})  # there is only one

    grid_points: int = Field(10, ge=1, le=MAX_TIMESTEPS)
    """n: points of the inversion grid."""
    timesteps_per_pair: int = Field(4, ge=1, le=MAX_TIMESTEPS)
    """K: how many of the n grid points are kept as records."""
    inverter: ChosenInverter = "ddim"
    """The rule that chooses the next x_t. noise: x0 plus noise instead, as Diffusion-DPO has it; tracked: plus the
    noise that the image was made from, by the source's seeds (flow models only, as PNAPO has it)."""
    refine_start: int | None = Field(None, ge=0, le=16)
    """Extra path points near the clean end; unset: 3 for ab2 and fireflow, else 0."""
    noised_start: float = Field(0.0, ge=0.0, le=1.0)
    """Grid points below this share of T are noised instead of inverted."""
    guidance: float = Field(1.0, ge=0.0, le=1e6)
    """0: empty prompt (the paper); 1: caption, the reference error is free; more: classifier-free guidance."""
    iterations: int = Field(5, ge=1, le=10_000)
    """fixed_point: most network calls for each grid point."""
    tolerance: float = Field(1e-3, ge=0.0, le=1e6)
    """fixed_point: relative RMS change at which a grid point is done."""
    caption_dropout: float = Field(0.0, ge=0.0, le=1.0)
    """Share of the pairs that are inverted, and trained, under the empty prompt."""
    faithful: bool = False
    """The released code's grid, noise and rounding."""
    timestep_range: tuple[int, int] | None = None
    """Kept timesteps lie in [LOW, HIGH); unset: all."""

    levels: DensityName | None = None
    """Density of a flow model's levels over time; unset: logit-normal for a flow model, else the scheduler's table."""
    shift: str | None = None
    """What moves a flow model's levels towards noise: auto (as the scheduler does), none, or a number; unset: auto."""
    embedded_guidance: float | None = Field(None, ge=0.0, le=1e3)
    """What a network with guidance built in is told, here and in training; unset: 1."""
    max_tokens: int | None = Field(None, ge=1, le=1 << 16)
    """Tokens that a prompt is cut at and padded to; unset: the model's own number."""

    profile: Profile = "full"
    """lean: x0 and target only, about a quarter of the bytes; the rest is computed from them while training. compact:
    these two in 8 bits, half of lean."""
    extra: tuple[ExtraName, ...] = ()
    """Arrays to store too; repeatable."""
    group: GroupName | None = None
    """Whose images share grid and noise, an image of several pairs being inverted once: those of a pair, of a ranking
    or list, or of a shard's pairs of one prompt; unset: list for a source of rankings, else pair."""
    resolution: ImageSize = "512"
    """Size of the images in pixels: N for squares, or HEIGHTxWIDTH."""
    crop: Literal["center"] = "center"
    """The part of an image that is not square."""
    flip: bool = False
    """Mirror half of the pairs, both sides alike."""
    vae_latent: Literal["mean", "sample"] = "mean"
    """What is taken of the VAE's posterior."""
    measure_inversion: float = Field(0.02, ge=0.0, le=1.0)
    """Share of the pairs whose round trip is measured."""
    dtype: NetworkDtypeName | None = None
    """Network dtype, with -int8 of a quantised one; unset: bfloat16 on a GPU, float32 on a CPU."""
    seed: int = Field(0, ge=-(2**63), lt=2**63)
    """Seed of everything random."""

    @field_validator("shift", mode="before")
    @classmethod
    def _number_or_word(cls, value: object) -> object:
        if value is None or value in ("auto", "none"):
            return value
        try:
            number = float(str(value))
        except ValueError:
            number = 0.0
        if isinstance(value, bool) or not 0 < number < 1e6:
            raise ValueError("auto, none, or a number above 0")
        return str(number)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return sides(self.resolution)

    def without_effect(self) -> dict[str, str]:
        found: dict[str, str] = {}
        if self.inverter in NOISING:
            found |= dict.fromkeys(("noised_start", "refine_start"), f"an --inverter that inverts: {_INVERTING}")
        if self.noised_start >= 1:
            found |= dict.fromkeys(("refine_start", "iterations", "tolerance"), "--noised-start below 1")
        elif self.inverter != "fixed_point":
            found |= dict.fromkeys(("iterations", "tolerance"), "--inverter fixed_point")
        return found

    @field_validator("extra")
    @classmethod
    def _in_order(cls, value: tuple[ExtraName, ...]) -> tuple[ExtraName, ...]:
        return tuple(name for name in get_args(ExtraName) if name in value)

    def inverter_identity(self, num_train_timesteps: int) -> "InverterIdentity":
        """The inverter's part of the identity; what the chosen inverter does not use is left out of it."""
        from inpo.common.cache.schema import InverterIdentity  # torch and zarr, for which a command line would wait

        refine = _usual_refinement(self.inverter) if self.refine_start is None else self.refine_start
        is_noise = self.inverter in NOISING
        is_fixed_point = self.inverter == "fixed_point"
        return InverterIdentity(
            name=self.inverter,
            grid_points=self.grid_points,
            refine_start=0 if is_noise else refine,
            noised_start=1.0 if is_noise else self.noised_start,
            guidance=self.guidance,
            caption_dropout=self.caption_dropout,
            faithful=self.faithful,
            timestep_range=self.timestep_range or (0, num_train_timesteps),
            iterations=self.iterations if is_fixed_point else None,
            tolerance=self.tolerance if is_fixed_point else None,
        )

    @classmethod
    def of(cls, manifest: "Manifest") -> "CacheSettings":
        """The settings that give this identity again, with whatever model and device; of recorded points, which were
        not inverted to, those that invert to others by ddim at the caption alone."""
        inverter = manifest.inverter
        told = {**dict(manifest), **dict(inverter), "inverter": inverter.name, "dtype": manifest.network_dtype}
        told["resolution"] = size_text(*manifest.resolution)
        told["levels"], shift = manifest.levels.density, manifest.levels.shift
        told["shift"] = None if shift is None else str(shift)
        told[EMBEDDED_GUIDANCE] = manifest.static.get(EMBEDDED_GUIDANCE)
        # What the inverter does not use, and what it takes anyway, stays unset.
        if inverter.refine_start == _usual_refinement(inverter.name):
            told["refine_start"] = None
        if inverter.timestep_range == (0, manifest.num_train_timesteps):
            told["timestep_range"] = None
        if inverter.name in NOISING:
            told["noised_start"] = None
        left_out = _OF_INVERSION if inverter.name == "recorded" else ()
        wanted = [name for name in CacheSettings.model_fields if name not in left_out]
        return cls(**{name: told[name] for name in wanted if told[name] is not None})


_INVERTING = ", ".join(name for name in get_args(ChosenInverter) if name not in NOISING)
_OF_INVERSION = ("inverter", "guidance", "faithful", "noised_start", "refine_start", "iterations", "tolerance")


def _usual_refinement(inverter: InverterName) -> int:
    return 3 if inverter in ("ab2", "fireflow") else 0
