"""The cache contract as data: the manifest, the commits, and the lists of skipped rows.

`cache_schema.md` is the promise in words; a test holds the two together.
"""

import itertools
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, model_validator

from inpo.common.cache.document import (
    MAX_METADATA_BYTES,
    MAX_PAIRS_PER_SHARD,
    MAX_PROMPTS_PER_SHARD,
    MAX_WHOLE_BYTES,
    Attempt,
    ConditionName,
    Digest,
    Document,
    FilePath,
    InputShardName,
    Location,
    Name,
    NumBytes,
    NumImages,
    NumPairs,
    NumPrompts,
    PairId,
    Pixels,
    PromptRow,
    Row,
    Seconds,
    ShardName,
    Share,
    Timesteps,
    UtcTime,
    Version,
    check_seal,
    load,
    sealed,
)
from inpo.common.cache.specs import ARRAYS, TEXT, ArraySpec
from inpo.common.choices import (
    MAX_TIMESTEPS,
    DensityName,
    DtypeName,
    ExtraName,
    GroupName,
    InverterName,
    Profile,
    Space,
)
from inpo.common.errors import CacheSchemaError

if TYPE_CHECKING:
    from inpo.common.levels import Levels

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
REMOVING = ".removing"
"""Ends the name of the mark beside an attempt that `inpo inspect clean` is removing."""
CONFIGURATION_SEAL = "# digest of the lines above: "

_TABLES = ("signal", "noise", "label")
_FILES_IN_PARTS = frozenset(spec.chunk_file for spec in ARRAYS if spec.chunking != "whole")
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
    network_dtype: DtypeName
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


class ShardSource(Document):
    """Where a shard's pairs came from: rows [start, stop) of an input shard with this fingerprint."""

    location: Location
    input_shard: InputShardName
    rows: tuple[Row, Row]
    fingerprint: Digest

    @model_validator(mode="after")
    def _is_one_shard(self) -> "ShardSource":
        start, stop = self.rows
        if not 0 < stop - start <= MAX_PAIRS_PER_SHARD:
            raise ValueError(f"rows [{start}, {stop}) are not 1 to {MAX_PAIRS_PER_SHARD} rows")
        return self


def files_of(specs: Mapping[str, ArraySpec]) -> frozenset[str]:
    """The files of a group that holds these arrays: the groups' metadata, and of each array its metadata and chunk."""
    names = {"zarr.json"}
    for spec in specs.values():
        group, _, array = spec.path.rpartition("/")
        names |= {f"{spec.path}/zarr.json", spec.chunk_file, *([f"{group}/zarr.json"] if array and group else [])}
    return frozenset(names)


_C = TypeVar("_C", bound="AnyCommit")


class AnyCommit(Document):
    """What a commit of images and one of texts share: it makes one attempt visible. Written last, put-if-absent."""

    folder: ClassVar[str]
    """Where such commits lie."""
    arrays: ClassVar[str]
    """Where the attempts that they name lie."""

    attempt: Attempt
    manifest: Digest
    """blake2b digest of the manifest.json that this shard was made under."""
    files: Annotated[dict[FilePath, NumBytes], Field(max_length=100)]
    """Bytes of every file of the attempt, by path."""
    digests: Annotated[dict[FilePath, Digest], Field(max_length=100)]
    """blake2b digest of each file's first, middle and last 4096 bytes: tells a file put in another's place."""
    seconds: Annotated[dict[Name, Seconds], Field(default_factory=dict, max_length=32)]
    """Where the time went: decode, encode, invert, write, total."""
    created: UtcTime
    """UTC, ISO 8601."""
    checksum: Annotated[str, Field(pattern="^([0-9a-f]{32})?$")] = ""
    """blake2b digest of all other fields (sorted keys, no white space): any edit of a commit is found."""

    @model_validator(mode="after")
    def _files_fit(self) -> "AnyCommit":
        if set(self.files) != set(self.digests):
            raise ValueError("files and digests name different files")
        for path, size in self.files.items():
            limit = MAX_METADATA_BYTES if path.endswith("zarr.json") else MAX_WHOLE_BYTES
            if size > limit and path not in _FILES_IN_PARTS:
                raise ValueError(f"{path} of {size} bytes, limit {limit}")
        return self

    @abstractmethod
    def expected_files(self, manifest: Manifest) -> tuple[frozenset[str], str]:
        """(files of the attempt, what they are in words)."""

    def check_files(self, manifest: Manifest, where: str) -> None:
        """Raise CacheSchemaError unless the commit names exactly the files that its arrays are made of."""
        expected, words = self.expected_files(manifest)
        lacking, foreign = sorted(expected - self.files.keys()), sorted(self.files.keys() - expected)
        if lacking or foreign:
            parts = [
                f"{what} {len(names)}: {', '.join(names[:4])}{', ...' if names[4:] else ''}"
                for what, names in (("lacks", lacking), ("has besides", foreign))
                if names
            ]
            raise CacheSchemaError(
                "A commit does not name the files that its shard's arrays are made of.",
                where=where,
                expected=f"{len(expected)} files: {words}",
                got=f"{len(self.files)} files; it {'; it '.join(parts)}",
                fix="`inpo inspect verify --quarantine` moves the commit aside; the next `inpo precompute` makes the "
                "shard again",
            )

    def to_json(self) -> bytes:
        return sealed(self.model_dump(mode="json"))

    @classmethod
    def from_json(cls: type[_C], data: bytes, where: str) -> _C:
        """Parse; raises CacheCorrupt if any value is not the one that was written."""
        document = load(data, where)
        commit = cls._parse(document, where)
        check_seal(
            document,
            where,
            what="A commit",
            fix="the file was edited or damaged; restore it from a copy, or remove it: the next `inpo precompute` "
            "makes this shard again",
        )
        return commit


class Commit(AnyCommit):
    """CACHE/commits/<name>.json: a shard of images."""

    folder = "commits"
    arrays = "shards"

    num_images: NumImages
    num_groups: NumPairs
    num_pairs: NumPairs
    texts: Annotated[tuple[ShardName, ...], Field(max_length=MAX_PROMPTS_PER_SHARD + 1)]
    """The text shards that its prompts stand in: group/prompt counts places here."""
    skipped: Annotated[dict[Name, NumPairs], Field(max_length=32)]
    skipped_digest: Digest | None = None
    """blake2b digest of the list of skipped rows; null: nothing was skipped."""
    source: ShardSource
    counts: Annotated[dict[Name, NumPairs], Field(default_factory=dict, max_length=32)]
    """Things that happened to pairs that were kept, e.g. cut_prompt."""
    spread: Annotated[float, Field(ge=0, le=1e20)] | None = None
    """How far rounding moves the root of a reference error (common/spread.py); null: not measured."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Commit":
        start, stop = self.source.rows
        if self.num_pairs + sum(self.skipped.values()) > stop - start:
            raise ValueError(f"{self.num_pairs} pairs and {sum(self.skipped.values())} skipped of {stop - start} rows")
        if not min(self.num_pairs, 1) <= self.num_groups <= self.num_pairs:
            raise ValueError(f"{self.num_groups} groups of {self.num_pairs} pairs")
        if not 2 * self.num_groups <= self.num_images <= 2 * self.num_pairs:
            raise ValueError(f"{self.num_images} images in {self.num_groups} groups and {self.num_pairs} pairs")
        if self.spread is not None and not self.num_pairs:
            raise ValueError(f"a spread of {self.spread} without a pair")
        return self

    def expected_files(self, manifest: Manifest) -> tuple[frozenset[str], str]:
        if not self.num_pairs:
            return frozenset(), "no pair"
        return files_of(manifest.specs), f"the arrays of {self.num_pairs} pairs, profile {manifest.profile}"


class TextCommit(AnyCommit):
    """CACHE/text-commits/<name>.json: a shard of texts."""

    folder = "text-commits"
    arrays = "texts"

    num_prompts: NumPrompts
    cut: Annotated[tuple[PromptRow, ...], Field(max_length=MAX_PROMPTS_PER_SHARD)] = ()
    """Rows of prompts that are longer than the encoder takes: the model sees only their beginning."""
    not_finite: Annotated[tuple[PromptRow, ...], Field(max_length=MAX_PROMPTS_PER_SHARD)] = ()
    """Rows of prompts for which the encoder gave NaN or infinity, stored as 0: no pair stands there."""

    @model_validator(mode="after")
    def _fits_together(self) -> "TextCommit":
        last = max((*self.cut, *self.not_finite), default=0)
        if last >= self.num_prompts:
            raise ValueError(f"something of row {last} of {self.num_prompts} prompts")
        return self

    def expected_files(self, manifest: Manifest) -> tuple[frozenset[str], str]:
        return files_of(manifest.text_specs), f"the arrays of {self.num_prompts} prompts"


class SkippedRow(Document):
    """A line of CACHE/skipped/<shard>/<attempt>.jsonl: a row of the source that gave no pair."""

    pair_id: PairId
    reason: Name
    detail: Annotated[str, Field(max_length=1 << 16)]
    row: Row


def skipped_rows(data: bytes, where: str) -> list[SkippedRow]:
    """The lines of a list of skipped rows. Raises CacheSchemaError, naming the line."""
    lines = data.removesuffix(b"\n").split(b"\n")
    return [SkippedRow.from_json(line, f"{where}, line {number}") for number, line in enumerate(lines, 1)]
