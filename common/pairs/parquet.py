"""Parquet files of pairs, Pick-a-Pic v2 as published among them: one input shard for each file, read by row group.

Columns are named as the fields in fields.py, two images or a list of ranked ones; the others are never touched. An
image is binary, the `{bytes, path}` struct of the datasets library, or a path beside the file. An input shard is a
file, not a row group, because published row groups are smaller than a cache shard may be; memory does not depend on the
size of row groups, since pages are read a few rows at a time.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from inpo.common.errors import DataError
from inpo.common.pairs.fields import (
    IMAGE_FIELDS,
    IMAGES,
    KNOWN,
    LAYOUTS,
    LOSE,
    ORDER,
    WIN,
    ReadImage,
    brief,
    comparisons_of,
    items,
    missing_field,
    num_ranked,
    prompts_of,
    without_part,
)
from inpo.common.pairs.files import filesystem, is_local, open_binary, shard_names, unreadable_file
from inpo.common.pairs.pair import Pair, RowProblem, Skipped
from inpo.common.pairs.reach import Reach

ROWS_PER_READ = 16
"""Rows decoded at a time: 32 encoded images, or those of 16 rankings."""
LOCAL_BUFFER_BYTES = 1 << 20
REMOTE_BUFFER_BYTES = 8 << 20
"""Read-ahead of one column. Without it pyarrow loads a whole column chunk, which may hold gigabytes of images."""


@dataclass(frozen=True, kw_only=True)
class ParquetSource:
    """Parquet files with a pair or a ranking a row."""

    location: str
    files: tuple[str, ...]
    not_read: Mapping[str, int] = field(default_factory=dict)
    """Other files and folders beside the parquet files."""
    allow_remote: bool = False
    kind: Literal["parquet"] = "parquet"

    def input_shards(self) -> list["ParquetShard"]:
        """One shard a file, sorted by name."""
        names = shard_names(self.files)
        shards = [
            ParquetShard(name=name, file=file, allow_remote=self.allow_remote)
            for name, file in zip(names, self.files, strict=True)
        ]
        return sorted(shards, key=lambda shard: shard.name)


@dataclass(frozen=True, kw_only=True)
class _Footer:
    """What a file says about itself without its images."""

    group_ends: tuple[int, ...]
    """Cumulative rows of the file, by row group."""
    columns: tuple[str, ...]
    """The columns that are read."""
    not_read: dict[str, int]
    first_rows: np.ndarray | None
    """int64 [row of the file + 1]: the number of its first row as counted here, where rows are rankings; else None."""


@dataclass(frozen=True, kw_only=True)
class ParquetShard:
    """One parquet file; a row is a row of the file, or two images of a ranking in one."""

    name: str
    file: str
    allow_remote: bool = False
    """Whether rows that have paths for images may name what lies outside the file's folder, here or on other hosts."""

    @cached_property
    def _footer(self) -> _Footer:
        with self._open() as parquet:
            names = parquet.schema_arrow.names
            total, ends = 0, []
            for group in range(parquet.num_row_groups):
                total += parquet.metadata.row_group(group).num_rows
                ends.append(total)
            lists = _lists(parquet.schema_arrow)
            order = [name for name in ORDER if name in lists]
            is_ranking = bool(order) and any(name in lists for name in IMAGES)
            not_read = set(without_part(names, is_ranking=is_ranking))
            if is_ranking:  # what has another type in such a file is none of them
                not_read |= {name for name in names if name in (*IMAGES, *ORDER) and name not in lists}
            return _Footer(
                group_ends=tuple(ends),
                columns=tuple(name for name in names if name not in not_read),
                not_read={f"column {brief(name)}": total for name in names if name in not_read},
                first_rows=self._rankings(parquet, order) if is_ranking else None,
            )

    def _rankings(self, parquet: pq.ParquetFile, order: list[str]) -> np.ndarray:
        """Rows by row of the file, from the small columns that have the ranks."""
        counts = [0]
        try:
            for batch in parquet.iter_batches(columns=order, use_threads=False):
                counts += [comparisons_of(num_ranked(fields)) for fields in batch.to_pylist()]
        except Exception as error:  # pyarrow passes on whatever the file object raises
            raise unreadable_file(self.file, error) from error
        return np.cumsum(np.array(counts, dtype=np.int64))

    @property
    def num_rows(self) -> int:
        """Rows in the file, from its footer. Raises DataError when it cannot be read or has no image columns."""
        footer = self._footer
        if footer.first_rows is not None:
            return int(footer.first_rows[-1])
        return footer.group_ends[-1] if footer.group_ends else 0

    @property
    def not_read(self) -> Mapping[str, int]:
        """The columns that no pair is made of."""
        return self._footer.not_read

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
        and dropped, a few at a time. Raises DataError, also when rows name files and no host gives one.
        """
        stop = min(stop, self.num_rows)
        if start >= stop:
            return
        reach = Reach(self.file, allow_remote=self.allow_remote)
        yield from self._rows(start, stop, partial(_image, reach))
        reach.refuse_outage(self.file)

    def _rows(self, start: int, stop: int, read: ReadImage) -> Iterator[Pair | Skipped]:
        first_rows = self._footer.first_rows
        if first_rows is None:
            for entry, fields in self._entries(start, stop, self._footer.columns):
                yield from self._items(fields, entry, row=entry, skip=0, read=read)
            return
        for entry, fields in self._entries(*self._span(start, stop), self._footer.columns):
            begin = int(first_rows[entry])
            for item in self._items(fields, entry, row=begin, skip=max(0, start - begin), read=read):
                if item.row >= stop:
                    return
                yield item

    def prompts(self, start: int, stop: int) -> Iterator[str]:
        """From the columns that are not images; of a ranking once. Raises DataError as `rows` does."""
        stop = min(stop, self.num_rows)
        if start >= stop:
            return
        columns = [name for name in self._footer.columns if name not in IMAGE_FIELDS]
        for _, fields in self._entries(*self._span(start, stop), columns):
            if not isinstance(fields, RowProblem):
                yield from prompts_of(fields)

    def _span(self, start: int, stop: int) -> tuple[int, int]:
        """The file's rows that hold rows start..stop-1: first, and one after the last."""
        first_rows = self._footer.first_rows
        if first_rows is None:
            return start, stop
        first = int(np.searchsorted(first_rows, start, side="right")) - 1
        return first, int(np.searchsorted(first_rows, stop, side="left"))

    def _items(
        self, fields: "dict[str, Any] | RowProblem", entry: int, *, row: int, skip: int, read: ReadImage
    ) -> Iterator[Pair | Skipped]:
        pair_id = f"{self.name}/{entry}"
        if isinstance(fields, RowProblem):
            first_rows = self._footer.first_rows
            count = 1 if first_rows is None else int(first_rows[entry + 1] - first_rows[entry])
            for number in range(skip, count):
                yield Skipped(pair_id=pair_id, reason=fields.reason, detail=fields.detail, row=row + number)
            return
        yield from items(fields, row=row, skip=skip, name=self.name, default_id=pair_id, read=read)

    def _entries(
        self, start: int, stop: int, columns: Sequence[str]
    ) -> Iterator[tuple[int, dict[str, Any] | RowProblem]]:
        """(number, fields) of the file's rows start..stop-1, from these columns."""
        ends = self._footer.group_ends
        begins = (0, *ends[:-1])
        groups = [i for i in range(len(ends)) if begins[i] < stop and ends[i] > start]
        row = begins[groups[0]] if groups else 0
        with self._open() as parquet:
            for group in groups:
                # One group at a time, so that a damaged group costs none of the rows before it.
                batches = parquet.iter_batches(
                    batch_size=ROWS_PER_READ, row_groups=[group], columns=list(columns), use_threads=False
                )
                while True:
                    try:
                        batch = next(batches, None)
                    except Exception as error:  # pyarrow's errors, and whatever the file object raises
                        raise unreadable_file(self.file, error) from error
                    if batch is None:
                        break
                    for i in range(max(0, start - row), min(batch.num_rows, stop - row)):
                        yield row + i, _fields(batch, i)
                    row += batch.num_rows
                    if row >= stop:
                        return

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
        problem = _schema_problem(parquet.schema_arrow)
        if problem is not None:
            stream.close()
            raise DataError(
                "this parquet file has no image columns",
                where=self.file,
                expected="columns jpg_0 and jpg_1 (Pick-a-Pic), win and lose, chosen and rejected, "
                "or a list images with ranks or scores",
                got=f"columns {', '.join(map(brief, parquet.schema_arrow.names))}",
                fix=f"rename the columns, or use a folder with pairs.jsonl (docs/data.md); {problem}",
            )
        return parquet


def _image(reach: Reach, value: object, what: str) -> bytes | None:
    """The bytes of a binary cell, of a `{bytes, path}` struct, or of the file that a path names."""
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if isinstance(data, str):
        data, path = None, data
    if data is None and path is not None:
        return reach.read(path, what)
    if data is not None and not isinstance(data, bytes):
        raise RowProblem(reason="missing_image", detail=f"{what} is {type(data).__name__}, not bytes or a path")
    return data


def _schema_problem(schema: pa.Schema) -> str | None:
    """Why no pair can be made of these columns; None if some can."""
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1 and name in KNOWN})
    if twice:
        return f"{', '.join(twice)} is there twice"
    names = set(schema.names)
    if any(set(first) & names and set(second) & names for first, second in LAYOUTS):
        return None
    lists = _lists(schema)
    if lists & set(IMAGES):
        if lists & set(ORDER):
            return None
        one_value = [name for name in ORDER if name in names]
        return f"{one_value[0]} is no list" if one_value else missing_field(ORDER, schema.names)
    one_side = next((other for side, other in LAYOUTS if set(side) & names), None)
    return missing_field(one_side or (*WIN, *LOSE), schema.names)


def _lists(schema: pa.Schema) -> set[str]:
    """The columns that hold lists."""
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return {str(field.name) for field in schema if any(test(field.type) for test in tests)}


def _fields(batch: pa.RecordBatch, i: int) -> dict[str, Any] | RowProblem:
    fields = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value = column[i].as_py()
            # Some writers store text without saying that it is text.
            fields[name] = value.decode("utf-8") if isinstance(value, bytes) and name not in IMAGE_FIELDS else value
        except UnicodeDecodeError:
            return RowProblem(reason="bad_metadata", detail=f"{name} is not UTF-8")
        except (ValueError, OverflowError, pa.ArrowException) as error:  # a date or a number that Python has not
            return RowProblem(reason="bad_metadata", detail=f"{name}: {error}")
    return fields
