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
from inpo.common.pairs.fields import MAX_RANKED, ReadImage, holds_singles, items, list_key, merge, rows_of
from inpo.common.pairs.pair import Pair, RowProblem, Skipped, id_or

Record = tuple[int, RowFields | RowProblem]
"""Number of a record in its file, and what it says."""


@dataclass(kw_only=True)
class Run:
    """Neighbouring records that are read together: one, or the images of a list."""

    first: int
    rows: list[RowFields] = field(default_factory=list)
    """The records' fields; of a list that is too long as many as show it."""
    problem: RowProblem | None = None
    count: int = 1

    def as_row(self) -> tuple[RowFields, RowProblem | None]:
        """All records as one row, and why no pair can be made of it."""
        return merge(self.rows) if holds_singles(self.rows[0]) else (self.rows[0], None)

    def num_rows(self, pairs_from: PairsFrom) -> int:
        return rows_of(self.as_row()[0], pairs_from) if self.problem is None else 1

    def items(
        self, rows: range, *, skip: int, name: str, default_id: str | None, read: ReadImage, reading: Reading
    ) -> Iterator[Pair | Skipped]:
        """One item for each of these rows but the first `skip`."""
        if self.problem is not None:
            pair_id = id_or(default_id, f"{name}/{rows.start}")
            for number in rows[skip:]:
                yield Skipped(pair_id=pair_id, reason=self.problem.reason, detail=self.problem.detail, row=number)
            return
        row, problem = self.as_row()
        told: dict[str, Any] = {
            "name": name,
            "default_id": default_id,
            "read": read,
            "with_noise": reading.with_noise,
            "pairs_from": reading.pairs_from,
            "problem": problem,
        }
        yield from islice(items(row, number=rows.start, skip=skip, **told), len(rows) - skip)


def runs(records: Iterable[Record]) -> Iterator[Run]:
    """The records in order, those of one list together."""
    run: Run | None = None
    key: object = None
    for number, row in records:
        if isinstance(row, RowProblem):
            if run is not None:
                yield run
            yield Run(first=number, problem=row)
            run = None
            continue
        mine = list_key(row) if holds_singles(row) else None
        if run is not None and mine is not None and mine == key:
            run.count += 1
            if len(run.rows) <= MAX_RANKED:
                run.rows.append(row)
            continue
        if run is not None:
            yield run
        run, key = Run(first=number, rows=[row]), mine
    if run is not None:
        yield run


@dataclass(frozen=True, kw_only=True)
class RunIndex:
    """Where the runs of a file lie."""

    starts: np.ndarray
    """int64 [run + 1]: number of its first record; the last value is the number of records."""
    first_rows: np.ndarray
    """int64 [run + 1]: the number of its first row; the last value is the number of rows."""

    @classmethod
    def of(cls, found: Iterable[Run], pairs_from: PairsFrom) -> "RunIndex":
        starts, first_rows = [0], [0]
        for run in found:
            starts.append(run.first + run.count)
            first_rows.append(first_rows[-1] + run.num_rows(pairs_from))
        return cls(starts=np.array(starts, dtype=np.int64), first_rows=np.array(first_rows, dtype=np.int64))

    @property
    def num_rows(self) -> int:
        return int(self.first_rows[-1])

    @classmethod
    def plain(cls, num_records: int) -> "RunIndex":
        """Each record is a row."""
        numbers = np.arange(num_records + 1, dtype=np.int64)
        return cls(starts=numbers, first_rows=numbers)

    @property
    def has_lists(self) -> bool:
        """Whether a run stands for several rows, or is several records."""
        return self.num_rows > len(self.starts) - 1 or int(self.starts[-1]) > len(self.starts) - 1

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
            run = Run(first=int(self.starts[number]), count=int(self.starts[number + 1] - self.starts[number]))
            for _, row in islice(found, run.count):
                if isinstance(row, RowProblem):
                    run.problem = row
                elif len(run.rows) <= MAX_RANKED:
                    run.rows.append(row)
            if not run.rows and run.problem is None:
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
            told: dict[str, Any] = {"name": name, "default_id": id_of(run.first), "read": read, "reading": reading}
            wanted = min(rows.stop, stop) - max(rows.start, start)
            yield from islice(run.items(rows, skip=max(0, start - rows.start), **told), wanted)
