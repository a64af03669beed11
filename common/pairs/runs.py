"""Records of a file and the rows they stand for: one each, several (a ranking), or many records for several rows (a
list with an image a record).

    records --runs--> Run, Run, ... --> RunIndex     rows start..stop-1 --RunIndex.items--> Pair | Skipped, one for each
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from inpo.common.choices import PairsFrom
from inpo.common.pairs.columns import Reading, RowFields
from inpo.common.pairs.fields import MAX_RANKED, ReadImage, holds_singles, is_of_list, items, list_key, merge, rows_of
from inpo.common.pairs.pair import Pair, RowProblem, Skipped, id_or
from inpo.common.pairs.values import cut

Record = tuple[int, RowFields | RowProblem]
"""Number of a record in its file, and what it says."""


@dataclass(kw_only=True)
class Run:
    """Neighbouring records that are read together: one, or the images of a list and what cannot be understood among
    them.
    """

    first: int
    rows: list[RowFields] = field(default_factory=list)
    """The records' fields; of a list that is too long as many as show it."""
    bad: list[tuple[int, RowProblem]] = field(default_factory=list)
    """The records that cannot be understood: their rows come last."""
    count: int = 0
    is_again: bool = False
    """Whether the list has other rows further up in the file."""

    def add(self, number: int, row: RowFields | RowProblem) -> None:
        self.count += 1
        if isinstance(row, RowProblem):
            self.bad.append((number, row))
        elif len(self.rows) <= MAX_RANKED:
            self.rows.append(row)

    @property
    def key(self) -> tuple[str, str] | None:
        """What a further record has in common with this list; None where there can be none."""
        return list_key(self.rows[0]) if self.rows and holds_singles(self.rows[0]) else None

    def as_row(self) -> tuple[RowFields, RowProblem | None]:
        """All records as one row, and why no pair can be made of it."""
        if not holds_singles(self.rows[0]):
            return self.rows[0], None
        row, problem = merge(self.rows)
        if self.is_again:
            detail = f"the rows of {row.name('list')} {cut(row.get('list'))} do not lie together"
            problem = RowProblem(reason="bad_metadata", detail=detail)
        return row, problem

    def num_rows(self, pairs_from: PairsFrom) -> int:
        return (rows_of(self.as_row()[0], pairs_from) if self.rows else 0) + len(self.bad)

    def items(
        self,
        rows: range,
        *,
        skip: int,
        name: str,
        id_of: Callable[[int], str | None],
        read: ReadImage,
        reading: Reading,
    ) -> Iterator[Pair | Skipped]:
        """One item for each of these rows but the first `skip`."""
        bad = self.bad
        if bad and self.num_rows(reading.pairs_from) != len(rows):
            bad = bad[:1] * len(rows)  # in a column that says nothing of how many rows there are
        told: dict[str, Any] = {"name": name, "default_id": id_of(self.first), "read": read}
        told |= {"with_noise": reading.with_noise, "pairs_from": reading.pairs_from}
        good = range(rows.start, rows.stop - len(bad))
        if skip < len(good):
            row, problem = self.as_row()
            yield from islice(items(row, number=rows.start, skip=skip, problem=problem, **told), len(good) - skip)
        for number, (record, found) in zip(range(good.stop, rows.stop), bad, strict=True):
            if number >= rows.start + skip:
                pair_id = id_or(id_of(record), f"{name}/{number}")
                yield Skipped(pair_id=pair_id, reason=found.reason, detail=found.detail, row=number)


def runs(records: Iterable[Record]) -> Iterator[Run]:
    """The records in order, those of one list together, also where one between them cannot be understood."""
    run = Run(first=0)
    key: tuple[str, str] | None = None
    for number, row in records:
        if isinstance(row, RowProblem):
            is_part = key is not None and len(run.bad) < MAX_RANKED
        else:
            is_part = key is not None and holds_singles(row) and list_key(row) == key
        if not is_part:
            if run.count:
                yield run
            run = Run(first=number)
        run.add(number, row)
        if not is_part:
            key = run.key
    if run.count:
        yield run


@dataclass(frozen=True, kw_only=True)
class RunIndex:
    """Where the runs of a file lie."""

    starts: np.ndarray
    """int64 [run + 1]: number of its first record; the last value is the number of records."""
    first_rows: np.ndarray
    """int64 [run + 1]: the number of its first row; the last value is the number of rows."""
    again: frozenset[int] = frozenset()
    """The runs whose list has another one further up in the file."""
    has_lists: bool = False
    """Whether a record is a ranking or a part of one, or says of which list its pair is."""

    @classmethod
    def of(cls, found: Iterable[Run], pairs_from: PairsFrom) -> "RunIndex":
        starts, first_rows = [0], [0]
        seen: set[int] = set()
        again: set[int] = set()
        has_lists = False
        for number, run in enumerate(found):
            starts.append(run.first + run.count)
            first_rows.append(first_rows[-1] + run.num_rows(pairs_from))
            has_lists = has_lists or any(map(is_of_list, run.rows[:1]))
            key = run.key
            if key is not None and key[0] == "list":
                if hash(key) in seen:
                    again.add(number)
                seen.add(hash(key))
        return cls(
            starts=np.array(starts, dtype=np.int64),
            first_rows=np.array(first_rows, dtype=np.int64),
            again=frozenset(again),
            has_lists=has_lists,
        )

    @property
    def num_rows(self) -> int:
        return int(self.first_rows[-1])

    @classmethod
    def plain(cls, num_records: int) -> "RunIndex":
        """Each record is a row."""
        numbers = np.arange(num_records + 1, dtype=np.int64)
        return cls(starts=numbers, first_rows=numbers)

    def span(self, start: int, stop: int) -> range:
        """The runs that hold rows start..stop-1."""
        if start >= stop:
            return range(0)
        first = int(np.searchsorted(self.first_rows, start, side="right")) - 1
        return range(first, int(np.searchsorted(self.first_rows, stop, side="left")))

    def group_sizes(self, start: int, stop: int, pairs_from: PairsFrom) -> np.ndarray:
        """int64 [run]: of rows start..stop-1 how many images each run has at most."""
        span = self.span(start, stop)
        ends = self.first_rows[span.start : span.stop + 1]
        here, all_rows = np.diff(np.clip(ends, start, stop)), np.diff(ends)
        if pairs_from == "best-worst":
            return np.full_like(here, 2)
        whole = all_rows + 1 if pairs_from == "adjacent" else (1 + np.sqrt(1 + 8 * all_rows).astype(np.int64)) // 2
        sizes: np.ndarray = np.minimum(whole, 2 * here)
        return sizes

    def records(self, start: int, stop: int) -> tuple[int, int]:
        """The records that rows start..stop-1 are made of: first, and one after the last."""
        span = self.span(start, stop)
        return int(self.starts[span.start]), int(self.starts[span.stop])

    def runs(self, records: Iterable[Record], start: int, stop: int) -> Iterator[tuple[Run, range]]:
        """The runs that hold rows start..stop-1, cut where this index says, with the rows of each; fewer, if the
        records are.
        """
        found = iter(records)
        for number in self.span(start, stop):
            rows = range(int(self.first_rows[number]), int(self.first_rows[number + 1]))
            run = Run(first=int(self.starts[number]), is_again=number in self.again)
            for record, row in islice(found, int(self.starts[number + 1] - self.starts[number])):
                run.add(record, row)
            if not run.count:
                return
            yield run, rows

    def items(
        self,
        records: Iterable[Record],
        start: int,
        stop: int,
        *,
        name: str,
        id_of: Callable[[int], str | None],
        read: ReadImage,
        reading: Reading,
    ) -> Iterator[Pair | Skipped]:
        """Rows start..stop-1; `records` begin with the first that `records(start, stop)` names. `id_of` the number of
        a record is the id of what has none.
        """
        for run, rows in self.runs(records, start, stop):
            told: dict[str, Any] = {"name": name, "id_of": id_of, "read": read, "reading": reading}
            wanted = min(rows.stop, stop) - max(rows.start, start)
            yield from islice(run.items(rows, skip=max(0, start - rows.start), **told), wanted)
