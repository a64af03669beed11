"""The cache contract as data: which arrays a shard holds, in which shape and dtype, and the two JSON documents.

`cache_schema.md` is the promise in words; a test holds the two together.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from inpo.common.cache.store import digest
from inpo.common.choices import MAX_TIMESTEPS, DtypeName, ExtraName, InverterName, Profile
from inpo.common.errors import CacheCorrupt, CacheSchemaError
from inpo.common.levels import Levels, Space

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
REMOVING = ".removing"
"""Ends the name of the mark beside an attempt that `inpo inspect clean` is removing."""
CONFIGURATION_SEAL = "# digest of the lines above: "
MAX_PAIRS_PER_SHARD = 256
MAX_METADATA_BYTES = 1 << 16
"""Of a zarr.json."""

_TABLES = ("signal", "noise", "label")

# Every value of a document has a range or a pattern: a document may come from anywhere, and what it says is used as a
# path, a length or a line on a screen before anything else could tell that it is wrong.
Digest = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Attempt = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
Name = Annotated[str, Field(pattern="^[A-Za-z][A-Za-z0-9._-]{0,63}$")]
"""Of a component, a library, a reason."""
ConditionName = Annotated[str, Field(pattern="^[a-z][a-z0-9_]{0,31}$")]
InputShardName = Annotated[str, Field(pattern="^[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}$")]
Version = Annotated[str, Field(pattern="^[ -~]{1,100}$")]
FilePath = Annotated[str, Field(pattern="^[a-z0-9_]+([./][a-z0-9_]+)*$", max_length=100)]
Location = Annotated[str, Field(max_length=8192)]
PairId = Annotated[str, Field(max_length=1 << 16)]
Share = Annotated[float, Field(ge=0, le=1)]
NumPairs = Annotated[int, Field(ge=0, le=MAX_PAIRS_PER_SHARD)]
NumBytes = Annotated[int, Field(ge=0, le=1 << 40)]
Row = Annotated[int, Field(ge=0, le=1 << 48)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]
Pixels = Annotated[int, Field(ge=1, le=1 << 16)]
Timesteps = Annotated[int, Field(ge=1, le=MAX_TIMESTEPS)]
UtcTime = Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\+00:00$")]


_CRC_BYTES, _INDEX_BYTES = 4, 16
"""CRC-32C of a chunk and of a chunk index; offset and length of a chunk in the index."""


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array of a shard. `axes` name the dimensions; `chunking` says how the pair axis is cut.

    pair_step: zarr sharding codec, the outer chunk is all pairs of the shard, the inner chunk 1 pair and 1 step.
    pair: the same with an inner chunk of 1 pair. whole: one chunk, no sharding.
    """

    path: str
    dtype: str
    axes: tuple[str, ...]
    chunking: Literal["pair_step", "pair", "whole"]
    profiles: tuple[Profile, ...]
    meaning: str
    option: str | None = None
    """The `--extra` name or inverter that makes this array appear; None: always there."""

    @property
    def is_text(self) -> bool:
        return self.dtype == "string"

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype("O") if self.is_text else np.dtype(self.dtype)

    @property
    def chunk_file(self) -> str:
        """The one file with the array's numbers, below the shard's folder."""
        return f"{self.path}/c" + "/0" * len(self.axes)

    def inner_chunk(self, shape: Sequence[int]) -> tuple[int, ...]:
        """1 pair and 1 step, 1 pair, or everything: see `chunking`."""
        cut = {"pair_step": 2, "pair": 1, "whole": 0}[self.chunking]
        return (*(1,) * cut, *shape[cut:])

    def chunk_bytes(self, shape: Sequence[int]) -> int | None:
        """Bytes of the chunk file of an array of this shape; None for text, whose length is its own."""
        if self.is_text:
            return None
        numbers = math.prod(shape) * self.numpy_dtype.itemsize
        if self.chunking == "whole":
            return numbers + _CRC_BYTES
        inner = math.prod(shape) // max(1, math.prod(self.inner_chunk(shape)))
        return numbers + inner * (_CRC_BYTES + _INDEX_BYTES) + _CRC_BYTES

    def problem(self, shape: tuple[int, ...], dtype: object, lengths: Mapping[str, int]) -> str | None:
        """What is wrong with an array of this shape and dtype, or None. `lengths` gives known axes their length."""
        found = f"{dtype} {list(shape)}"
        wanted = f"{self.dtype} [{', '.join(str(lengths.get(axis, axis)) for axis in self.axes)}]"
        if len(shape) != len(self.axes):
            return f"{found} instead of {wanted}"
        wrong_axis = any(lengths.get(axis, size) != size for axis, size in zip(self.axes, shape, strict=True))
        wrong_dtype = not self.is_text and np.dtype(dtype) != np.dtype(self.dtype)  # type: ignore[call-overload]
        return f"{found} instead of {wanted}" if wrong_axis or wrong_dtype else None


_LATENT = ("C", "H", "W")
_RECORD = ("pair", "step", "side")
_BOTH: tuple[Profile, ...] = ("full", "lean")

ARRAYS: tuple[ArraySpec, ...] = (
    ArraySpec(
        path="x0",
        dtype="float16",
        axes=("pair", "side", *_LATENT),
        chunking="pair",
        profiles=_BOTH,
        meaning="clean latent, scaled by the VAE factor, rounded to float16 before the inversion starts",
    ),
    ArraySpec(
        path="x_t",
        dtype="float16",
        axes=(*_RECORD, *_LATENT),
        chunking="pair_step",
        profiles=("full",),
        meaning="latent at level t: float16 rounding of a_t * x0 + s_t * target, computed in float64",
    ),
    ArraySpec(
        path="delta",
        dtype="float16",
        axes=(*_RECORD, *_LATENT),
        chunking="pair_step",
        profiles=("full",),
        meaning="noise prediction of the inverting model at the stored x_t",
    ),
    ArraySpec(
        path="x0_t",
        dtype="float16",
        axes=(*_RECORD, *_LATENT),
        chunking="pair_step",
        profiles=("full",),
        meaning="x0(t) = (x_t - s_t * delta) / a_t, from the unrounded prediction (Eq. 8)",
    ),
    ArraySpec(
        path="target",
        dtype="float16",
        axes=(*_RECORD, *_LATENT),
        chunking="pair_step",
        profiles=_BOTH,
        meaning="tau: what the loss aims at (Eq. 18), rounded to float16 before x_t is formed from it",
    ),
    ArraySpec(
        path="reference_error",
        dtype="float32",
        axes=_RECORD,
        chunking="whole",
        profiles=_BOTH,
        meaning="E_ref: mean over channel, height, width of (target - eps_ref(x_t, t, caption))^2",
    ),
    ArraySpec(
        path="inversion_error",
        dtype="float32",
        axes=("pair", "side"),
        chunking="whole",
        profiles=_BOTH,
        meaning="relative RMS between x0 and where deterministic DDIM lands from the last x_t; NaN: not measured",
    ),
    ArraySpec(
        path="timestep",
        dtype="int16",
        axes=("pair", "step"),
        chunking="whole",
        profiles=_BOTH,
        meaning="kept timesteps, ascending, 0..T-1",
    ),
    ArraySpec(
        path="pair_id",
        dtype="string",
        axes=("pair",),
        chunking="whole",
        profiles=_BOTH,
        meaning="the pair's identity in its source",
    ),
    ArraySpec(
        path="prompt_index",
        dtype="int32",
        axes=("pair",),
        chunking="whole",
        profiles=_BOTH,
        meaning="row of the prompt arrays with the original caption, also where it was dropped",
    ),
    ArraySpec(
        path="caption_dropped",
        dtype="bool",
        axes=("pair",),
        chunking="whole",
        profiles=_BOTH,
        meaning="true: inverted, and to be trained, under the empty prompt (row 0)",
    ),
    ArraySpec(
        path="label",
        dtype="float32",
        axes=("pair",),
        chunking="whole",
        profiles=_BOTH,
        meaning="P(win preferred) from the source, 1.0 when hard",
    ),
    ArraySpec(
        path="prompt/text",
        dtype="string",
        axes=("prompt",),
        chunking="whole",
        profiles=_BOTH,
        meaning="distinct prompts of the shard; row 0 is the empty prompt",
    ),
    ArraySpec(
        path="delta_prev",
        dtype="float16",
        axes=(*_RECORD, *_LATENT),
        chunking="pair_step",
        profiles=_BOTH,
        option="delta_prev",
        meaning="delta of the previous point of the inversion path",
    ),
    ArraySpec(
        path="eps_ref",
        dtype="float16",
        axes=(*_RECORD, *_LATENT),
        chunking="pair_step",
        profiles=_BOTH,
        option="eps_ref",
        meaning="reference noise prediction at x_t under the training caption, where it is not delta",
    ),
    ArraySpec(
        path="residual",
        dtype="float32",
        axes=_RECORD,
        chunking="whole",
        profiles=_BOTH,
        option="fixed_point",
        meaning="relative RMS change of the last fixed-point iteration",
    ),
)


_DocumentType = TypeVar("_DocumentType", bound="_Document")


class _Document(BaseModel):
    """A JSON document of the cache: frozen, unknown fields refused, written with sorted keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_json(self) -> bytes:
        return (json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()

    @classmethod
    def from_json(cls: type[_DocumentType], data: bytes, where: str) -> _DocumentType:
        """Parse; raises CacheSchemaError naming the first bad field, the value found and what to do."""
        return cls._parse(load(data, where), where)

    @classmethod
    def _parse(cls: type[_DocumentType], document: dict[str, Any], where: str) -> _DocumentType:
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise CacheSchemaError(
                f"Bad field {field[:100]!r}: {first['msg']}." if field else f"{first['msg']}.",
                where=where,
                got=ascii(first.get("input"))[:200] if field else None,
                fix="the file was edited or written by another version; restore it from a copy",
            ) from None


def load(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object, or CacheSchemaError."""
    try:
        document = json.loads(data)
        json.dumps(document, ensure_ascii=False).encode()  # half a surrogate pair is no text that could be shown
    except (ValueError, RecursionError) as error:
        raise CacheSchemaError(
            "Not a JSON document.",
            where=where,
            got=f"{len(data)} bytes; {ascii(str(error))[1:-1][:200]}",
            fix="restore the file from a copy of the cache",
        ) from None
    if not isinstance(document, dict):
        raise CacheSchemaError(
            "Not a JSON object.",
            where=where,
            got=type(document).__name__,
            fix="restore the file from a copy of the cache",
        )
    return document


class InverterIdentity(_Document):
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


class ConditionSpec(_Document):
    """One of the tensors that the network is told: its array is prompt/<name> or image/<name>."""

    dtype: Literal["float16", "float32", "bool"]
    axes: Annotated[tuple[ConditionName, ...], Field(max_length=4)]
    """Names of the axes behind the owner's."""
    per: Literal["prompt", "image"]

    def array(self, name: str) -> ArraySpec:
        """The array that holds it."""
        return ArraySpec(
            path=f"prompt/{name}" if self.per == "prompt" else name,
            dtype=self.dtype,
            axes=("prompt", *self.axes) if self.per == "prompt" else ("pair", "side", *self.axes),
            chunking="whole",
            profiles=_BOTH,
            meaning=f"what the network is told as {name}, by {self.per}",
        )


class LevelTables(_Document):
    """The levels that every writer and reader of a cache walks: with them no reader needs the model to derive x_t.

    Taken from here to the last bit, even where another version of the libraries would round a scheduler's table
    differently.
    """

    space: Space
    floor: Annotated[float, Field(gt=0, le=1e3)]
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
        for name, table in (("signal", self.signal), ("noise", self.noise[::-1])):
            if table[-1] <= 0 or any(later >= earlier for earlier, later in itertools.pairwise(table)):
                raise ValueError(f"{name} is not strictly monotonic and above 0")
        return self

    @classmethod
    def of(cls, levels: Levels) -> "LevelTables":
        tables = {name: tuple(getattr(levels, name).tolist()) for name in _TABLES}
        return cls(space=levels.space, floor=levels.floor, **tables)

    def levels(self) -> Levels:
        signal, noise, label = (torch.tensor(getattr(self, name), dtype=torch.float64) for name in _TABLES)
        return Levels(space=self.space, floor=self.floor, signal=signal, noise=noise, label=label)


class Manifest(_Document):
    """CACHE/manifest.json: the identity of a cache, put-if-absent. All fields but `versions` are compared."""

    schema_version: Literal[2] = 2
    family: Name
    """Of the model, by the name that its file in common/families/ gives it; readers need no more than is here."""
    latent_shape: tuple[Pixels, Pixels, Pixels]
    levels: LevelTables
    conditions: Annotated[dict[ConditionName, ConditionSpec], Field(min_length=1, max_length=16)]
    """What the network is told beside latent and label, by name."""
    profile: Profile
    extra: Annotated[tuple[ExtraName, ...], Field(max_length=2)] = ()
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)]
    timesteps_per_pair: Timesteps
    resolution: Pixels
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
        taken = {"prompt", *(spec.path for spec in ARRAYS)} & {
            spec.array(name).path for name, spec in self.conditions.items()
        }
        if taken:
            raise ValueError(f"a condition cannot be the array {', '.join(sorted(taken))}")
        if not 0 <= low < high <= total:
            raise ValueError(f"timestep_range [{low}, {high}) lies outside 0..{total}")
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
    def num_train_timesteps(self) -> int:
        """T, the length of the levels' tables."""
        return len(self.levels.signal)

    @cached_property
    def specs(self) -> dict[str, ArraySpec]:
        """The arrays that a shard holds, by path: the contract's, and one per condition."""
        options = {None, *self.extra, self.inverter.name}
        contract = [spec for spec in ARRAYS if self.profile in spec.profiles and spec.option in options]
        return {spec.path: spec for spec in [*contract, *(each.array(name) for name, each in self.conditions.items())]}

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        return tuple(self.specs.values())

    @cached_property
    def files(self) -> frozenset[str]:
        """The files of a shard that has pairs: the groups' metadata, and of each array its metadata and one chunk."""
        names = {"zarr.json"}
        for spec in self.arrays:
            group, _, array = spec.path.rpartition("/")
            names |= {f"{spec.path}/zarr.json", spec.chunk_file, *([f"{group}/zarr.json"] if array and group else [])}
        return frozenset(names)

    def lengths(self, num_pairs: int) -> dict[str, int]:
        """Lengths of the axes of a shard with so many pairs; a condition's axes and prompt are free."""
        channel, height, width = self.latent_shape
        return {"pair": num_pairs, "step": self.timesteps_per_pair, "side": 2, "C": channel, "H": height, "W": width}

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


class ShardSource(_Document):
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


class Commit(_Document):
    """CACHE/commits/<name>.json: makes one attempt of a shard visible. Written last, put-if-absent."""

    attempt: Attempt
    num_pairs: NumPairs
    manifest: Digest
    """blake2b digest of the manifest.json that this shard was made under."""
    files: Annotated[dict[FilePath, NumBytes], Field(max_length=100)]
    """Bytes of every file of the attempt, by path."""
    digests: Annotated[dict[FilePath, Digest], Field(max_length=100)]
    """blake2b digest of each file's first, middle and last 4096 bytes: tells a file put in another's place."""
    skipped: Annotated[dict[Name, NumPairs], Field(max_length=32)]
    skipped_digest: Digest | None = None
    """blake2b digest of the list of skipped rows; null: nothing was skipped, or the list is older than the digest."""
    source: ShardSource
    counts: Annotated[dict[Name, NumPairs], Field(default_factory=dict, max_length=32)]
    """Things that happened to pairs that were kept, e.g. cut_prompt."""
    seconds: Annotated[dict[Name, Seconds], Field(default_factory=dict, max_length=32)]
    """Where the time went: decode, encode, invert, write, total."""
    created: UtcTime
    """UTC, ISO 8601."""
    checksum: Annotated[str, Field(pattern="^([0-9a-f]{32})?$")] = ""
    """blake2b digest of all other fields (sorted keys, no white space): any edit of a commit is found."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Commit":
        start, stop = self.source.rows
        if self.num_pairs + sum(self.skipped.values()) > stop - start:
            raise ValueError(f"{self.num_pairs} pairs and {sum(self.skipped.values())} skipped of {stop - start} rows")
        if set(self.files) != set(self.digests):
            raise ValueError("files and digests name different files")
        if any(size > MAX_METADATA_BYTES for path, size in self.files.items() if path.endswith("zarr.json")):
            raise ValueError(f"a zarr.json of more than {MAX_METADATA_BYTES} bytes")
        return self

    def check_files(self, manifest: Manifest, where: str) -> None:
        """Raise CacheSchemaError unless the commit names exactly the files that its pairs' arrays are made of."""
        expected = manifest.files if self.num_pairs else frozenset[str]()
        lacking, foreign = sorted(expected - self.files.keys()), sorted(self.files.keys() - expected)
        if lacking or foreign:
            arrays = f"the arrays of {self.num_pairs} pairs, profile {manifest.profile}" if expected else "no pair"
            parts = [
                f"{what} {len(names)}: {', '.join(names[:4])}{', ...' if names[4:] else ''}"
                for what, names in (("lacks", lacking), ("has besides", foreign))
                if names
            ]
            raise CacheSchemaError(
                "A commit does not name the files that its shard's arrays are made of.",
                where=where,
                expected=f"{len(expected)} files: {arrays}",
                got=f"{len(self.files)} files; it {'; it '.join(parts)}",
                fix="`inpo inspect verify --quarantine` moves the commit aside; the next `inpo precompute` makes the "
                "shard again",
            )

    def to_json(self) -> bytes:
        return sealed(self.model_dump(mode="json"))

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "Commit":
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


class SkippedRow(_Document):
    """A line of CACHE/skipped/<shard>/<attempt>.jsonl: a row of the source that gave no pair."""

    pair_id: PairId
    reason: Name
    detail: Annotated[str, Field(max_length=1 << 16)]
    row: Row


def skipped_rows(data: bytes, where: str) -> list[SkippedRow]:
    """The lines of a list of skipped rows. Raises CacheSchemaError, naming the line."""
    lines = data.removesuffix(b"\n").split(b"\n")
    return [SkippedRow.from_json(line, f"{where}, line {number}") for number, line in enumerate(lines, 1)]


def sealed(document: dict[str, Any]) -> bytes:
    """A document with the checksum of its other fields."""
    whole = document | {"checksum": _checksum(document)}
    return (json.dumps(whole, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def check_seal(document: dict[str, Any], where: str, *, what: str, fix: str) -> None:
    """Raise CacheCorrupt unless the document's checksum is that of its other fields."""
    written, found = document.get("checksum"), _checksum(document)
    if written != found:
        raise CacheCorrupt(
            f"{what} is not the one that was written.",
            where=where,
            expected=f"checksum {written or '(none in the file)'}",
            got=found,
            fix=fix,
        )


def _checksum(document: dict[str, Any]) -> str:
    rest = {name: value for name, value in document.items() if name != "checksum"}
    return digest(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())
