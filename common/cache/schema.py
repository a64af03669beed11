"""The cache contract as data: the manifest. Commits and skipped rows are in commits.py.

`cache_schema.md` is the promise in words; a test holds the two together.
"""

import itertools
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from inpo.common.cache.document import ConditionName, Digest, Document, Name, Pixels, Share, Timesteps, Version, load
from inpo.common.cache.specs import ARRAYS, TEXT, ArraySpec
from inpo.common.choices import (
    MAX_TIMESTEPS,
    DensityName,
    DtypeName,
    ExtraName,
    GroupName,
    InverterName,
    NetworkDtypeName,
    Profile,
    Space,
)
from inpo.common.errors import CacheSchemaError

if TYPE_CHECKING:
    from inpo.common.levels import Levels

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
SAMPLE = "sample.json"
"""What samples depend on beside the manifest."""
BUCKETS = "buckets.json"
"""In a folder whose caches are those of buckets: {"buckets": [their folders]}."""
REMOVING = ".removing"
"""Ends the name of a mark beside an attempt, `<attempt>.<random>.removing`: `inpo inspect clean` is removing it."""
CONFIGURATION_SEAL = "# digest of the lines above: "

_TABLES = ("signal", "noise", "label")
EMPTY_PROMPT = "empty"
"""Name of the text shard that has the empty prompt."""


class InverterIdentity(Document):
    """How the latents were made: every setting that changes numbers."""

    name: InverterName
    grid_points: Timesteps
    refine_start: Annotated[int, Field(ge=0, le=16)] = 0
    noised_start: Share = 0.0
    guidance: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    caption_dropout: Share = 0.0
    faithful: bool = False
    timestep_range: tuple[int, int]
    """Kept timesteps lie in [low, high)."""
    iterations: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """fixed_point only: the maximum of iterations per grid point."""
    tolerance: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """fixed_point only: the relative RMS change at which the iteration stops."""


class ConditionSpec(Document):
    """One of the tensors that the network is told: an array of the text shards, or image/<name> of the others."""

    dtype: Literal["float16", "float32", "int32", "bool"]
    axes: Annotated[tuple[ConditionName, ...], Field(max_length=4)]
    """Names of the axes behind the owner's."""
    per: Literal["prompt", "image"]

    def array(self, name: str) -> ArraySpec:
        """The array that holds it."""
        return ArraySpec(
            path=name if self.per == "prompt" else f"image/{name}",
            dtype=self.dtype,
            axes=(self.per, *self.axes),
            chunking="prompt" if self.per == "prompt" and self.axes else "whole",
            meaning=f"what the network is told as {name}, by {self.per}",
            compressed=self.per == "prompt",
        )


class LevelTables(Document):
    """The levels that every writer and reader of a cache walks: with them no reader needs the model to derive x_t.

    Taken from here to the last bit, even where another version of the libraries would round a scheduler's table
    differently.
    """

    space: Space
    floor: Annotated[float, Field(gt=0, le=1e3)]
    density: DensityName | None = None
    """Of a flow's times, before the shift; None in noise space."""
    shift: Annotated[float, Field(gt=0, le=1e6)] | None = None
    signal: Annotated[tuple[Share, ...], Field(min_length=1, max_length=MAX_TIMESTEPS)]
    """a_t for t = 0..T-1."""
    noise: Annotated[tuple[Share, ...], Field(min_length=1, max_length=MAX_TIMESTEPS)]
    """s_t."""
    label: Annotated[tuple[Annotated[float, Field(ge=0, le=1e6)], ...], Field(max_length=MAX_TIMESTEPS)]
    """What the network is told at t."""

    @model_validator(mode="after")
    def _fits_together(self) -> "LevelTables":
        """What one field says of another; ValueError says which."""
        lengths = {name: len(getattr(self, name)) for name in _TABLES}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"tables of several lengths: {lengths}")
        is_flow = self.space == "velocity"
        for name, table in (("signal", self.signal), ("noise", self.noise[::-1])):
            # A flow's times may stand twice where they are those that a network in half precision sees exactly.
            steps = [later - earlier for earlier, later in itertools.pairwise(table)]
            if table[-1] <= 0 or any(step > 0 or (step == 0 and not is_flow) for step in steps):
                raise ValueError(f"{name} is not strictly monotonic and above 0")
        if is_flow and not self.noise[0] < self.noise[-1]:
            raise ValueError("noise is the same at all timesteps")
        return self

    @classmethod
    def of(cls, levels: "Levels") -> "LevelTables":
        tables = {name: tuple(getattr(levels, name).tolist()) for name in _TABLES}
        return cls(space=levels.space, floor=levels.floor, density=levels.density, shift=levels.shift, **tables)

    def levels(self) -> "Levels":
        import torch  # takes seconds, and who looks at a manifest walks no levels

        from inpo.common.levels import Levels

        signal, noise, label = (torch.tensor(getattr(self, name), dtype=torch.float64) for name in _TABLES)
        return Levels(
            space=self.space,
            floor=self.floor,
            density=self.density,
            shift=self.shift,
            signal=signal,
            noise=noise,
            label=label,
        )


class Manifest(Document):
    """CACHE/manifest.json: the identity of a cache, put-if-absent. All fields but `versions` are compared."""

    schema_version: Literal[2] = 2
    family: Name
    """Of the model, by the name that its file in common/families/ gives it; readers need no more than is here."""
    latent_shape: tuple[Pixels, Pixels, Pixels]
    levels: LevelTables
    conditions: Annotated[dict[ConditionName, ConditionSpec], Field(min_length=1, max_length=16)]
    """What the network is told beside latent and label, by name."""
    static: Annotated[
        dict[ConditionName, Annotated[float, Field(ge=0, le=1e6)]], Field(default_factory=dict, max_length=16)
    ]
    """What the network is told alike at every call, by name."""
    profile: Profile
    extra: Annotated[tuple[ExtraName, ...], Field(max_length=2)] = ()
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)]
    timesteps_per_pair: Timesteps
    group: GroupName
    """Whose images share grid and noise: those of a pair, of a ranking or list, or of a shard's pairs of one prompt."""
    max_tokens: Annotated[int, Field(ge=1, le=1 << 16)] | None = None
    """Tokens that a prompt is cut at, and padded to for the network; None: the tokenizers have one number for all."""
    resolution: tuple[Pixels, Pixels]
    """(height, width)."""
    crop: Literal["center"]
    flip: bool
    vae_latent: Literal["mean", "sample"]
    vae_dtype: DtypeName
    network_dtype: NetworkDtypeName
    measure_inversion: Share = 0.0
    inverter: InverterIdentity
    fingerprints: Annotated[dict[Name, Digest], Field(min_length=1, max_length=32)]
    versions: Annotated[dict[Name, Version], Field(default_factory=dict, max_length=64)]

    @model_validator(mode="after")
    def _fits_together(self) -> "Manifest":
        """What one field says of another; ValueError says which."""
        total, (low, high) = self.num_train_timesteps, self.inverter.timestep_range
        taken = {TEXT.path, *(spec.path for spec in ARRAYS)} & {
            spec.array(name).path for name, spec in self.conditions.items()
        }
        if taken:
            raise ValueError(f"a condition cannot be the array {', '.join(sorted(taken))}")
        if not 0 <= low < high <= total:
            raise ValueError(f"timestep_range [{low}, {high}) lies outside 0..{total}")
        if self.is_padded and self.max_tokens is None:
            raise ValueError("a length of prompts without max_tokens")
        if self.timesteps_per_pair > self.inverter.grid_points:
            raise ValueError(f"{self.timesteps_per_pair} timesteps per pair on {self.inverter.grid_points} points")
        return self

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "Manifest":
        """Parse; another schema version, or none, is refused before any other field is looked at."""
        document = load(data, where)
        version = document.get("schema_version")
        if version != SCHEMA_VERSION or isinstance(version, bool):
            raise CacheSchemaError(
                "This cache has another schema version.",
                where=where,
                expected=SCHEMA_VERSION,
                got="none" if version is None else ascii(str(version))[1:-1][:100],
                fix="use the version of InPO cache that wrote it, or precompute again into a new folder",
            )
        return cls._parse(document, where)

    @property
    def is_padded(self) -> bool:
        """Whether text shards hold prompts by their length, and readers pad them with zeros to `max_tokens`."""
        return "length" in self.conditions

    @property
    def num_train_timesteps(self) -> int:
        """T, the length of the levels' tables."""
        return len(self.levels.signal)

    @cached_property
    def specs(self) -> dict[str, ArraySpec]:
        """The arrays that a shard of images holds, by path: the contract's, and one per condition of an image."""
        options = {None, *self.extra, self.inverter.name}
        contract = [spec for spec in ARRAYS if self.profile in spec.profiles and spec.option in options]
        return {spec.path: spec for spec in [*contract, *self._owned("image").values()]}

    @cached_property
    def text_specs(self) -> dict[str, ArraySpec]:
        """The arrays that a shard of texts holds, by path."""
        return {TEXT.path: TEXT} | self._owned("prompt")

    @property
    def text_conditions(self) -> dict[str, ConditionSpec]:
        """The conditions that prompts own."""
        return {name: spec for name, spec in self.conditions.items() if spec.per == "prompt"}

    def _owned(self, per: Literal["prompt", "image"]) -> dict[str, ArraySpec]:
        arrays = [spec.array(name) for name, spec in self.conditions.items() if spec.per == per]
        return {spec.path: spec for spec in arrays}

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        return tuple(self.specs.values())

    def lengths(self, num_images: int, num_groups: int, num_pairs: int) -> dict[str, int]:
        """Lengths of the axes of a shard of images; a condition's own axes are free."""
        channel, height, width = self.latent_shape
        lengths = {"image": num_images, "group": num_groups, "pair": num_pairs, "place": 2}
        return lengths | {"record": self.timesteps_per_pair, "C": channel, "H": height, "W": width}

    def identity(self) -> dict[str, Any]:
        """Every value that two runs must share to write into one cache, flattened to dotted names."""
        flat: dict[str, Any] = {}
        for name, value in self.model_dump(mode="json").items():
            if name in ("versions", "levels"):  # check_identity compares the tables, to rounding
                continue
            if isinstance(value, dict):
                flat.update({f"{name}.{key}": inner for key, inner in value.items()})
            else:
                flat[name] = value
        return flat
