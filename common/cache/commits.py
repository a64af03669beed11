"""Commits: what makes an attempt visible, which ones a reader may believe, and the lists of skipped rows."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, ClassVar, TypeVar

from pydantic import Field, model_validator

from inpo.common.cache.document import (
    MAX_METADATA_BYTES,
    MAX_PAIRS_PER_SHARD,
    MAX_PROMPTS_PER_SHARD,
    MAX_WHOLE_BYTES,
    SHARD_NAME,
    Attempt,
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
    PromptRow,
    Row,
    Seconds,
    ShardName,
    UtcTime,
    check_seal,
    load,
    sealed,
)
from inpo.common.cache.schema import MANIFEST, Manifest
from inpo.common.cache.specs import ARRAYS, ArraySpec
from inpo.common.cache.store import CacheStore
from inpo.common.errors import CacheCorrupt, CacheError, CacheSchemaError

_LOOKED_AT = 8
"""Commits that are held against the manifest before a run: as many at least, and less than twice as many."""
_FILES_IN_PARTS = frozenset(spec.chunk_file for spec in ARRAYS if spec.chunking != "whole")


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


def check_made_under(store: CacheStore, manifest_digest: str) -> None:
    """Raise CacheCorrupt if commits were made under another manifest than the one of this digest: what is written now
    would be of the other, and no manifest would fit all shards. A commit that cannot be read says nothing.

    Every process of a run asks this: it looks at few commits, however many there are. An edited manifest fits none of
    those that were there before; one commit among many that is of another cache is found when the cache is read."""
    for kind in (Commit, TextCommit):
        files = sorted(name for name in store.listing(kind.folder) if name.endswith(".json"))
        files = files[:: max(1, len(files) // _LOOKED_AT)]
        for file, document in zip(files, store.get_many([f"{kind.folder}/{name}" for name in files]), strict=True):
            try:
                commit = kind.from_json(document if isinstance(document, bytes) else b"", file)
            except CacheError:
                continue
            _check_manifest(store, commit, file.removesuffix(".json"), manifest_digest)


def _check_manifest(store: CacheStore, commit: AnyCommit, name: str, manifest_digest: str) -> None:
    if commit.manifest != manifest_digest:
        raise CacheCorrupt(
            f"The manifest is not the one that shard {name} was made under.",
            where=store.path(MANIFEST),
            expected=f"digest {commit.manifest} (from {commit.folder}/{name}.json)",
            got=manifest_digest,
            fix="manifest.json was edited or replaced: restore it from a copy; or the commit came from another cache: "
            "remove it",
        )


def read_commits(
    store: CacheStore, manifest: Manifest, manifest_digest: str, *, kind: type[_C]
) -> tuple[dict[str, _C], dict[str, CacheError]]:
    """(commits by shard name, what is wrong with the others by shard name), under the manifest of this digest."""
    folder = kind.folder
    files = [name for name in store.listing(folder) if name.endswith(".json") and "/" not in name]
    commits: dict[str, _C] = {}
    bad: dict[str, CacheError] = {}
    owner: dict[str, str] = {}
    for file, document in zip(files, store.get_many([f"{folder}/{file}" for file in files]), strict=True):
        name = file.removesuffix(".json")
        if document is None:  # moved aside in between
            continue
        try:
            if isinstance(document, CacheError):
                raise document
            if not SHARD_NAME.fullmatch(name):
                raise CacheSchemaError(
                    "A commit has a name that no shard has.",
                    where=store.path(f"{folder}/{file}"),
                    expected="letters, digits, dots, dashes, underscores, the first no dot",
                    got=ascii(name)[:200],
                    fix="it is no file of this cache: move it away",
                )
            commit = kind.from_json(document, store.path(f"{folder}/{file}"))
            _check_manifest(store, commit, name, manifest_digest)
            commit.check_files(manifest, store.path(f"{folder}/{file}"))
            first = owner.setdefault(commit.attempt, name)
            if first != name:
                raise CacheCorrupt(
                    f"Two commits name one attempt: those of shards {first} and {name}.",
                    where=store.path(f"{folder}/{file}"),
                    expected="an attempt of its own",
                    got=f"attempt {commit.attempt}",
                    fix="remove the one that is a copy: its pairs would count twice",
                )
            commits[name] = commit
        except CacheError as error:
            bad[name] = error
    return commits, bad
