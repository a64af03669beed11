"""Pick-a-Pic v2 parquet as published: one input shard for each file, read by row group.

Columns read: jpg_0, jpg_1 (binary, or the `{bytes, path}` struct of the datasets library), label_0, label_1 (float, 0.5
for a tie), has_label, caption, ranking_id; without ranking_id, image_0_uid and image_1_uid name the pair. The others
are never touched. An input shard is a file, not a row group, because the published row groups are smaller than a cache
shard may be; memory does not depend on the size of row groups, since pages are read a few rows at a time.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from inpo.common.errors import DataError
from inpo.common.pairs.files import filesystem, is_local, open_binary, shard_names, unreadable_file
from inpo.common.pairs.pair import (
    Pair,
    RowProblem,
    Skipped,
    check_id,
    check_image_bytes,
    check_text,
    contradiction_free,
    parse_label,
    preference,
)

IMAGE_COLUMNS = ("jpg_0", "jpg_1")
LABEL_COLUMNS = ("label_0", "label_1", "has_label")
ID_COLUMNS = ("ranking_id", "image_0_uid", "image_1_uid")
ROWS_PER_READ = 16
"""Rows decoded at a time: 32 encoded images."""
LOCAL_BUFFER_BYTES = 1 << 20
REMOTE_BUFFER_BYTES = 8 << 20
"""Read-ahead of one column. Without it pyarrow loads a whole column chunk, which may hold gigabytes of images."""


@dataclass(frozen=True, kw_only=True)
class ParquetSource:
    """Parquet files with the columns of Pick-a-Pic v2."""

    location: str
    files: tuple[str, ...]
    kind: Literal["parquet"] = "parquet"

    def input_shards(self) -> list["ParquetShard"]:
        """One shard a file, sorted by name."""
        names = shard_names(self.files)
        shards = [ParquetShard(name=name, file=file) for name, file in zip(names, self.files, strict=True)]
        return sorted(shards, key=lambda shard: shard.name)


@dataclass(frozen=True, kw_only=True)
class ParquetShard:
    """One parquet file; a row is a row of the file."""

    name: str
    file: str

    @cached_property
    def _row_group_ends(self) -> tuple[int, ...]:
        """Cumulative row counts of the row groups, from the footer."""
        with self._open() as parquet:
            total, ends = 0, []
            for group in range(parquet.num_row_groups):
                total += parquet.metadata.row_group(group).num_rows
                ends.append(total)
            return tuple(ends)

    @property
    def num_rows(self) -> int:
        """Rows in the file, from its footer. Raises DataError when it cannot be read or has no image columns."""
        return self._row_group_ends[-1] if self._row_group_ends else 0

    def fingerprint(self) -> str:
        """blake2b of the file's size and footer, which holds sizes, offsets and statistics of every column chunk."""
        with open_binary(self.file, sequential=False) as stream:
            try:
                size = stream.seek(0, 2)
                stream.seek(max(0, size - 8))
                tail = stream.read(8)
                footer_bytes = int.from_bytes(tail[:4], "little")
                stream.seek(max(0, size - 8 - footer_bytes))
                footer = stream.read(footer_bytes)
            except Exception as error:  # a remote file fails in its library's own ways
                raise unreadable_file(self.file, error) from error
        if tail[4:] != b"PAR1" or len(footer) != footer_bytes:
            raise unreadable_file(self.file, ValueError("not a whole parquet file: no footer"))
        return hashlib.blake2b(size.to_bytes(8, "little") + footer, digest_size=16).hexdigest()

    def rows(self, start: int, stop: int) -> Iterator[Pair | Skipped]:
        """Rows start..stop-1. Only the row groups they lie in are opened; earlier rows of the first one are decoded
        and dropped, a few at a time. Raises DataError.
        """
        ends = self._row_group_ends
        stop = min(stop, self.num_rows)
        begins = (0, *ends[:-1])
        groups = [i for i in range(len(ends)) if begins[i] < stop and ends[i] > start]
        if not groups:
            return
        row = begins[groups[0]]
        with self._open() as parquet:
            try:
                for group in groups:
                    # One group at a time, so that a damaged group costs none of the rows before it.
                    for batch in parquet.iter_batches(
                        batch_size=ROWS_PER_READ, row_groups=[group], columns=_columns(parquet), use_threads=False
                    ):
                        for i in range(max(0, start - row), min(batch.num_rows, stop - row)):
                            yield self._row(batch, i, row + i)
                        row += batch.num_rows
                        if row >= stop:
                            return
            except (pa.ArrowException, OSError) as error:
                raise unreadable_file(self.file, error) from error

    def _open(self) -> pq.ParquetFile:
        local = is_local(filesystem(self.file)[0])
        stream = open_binary(self.file, sequential=False)
        try:
            parquet = pq.ParquetFile(
                stream,
                buffer_size=LOCAL_BUFFER_BYTES if local else REMOTE_BUFFER_BYTES,
                # Pre-buffering fetches whole column chunks of all row groups: fast, and unbounded memory.
                pre_buffer=False,
            )
        except Exception as error:  # pyarrow passes on whatever the file object raises
            stream.close()
            raise unreadable_file(self.file, error) from error
        missing = [name for name in IMAGE_COLUMNS if name not in parquet.schema_arrow.names]
        if missing:
            stream.close()
            raise DataError(
                "this parquet file has no image columns",
                where=self.file,
                expected=f"columns {', '.join(IMAGE_COLUMNS)} (Pick-a-Pic v2)",
                got=f"columns {', '.join(parquet.schema_arrow.names)}",
                fix="use a folder with pairs.jsonl for other layouts (docs/data.md)",
            )
        return parquet

    def _row(self, batch: pa.RecordBatch, i: int, row: int) -> Pair | Skipped:
        names = batch.schema.names

        def value(name: str) -> Any:
            if name not in names:
                return None
            try:
                return batch.column(name)[i].as_py()
            except UnicodeDecodeError:
                raise RowProblem(reason="bad_metadata", detail=f"{name} is not UTF-8") from None

        pair_id = f"{self.name}/{row}"
        try:
            pair_id = _pair_id({name: value(name) for name in ID_COLUMNS}) or pair_id
            prompt = check_text(value("caption"), what="caption", missing="missing_prompt")
            if value("has_label") is False:
                raise RowProblem(reason="unlabelled", detail="has_label is false")
            label = parse_label(value("label_0"), what="label_0")
            if value("label_1") is not None:
                label = contradiction_free(label, parse_label(value("label_1"), what="label_1"))
            swap, label = preference(label)
            images = [check_image_bytes(_image_bytes(value(name)), what=name) for name in IMAGE_COLUMNS]
        except RowProblem as problem:
            return Skipped(pair_id=pair_id, reason=problem.reason, detail=problem.detail, row=row)
        win, lose = reversed(images) if swap else images
        return Pair(pair_id=pair_id, prompt=prompt, win=win, lose=lose, label=label, row=row)


def _columns(parquet: pq.ParquetFile) -> list[str]:
    names = parquet.schema_arrow.names
    wanted = [*IMAGE_COLUMNS, *LABEL_COLUMNS, "caption", *ID_COLUMNS]
    return [name for name in wanted if name in names]


def _pair_id(ids: dict[str, Any]) -> str | None:
    """ranking_id, else the two image ids; one image pair may be ranked by several people, so these come second."""
    if ids["ranking_id"] is not None:
        return check_id(str(ids["ranking_id"]), what="ranking_id")
    if ids["image_0_uid"] is not None and ids["image_1_uid"] is not None:
        return check_id(f"{ids['image_0_uid']}.{ids['image_1_uid']}", what="image_0_uid.image_1_uid")
    return None


def _image_bytes(value: Any) -> bytes | None:
    """The bytes of a binary cell or of a `{bytes, path}` struct."""
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else None
