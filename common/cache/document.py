"""What the JSON documents of a cache have in common: fields with a range or a pattern, strict parsing, a seal."""

import json
import re
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from inpo.common.cache.store import digest
from inpo.common.choices import MAX_TIMESTEPS
from inpo.common.errors import CacheCorrupt, CacheSchemaError

MAX_PAIRS_PER_SHARD = 256
MAX_PROMPTS_PER_SHARD = 256
MAX_METADATA_BYTES = 1 << 16
"""Of a zarr.json."""
MAX_WHOLE_BYTES = 1 << 30
"""Of a file that is read in one piece: texts, embeddings, numbers of pairs."""

# Every value of a document has a range or a pattern: a document may come from anywhere, and what it says is used as a
# path, a length or a line on a screen before anything else could tell that it is wrong.
Digest = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
ATTEMPT = re.compile(r"[0-9a-f]{16}")
Attempt = Annotated[str, Field(pattern=f"^{ATTEMPT.pattern}$")]
Name = Annotated[str, Field(pattern="^[A-Za-z][A-Za-z0-9._-]{0,63}$")]
"""Of a component, a library, a reason."""
ConditionName = Annotated[str, Field(pattern="^[a-z][a-z0-9_]{0,31}$")]
InputShardName = Annotated[str, Field(pattern="^[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}$")]
SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,255}")
ShardName = Annotated[str, Field(pattern=f"^{SHARD_NAME.pattern}$")]
Version = Annotated[str, Field(pattern="^[ -~]{1,100}$")]
FilePath = Annotated[str, Field(pattern="^[a-z0-9_]+([./][a-z0-9_]+)*$", max_length=100)]
Location = Annotated[str, Field(max_length=8192)]
PairId = Annotated[str, Field(max_length=1 << 16)]
Share = Annotated[float, Field(ge=0, le=1)]
NumPairs = Annotated[int, Field(ge=0, le=MAX_PAIRS_PER_SHARD)]
NumImages = Annotated[int, Field(ge=0, le=2 * MAX_PAIRS_PER_SHARD)]
NumPrompts = Annotated[int, Field(ge=1, le=MAX_PROMPTS_PER_SHARD)]
PromptRow = Annotated[int, Field(ge=0, lt=MAX_PROMPTS_PER_SHARD)]
NumBytes = Annotated[int, Field(ge=0, le=1 << 40)]
Row = Annotated[int, Field(ge=0, le=1 << 48)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]
Pixels = Annotated[int, Field(ge=1, le=1 << 16)]
Timesteps = Annotated[int, Field(ge=1, le=MAX_TIMESTEPS)]
UtcTime = Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\+00:00$")]

_D = TypeVar("_D", bound="Document")


class Document(BaseModel):
    """A JSON document of the cache: frozen, unknown fields refused, written with sorted keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_json(self) -> bytes:
        return (json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()

    @classmethod
    def from_json(cls: type[_D], data: bytes, where: str) -> _D:
        """Parse; raises CacheSchemaError naming the first bad field, the value found and what to do."""
        return cls._parse(load(data, where), where)

    @classmethod
    def _parse(cls: type[_D], document: dict[str, Any], where: str) -> _D:
        try:
            return cls.model_validate_json(json.dumps(document), strict=True)  # "3", 3.0 and true are not 3
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
