"""WebDataset tars of pairs: our own layout and the one of the public Pick-a-Pic v2 mirrors.

    ours     <key>.win.<ext>  <key>.lose.<ext>  <key>.json {"prompt": ..., "label": P(win preferred), "id": ...}
    mirror   <key>.jpg_0  <key>.jpg_1  <key>.label_0  <key>.label_1  <key>.caption   each with any further extension

One input shard for each tar, one row for each sample. The headers are walked once (`tar_index`), after which any range
of rows is read by seeking: rows before it are neither read nor kept. A remote tar is walked by reading it once.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from inpo.common.pairs.files import ByteStream, open_binary, shard_names, unreadable_file
from inpo.common.pairs.pair import (
    MAX_IMAGE_BYTES,
    Pair,
    RowProblem,
    Skipped,
    check_id,
    check_image_bytes,
    check_text,
    contradiction_free,
    parse_label,
    preference,
    too_large,
)
from inpo.common.pairs.tar_index import Role, TarIndex, index_tar
from inpo.common.printable import is_printable


@dataclass(frozen=True, kw_only=True)
class TarSource:
    """Tars whose samples are pairs."""

    location: str
    files: tuple[str, ...]
    kind: Literal["webdataset"] = "webdataset"

    def input_shards(self) -> list["TarShard"]:
        """One shard a tar, sorted by name."""
        names = shard_names(self.files)
        shards = [TarShard(name=name, file=file) for name, file in zip(names, self.files, strict=True)]
        return sorted(shards, key=lambda shard: shard.name)


@dataclass(frozen=True, kw_only=True)
class TarShard:
    """One tar; a row is a sample, that is, neighbouring members with one key."""

    name: str
    file: str

    @cached_property
    def _index(self) -> TarIndex:
        return index_tar(self.file)

    @property
    def num_rows(self) -> int:
        """Samples in the tar, from its headers. Raises DataError when the tar is damaged or holds no pairs."""
        return len(self._index)

    def fingerprint(self) -> str:
        """blake2b of every member's name, size and time and of the content of all members that are not images."""
        return self._index.fingerprint

    def rows(self, start: int, stop: int) -> Iterator[Pair | Skipped]:
        """Samples start..stop-1, read by seeking. Raises DataError when the tar ends early or changed."""
        index = self._index
        stop = min(stop, len(index))
        if start >= stop:
            return
        with open_binary(self.file) as stream:
            for row in range(start, stop):
                yield self._row(_Sample(file=self.file, stream=stream, index=index, row=row))

    def _row(self, sample: "_Sample") -> Pair | Skipped:
        pair_id = f"{self.name}/{sample.row}"
        try:
            # A key names a sample within its tar only: mirrors count from 0 in every tar.
            key = f"{self.name}/{sample.index.key(sample.row)}"
            pair_id = key if is_printable(key) else pair_id
            sample.check_members()
            metadata = sample.json()
            pair_id = _pair_id(sample, metadata) or check_id(key, what="the members' key")
            prompt = _prompt(sample, metadata)
            ours = sample.has("win") or sample.has("lose")
            if ours and (sample.has("jpg_0") or sample.has("jpg_1")):
                raise RowProblem(reason="bad_metadata", detail="members of both layouts: win/lose and jpg_0/jpg_1")
            if not ours and not sample.has("jpg_0") and not sample.has("jpg_1"):
                raise RowProblem(reason="missing_image", detail="no image member")
            sides: tuple[Role, Role] = ("win", "lose") if ours else ("jpg_0", "jpg_1")
            label = _our_label(metadata) if ours else _mirror_label(sample, metadata)
            swap, label = preference(label)
            images = [check_image_bytes(sample.read(role), what=f"member {role}") for role in sides]
        except RowProblem as problem:
            return Skipped(pair_id=pair_id, reason=problem.reason, detail=problem.detail, row=sample.row)
        win, lose = reversed(images) if swap else images
        return Pair(pair_id=pair_id, prompt=prompt, win=win, lose=lose, label=label, row=sample.row)


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """The members of one row; bytes are read when asked for."""

    file: str
    stream: ByteStream
    index: TarIndex
    row: int

    def has(self, role: Role) -> bool:
        return self.index.member(self.row, role) is not None

    def check_members(self) -> None:
        doubled = self.index.doubled_roles(self.row)
        if doubled:
            raise RowProblem(reason="bad_metadata", detail=f"more than one member for {', '.join(doubled)}")

    def read(self, role: Role) -> bytes | None:
        place = self.index.member(self.row, role)
        if place is None:
            return None
        offset, size = place
        if size > MAX_IMAGE_BYTES:
            raise too_large(f"member {role}", size)
        try:
            self.stream.seek(offset)
            data = self.stream.read(size)
        except Exception as error:  # a remote file fails in its library's own ways
            raise unreadable_file(self.file, error) from error
        if len(data) != size:
            raise unreadable_file(self.file, EOFError(f"{len(data)} of {size} bytes of a member: the tar was cut"))
        return data

    def text(self, role: Role) -> str | None:
        """A text member; the line end at its end belongs to the file, not to the text."""
        data = self.read(role)
        if data is None:
            return None
        try:
            return data.decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError:
            raise RowProblem(reason="bad_metadata", detail=f"member {role} is not UTF-8") from None

    def json(self) -> dict[str, Any]:
        text = self.text("json")
        if text is None:
            return {}
        try:
            value = json.loads(text)
        except ValueError as error:
            raise RowProblem(reason="bad_metadata", detail=f"member json: {error}") from None
        if not isinstance(value, dict):
            raise RowProblem(reason="bad_metadata", detail=f"member json holds {type(value).__name__}, not an object")
        return value


def _pair_id(sample: _Sample, metadata: dict[str, Any]) -> str | None:
    value = next((metadata[name] for name in ("id", "ranking_id") if metadata.get(name) is not None), None)
    if value is None:
        value = sample.text("id")
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return None if value is None or value == "" else check_id(value)


def _prompt(sample: _Sample, metadata: dict[str, Any]) -> str:
    for name in ("prompt", "caption"):
        if name in metadata:
            return check_text(metadata[name], what=name, missing="missing_prompt")
    return check_text(sample.text("caption"), what="prompt", missing="missing_prompt")


def _our_label(metadata: dict[str, Any]) -> float:
    """The members are named win and lose, so a sample without a label is a hard preference; null says unlabelled."""
    return parse_label(metadata["label"]) if "label" in metadata else 1.0


def _mirror_label(sample: _Sample, metadata: dict[str, Any]) -> float:
    def value(role: Role) -> Any:
        text = sample.text(role)
        return metadata.get(role) if text is None else text.strip()

    if str(value("has_label")).lower() in ("false", "0", "0.0"):
        raise RowProblem(reason="unlabelled", detail="has_label is false")
    label = parse_label(value("label_0"), what="label_0")
    other = value("label_1")
    return label if other is None else contradiction_free(label, parse_label(other, what="label_1"))
