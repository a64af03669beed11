"""Parquet files of pairs, Pick-a-Pic v2 as published among them: one input shard for each file, read by row group.

Columns are named as the fields in fields.py, two images or a list of ranked ones; the others are never touched. An
image is binary, the `{bytes, path}` struct of the datasets library, or a path beside the file. An input shard is a
file, not a row group, because published row groups are smaller than a cache shard may be; memory does not depend on the
size of row groups, since pages are read a few rows at a time.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from inpo.common.errors import DataError
from inpo.common.pairs.columns import (
    IMAGE_ROLES,
    NOISE_ROLES,
    ORDERS,
    SIDES,
    USUAL,
    Reading,
    RowFields,
    brief,
    missing_field,
)
from inpo.common.pairs.entries import columns_problem
from inpo.common.pairs.fields import holds_singles, prompts_of, without_part
from inpo.common.pairs.file_state import FileState, file_state, unchanged
from inpo.common.pairs.files import filesystem, is_local, open_binary, read_as, unreadable_file
from inpo.common.pairs.pair import Pair, RowProblem, Skipped
from inpo.common.pairs.reach import Reach
from inpo.common.pairs.runs import Record, RunIndex, runs

ROWS_PER_READ = 16
"""Rows decoded at a time: 32 encoded images, or those of 16 rankings."""
ROWS_PER_INDEX_READ = 1024
"""Rows whose ranks and prompts are looked at together."""
LOCAL_BUFFER_BYTES = 1 << 20
REMOTE_BUFFER_BYTES = 8 << 20
"""Read-ahead of one column. Without it pyarrow loads a whole column chunk, which may hold gigabytes of images."""


@dataclass(frozen=True, kw_only=True)
class _Footer:
    """What a file says about itself without its images."""

    group_ends: tuple[int, ...]
    """Cumulative rows of the file, by row group."""
    columns: tuple[str, ...]
    """The columns that are read."""
    not_read: dict[str, int]
    runs: RunIndex
    """Which of the file's rows stand for which rows."""
    state: FileState
    """Of the file, before this was read."""


@dataclass(frozen=True, kw_only=True)
class ParquetShard:
    """One parquet file; a row is a row of the file, or two images of a ranking in one or in several."""

    name: str
    file: str
    reading: Reading = USUAL

    @cached_property
    def _footer(self) -> _Footer:
        state = file_state(self.file)
        with self._open() as parquet:
            problem = self._schema_problem(parquet.schema_arrow)
            if problem is not None:
                raise DataError(
                    "This parquet file has no image columns.",
                    where=self.file,
                    expected="columns win and lose, chosen and rejected, or those of another known set "
                    "(`inpo data columns SRC`, docs/data.md)",
                    got=f"columns {', '.join(map(brief, parquet.schema_arrow.names))}",
                    fix=f"say which is which: --columns win=...,lose=...,prompt=...; {problem}",
                )
            names = parquet.schema_arrow.names
            total, ends = 0, []
            for group in range(parquet.num_row_groups):
                total += parquet.metadata.row_group(group).num_rows
                ends.append(total)
            lists = _lists(parquet.schema_arrow)
            probe = self.reading.columns.row({name: [] if name in lists else None for name in names})
            orders = [name for role in ORDERS for name in probe.columns(role)]
            is_ranking = any(name in lists for name in orders) and any(
                name in lists for name in probe.columns("images")
            )
            not_read = set(without_part(probe, ranking=is_ranking))
            noise = {name for role in NOISE_ROLES for name in probe.columns(role)}
            unwanted = set() if self.reading.with_noise else noise  # they are as large as images
            index = RunIndex.plain(total)
            if is_ranking:  # what has another type in such a file is none of them
                not_read |= {name for name in (*probe.columns("images"), *orders) if name not in lists}
                index = self._index(parquet, [name for name in orders if name in lists])
            elif holds_singles(probe):
                keys = [*orders, *probe.columns("list"), *probe.columns("prompt")]
                index = self._index(parquet, list(dict.fromkeys(keys)))
            elif probe.columns("list"):
                index = self._index(parquet, list(probe.columns("list")))
            return _Footer(
                group_ends=tuple(ends),
                columns=tuple(name for name in names if name not in not_read | unwanted),
                not_read={f"column {brief(name)}": total for name in names if name in not_read},
                runs=index,
                state=state,
            )

    def _index(self, parquet: pq.ParquetFile, columns: list[str]) -> RunIndex:
        """From the small columns that say what is compared with what."""

        def records() -> Iterator[Record]:
            number = 0
            for batch in parquet.iter_batches(ROWS_PER_INDEX_READ, columns=columns, use_threads=False):
                for fields in batch.to_pylist():
                    # The images stand for themselves.
                    blank: dict[str, Any] = {name: [] if name in lists else b"" for name in probe.columns("images")}
                    yield number, RowFields(fields={**blank, **fields}, layout=probe.layout)
                    number += 1

        probe, lists = self.reading.columns.row(dict.fromkeys(parquet.schema_arrow.names)), _lists(parquet.schema_arrow)
        try:
            return RunIndex.of(runs(records()), self.reading.pairs_from)
        except Exception as error:  # pyarrow passes on whatever the file object raises
            raise unreadable_file(self.file, error) from error

    @property
    def num_rows(self) -> int:
        """Rows in the file, from its footer. Raises DataError when it cannot be read or has no image columns."""
        return self._footer.runs.num_rows

    @property
    def not_read(self) -> Mapping[str, int]:
        """The columns that no pair is made of."""
        return self._footer.not_read

    @property
    def has_lists(self) -> bool:
        """Whether rows are compared images of rankings, or say of which list they are."""
        return self._footer.runs.has_lists

    def group_sizes(self, start: int, stop: int) -> np.ndarray:
        """By the index alone."""
        return self._footer.runs.group_sizes(start, stop, self.reading.pairs_from)

    def fingerprint(self) -> str:
        """blake2b of the file's size, its footer, and the columns that are read, without images and noise: other labels
        or prompts may leave size and footer as they were. Raises DataError, also when the file was written again.
        """
        with unchanged(self.file, self._footer.state):
            return read_as(self._fingerprint, self.reading)

    @cached_property
    def _fingerprint(self) -> str:
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
        return hashlib.blake2b(size.to_bytes(8, "little") + footer + self._values(), digest_size=16).hexdigest()

    def _values(self) -> bytes:
        """Digest of what is stored of the columns that are read. Of images only paths count, of noise nothing."""
        names = self.reading.columns.names
        columns, images = set(self._footer.columns) - set(names(*NOISE_ROLES)), set(names(*IMAGE_ROLES))
        digest = hashlib.blake2b()
        with self._open() as parquet, open_binary(self.file, sequential=False) as stream:
            wanted = [i for i in range(len(parquet.schema)) if _is_small(parquet.schema.column(i), columns, images)]
            try:
                for group in range(parquet.num_row_groups):
                    for chunk in map(parquet.metadata.row_group(group).column, wanted):
                        stream.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
                        left = chunk.total_compressed_size
                        while left > 0 and (part := stream.read(min(left, LOCAL_BUFFER_BYTES))):
                            digest.update(part)
                            left -= len(part)
            except Exception as error:  # a remote file fails in its library's own ways
                raise unreadable_file(self.file, error) from error
        return digest.digest()

    def rows(self, start: int, stop: int) -> Iterator[Pair | Skipped]:
        """Rows start..stop-1. Only the row groups they lie in are opened; earlier rows of the first one are decoded
        and dropped, a few at a time. Raises DataError, also when the file was written again, and when rows name files
        and no host gives one.
        """
        stop = min(stop, self.num_rows)
        if start >= stop:
            return
        reach = Reach(self.file, allow_remote=self.reading.allow_remote)
        index = self._footer.runs
        with unchanged(self.file, self._footer.state):
            yield from index.items(
                self._records(*index.records(start, stop), self._footer.columns),
                start,
                stop,
                name=self.name,
                id_of=lambda entry: f"{self.name}/{entry}",
                read=reach.image,
                reading=self.reading,
            )
        reach.refuse_outage(self.file)

    def prompts(self, start: int, stop: int) -> Iterator[str]:
        """From the columns that are not images; of a ranking once. Raises DataError as `rows` does."""
        stop = min(stop, self.num_rows)
        if start >= stop:
            return
        first, last = self._footer.runs.records(start, stop)
        probe = self.reading.columns.row(dict.fromkeys(self._footer.columns))
        images = {name for role in (*IMAGE_ROLES, *NOISE_ROLES) for name in probe.columns(role)}
        columns = [name for name in self._footer.columns if name not in images]
        with unchanged(self.file, self._footer.state):
            for _, row in self._records(first, last, columns):
                if not isinstance(row, RowProblem):
                    yield from prompts_of(row)

    def head(self, count: int) -> list[dict[str, Any]]:
        """The first rows of the file with all columns. Raises DataError."""
        found: list[dict[str, Any]] = []
        with self._open() as parquet:
            binary = set(parquet.schema_arrow.names)  # whatever is bytes may be an image
            try:
                for batch in parquet.iter_batches(batch_size=min(count, ROWS_PER_READ), use_threads=False):
                    rows = [_fields(batch, i, binary) for i in range(batch.num_rows)]
                    found += [fields for fields in rows if not isinstance(fields, RowProblem)]
                    if len(found) >= count:
                        break
            except Exception as error:  # pyarrow's errors, and whatever the file object raises
                raise unreadable_file(self.file, error) from error
        return found[:count]

    def _records(self, start: int, stop: int, columns: Sequence[str]) -> Iterator[Record]:
        """The file's rows start..stop-1, from these columns."""
        for number, fields in self._entries(start, stop, columns):
            yield number, fields if isinstance(fields, RowProblem) else self.reading.columns.row(fields)

    def _entries(
        self, start: int, stop: int, columns: Sequence[str]
    ) -> Iterator[tuple[int, dict[str, Any] | RowProblem]]:
        """(number, fields) of the file's rows start..stop-1, from these columns."""
        ends = self._footer.group_ends
        begins = (0, *ends[:-1])
        groups = [i for i in range(len(ends)) if begins[i] < stop and ends[i] > start]
        row = begins[groups[0]] if groups else 0
        images = set(self.reading.columns.names(*IMAGE_ROLES, *NOISE_ROLES))
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
                        yield row + i, _fields(batch, i, images)
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
        return parquet

    def _schema_problem(self, schema: pa.Schema) -> str | None:
        """Why no pair can be made of these columns; None if some can."""
        columns, lists = self.reading.columns, _lists(schema)
        row = columns.row(dict.fromkeys(schema.names))
        twice = sorted({name for names in row.layout.values() for name in names if schema.names.count(name) > 1})
        if twice:
            return f"{', '.join(twice)} is there twice"
        is_pair = any(all(row.columns(role) for role in sides) for sides in SIDES)
        if not is_pair and lists & set(row.columns("images")):
            orders = [name for role in ORDERS for name in row.columns(role)]
            if lists & set(orders):
                return None
            return f"{orders[0]} is not a list" if orders else missing_field(columns.names(*ORDERS), schema.names)
        return columns_problem(columns, schema.names)


def _lists(schema: pa.Schema) -> set[str]:
    """The columns that hold lists."""
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return {str(field.name) for field in schema if any(test(field.type) for test in tests)}


def _is_small(leaf: pq.ColumnSchema, columns: set[str], images: set[str]) -> bool:
    """Whether values of the file belong to one of these columns and are no images themselves."""

    def is_within(names: set[str]) -> bool:
        return any(leaf.path == name or leaf.path.startswith(f"{name}.") for name in names)

    is_binary = leaf.physical_type.endswith("BYTE_ARRAY") and leaf.logical_type.type != "STRING"
    return is_within(columns) and not (is_binary and is_within(images))


def _fields(batch: pa.RecordBatch, i: int, images: set[str]) -> dict[str, Any] | RowProblem:
    fields = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value = column[i].as_py()
            # Some writers store text without saying that it is text.
            fields[name] = value.decode("utf-8") if isinstance(value, bytes) and name not in images else value
        except UnicodeDecodeError:
            return RowProblem(reason="bad_metadata", detail=f"{name} is not UTF-8")
        except (ValueError, OverflowError, pa.ArrowException) as error:  # a date or a number that Python has not
            return RowProblem(reason="bad_metadata", detail=f"{name}: {error}")
    return fields
