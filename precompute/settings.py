"""[precompute]: every setting of the first stage."""

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from inpo.common.cache_settings import CacheSettings
from inpo.common.choices import BatchSize, CompileName
from inpo.common.recipe import Location, Section

MAX_BUCKETS = 64


class PrecomputeSettings(CacheSettings):
    """What makes the cache what it is, and how the work is done, which leaves it unchanged."""

    panels: ClassVar = {**CacheSettings.panels, "like": "From another cache", "batch_size": "Work"}
    most_used: ClassVar = frozenset(
        {"grid_points", "timesteps_per_pair", "inverter", "resolution", "dtype", "seed", "batch_size", "engine"}
    )

    like: Location | None = None
    """Another cache in place of pairs: its x0, texts, groups and pairs are taken, and its settings where none are
    given. The model may be one that was trained from its; unset: none."""
    errors_only: bool = False
    """Keep the other cache's points too, and make only the reference errors and predictions at them anew: one network
    call per record."""

    batch_size: BatchSize = 16
    """Pairs per network batch; auto: the largest power of two that the device takes."""
    compile: CompileName = "auto"
    """What of the network is compiled: its repeated blocks, the whole, or nothing; auto: blocks on a GPU, where the
    work ahead is long enough to pay."""
    decode_workers: int = Field(4, ge=0)
    """Processes that decode and resize images, for each device; 0: the reading thread does it."""
    engine: Literal["local", "ray"] = "local"
    """local: this machine, and all processes under accelerate launch; ray: a worker per GPU of a cluster."""
    buckets: str | None = None
    """Sort the pairs by the shape of their images into a cache for each bucket, in folders HEIGHTxWIDTH of the cache's:
    sdxl, or a number of buckets from 1:2 to 2:1, all with about as many pixels as the resolution's square; unset: one
    cache."""
    limit: int | None = Field(None, ge=1)
    """Stop after the shards that hold the first N rows; with buckets those of each bucket, in the files that have the
    first N of all. Unset: all."""

    def without_effect(self) -> dict[str, str]:
        no_image = {} if self.like is None else {"decode_workers": "--pairs: with --like no image is read"}
        return super().without_effect() | no_image

    @field_validator("buckets", mode="before")
    @classmethod
    def _sdxl_or_number(cls, value: object) -> str | None:
        text = str(value).strip().lower()
        if value is None or text == "sdxl" or (text.isdecimal() and 1 <= int(text) <= MAX_BUCKETS):
            return None if value is None else text
        raise ValueError(f"sdxl, or a number from 1 to {MAX_BUCKETS}")


class RayOptions(Section):
    """How the ray engine finds its workers."""

    panels: ClassVar = {"address": "Ray"}

    address: str | None = None
    """Join this cluster, as host:port; unset: one is started on this machine."""
    gpus_per_worker: float | None = Field(default=None, gt=0.0, le=1.0)
    """GPUs per worker, at most 1, fractions allowed; unset: 1 where there are any."""
    workers: int | None = Field(default=None, ge=1)
    """Most workers; unset: as many as fit."""
