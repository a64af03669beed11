"""The cache contract as data: which arrays a shard holds, in which shape and dtype, and the two JSON documents.

`cache_schema.md` is the promise in words; a test holds the two together.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from inpo.common.cache.store import digest
from inpo.common.errors import CacheCorrupt, CacheSchemaError
from inpo.common.levels import Levels, Space

SCHEMA_VERSION = 2
MAX_PAIRS_PER_SHARD = 256

Profile = Literal["full", "lean"]
_TABLES = ("signal", "noise", "label")


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
EXTRAS: tuple[str, ...] = ("delta_prev", "eps_ref")


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
            raise CacheSchemaError(
                f"Bad field {'.'.join(map(str, first['loc']))!r}: {first['msg']}.",
                where=where,
                got=repr(first.get("input"))[:200],
                fix="the file was edited or written by another version; restore it from a copy",
            ) from None


def load(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object, or CacheSchemaError."""
    try:
        document = json.loads(data)
    except ValueError as error:
        raise CacheSchemaError(
            "Not a JSON document.",
            where=where,
            got=f"{len(data)} bytes; {error}",
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

    name: str
    steps: int
    refine_start: int = 0
    noised_start: float = 0.0
    guidance: float = 1.0
    caption_dropout: float = 0.0
    faithful: bool = False
    timestep_range: tuple[int, int]
    """Kept timesteps lie in [low, high)."""
    iterations: int | None = None
    """fixed_point only: the maximum of iterations per step."""
    tolerance: float | None = None
    """fixed_point only: the relative RMS change at which the iteration stops."""


class ConditionSpec(_Document):
    """One of the tensors that the network is told: its array is prompt/<name> or image/<name>."""

    dtype: str
    axes: tuple[str, ...]
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
    floor: float
    signal: tuple[float, ...]
    """a_t for t = 0..T-1."""
    noise: tuple[float, ...]
    """s_t."""
    label: tuple[float, ...]
    """What the network is told at t."""

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
    family: str
    """Of the model, by the name that its file in common/families/ gives it; readers need no more than is here."""
    latent_shape: tuple[int, int, int]
    levels: LevelTables
    conditions: dict[str, ConditionSpec]
    """What the network is told beside latent and label, by name."""
    profile: Profile
    extra: tuple[str, ...] = ()
    seed: int
    timesteps_per_pair: int
    resolution: int
    crop: str
    flip: bool
    vae_latent: Literal["mean", "sample"]
    vae_dtype: str
    network_dtype: str
    measure_inversion: float = 0.0
    inverter: InverterIdentity
    fingerprints: dict[str, str]
    versions: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "Manifest":
        """Parse; another schema version, or none, is refused before any other field is looked at."""
        document = load(data, where)
        version = document.get("schema_version")
        if version != SCHEMA_VERSION:
            raise CacheSchemaError(
                "This cache has another schema version.",
                where=where,
                expected=SCHEMA_VERSION,
                got="none" if version is None else version,
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

    location: str
    input_shard: str
    rows: tuple[int, int]
    fingerprint: str


class Commit(_Document):
    """CACHE/commits/<name>.json: makes one attempt of a shard visible. Written last, put-if-absent."""

    attempt: str
    num_pairs: int
    manifest: str
    """blake2b digest of the manifest.json that this shard was made under."""
    files: dict[str, int]
    """Bytes of every file of the attempt, by path."""
    digests: dict[str, str]
    """blake2b digest of each file's first, middle and last 4096 bytes: tells a file put in another's place."""
    skipped: dict[str, int]
    source: ShardSource
    counts: dict[str, int] = Field(default_factory=dict)
    """Things that happened to pairs that were kept, e.g. cut_prompt."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """Where the time went: decode, encode, invert, write, total."""
    created: str
    """UTC, ISO 8601."""
    checksum: str = ""
    """blake2b digest of all other fields (sorted keys, no white space): any edit of a commit is found."""

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
