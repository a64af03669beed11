"""A list of pairs, pairs.jsonl, .json, .csv or .tsv, whose images are files beside it or URLs.

    {"win": "img/1a.png", "lose": "img/1b.png", "prompt": "a red cube", "label": 0.8, "id": "cube-1"}
    {"images": ["img/1a.png", "img/1b.png", "img/1c.png"], "ranks": [2, 1, 3], "prompt": "a red cube"}

Images are paths relative to the list and below its folder; with `allow_remote` also any other path or a URL that fsspec
knows (reach.py). fields.py says what the fields mean.
One input shard: the list. Its entries are found once, then any range of rows is read by seeking; images are read only
for rows that are asked for.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from inpo.common.errors import DataError
from inpo.common.pairs.columns import USUAL, Reading
from inpo.common.pairs.entries import Entry, ListIndex, index_list, parse_entry, read_entries, record_of
from inpo.common.pairs.fields import prompts_of
from inpo.common.pairs.file_state import unchanged
from inpo.common.pairs.files import read_as, unreadable_file
from inpo.common.pairs.pair import Pair, RowProblem, Skipped
from inpo.common.pairs.reach import Reach
from inpo.common.pairs.runs import Record


@dataclass(frozen=True, kw_only=True)
class ListShard:
    """The rows of a list; blank lines are no rows, and a ranking is a row for every two of its images."""

    name: str
    file: str
    reading: Reading = USUAL

    @cached_property
    def _index(self) -> ListIndex:
        return index_list(self.file, self.reading)

    @property
    def num_rows(self) -> int:
        """Rows of the list. Raises DataError when it cannot be read."""
        return self._index.runs.num_rows

    @property
    def not_read(self) -> Mapping[str, int]:
        """The fields or columns that no pair is made of, and in how many entries they are."""
        return self._index.not_read

    @property
    def has_lists(self) -> bool:
        """Whether rows are compared images of rankings, or say of which list they are."""
        return self._index.runs.has_lists

    def group_sizes(self, start: int, stop: int) -> np.ndarray:
        """By the index alone."""
        return self._index.runs.group_sizes(start, stop, self.reading.pairs_from)

    def fingerprint(self) -> str:
        """blake2b of the list's bytes. The images are not part of it: give a replaced image a new name or the pair a
        new id.
        """
        return read_as(self._index.fingerprint, self.reading)

    def rows(self, start: int, stop: int) -> Iterator[Pair | Skipped]:
        """Rows start..stop-1 with their images.

        Raises DataError when the list fails or was written again, and when hosts failed and no image at all was read:
        an outage. A row whose image alone cannot be fetched is Skipped.
        """
        stop = min(stop, self.num_rows)
        if start >= stop:
            return
        reach = Reach(self.file, allow_remote=self.reading.allow_remote)
        with unchanged(self.file, self._index.state):
            yield from self._index.runs.items(
                self._records(start, stop),
                start,
                stop,
                name=self.name,
                id_of=lambda entry: None,
                read=reach.image,
                reading=self.reading,
            )
        reach.refuse_outage(self.file)

    def prompts(self, start: int, stop: int) -> Iterator[str]:
        """From the list alone; of a ranking once. Raises DataError when the list fails."""
        stop = min(stop, self.num_rows)
        with unchanged(self.file, self._index.state):
            for run, _ in self._index.runs.runs(self._records(start, stop), start, stop):
                for row in run.rows[:1]:
                    yield from prompts_of(row)

    def head(self, count: int) -> list[dict[str, Any]]:
        """The fields of the first entries that can be understood. Raises DataError when the list fails."""
        found: list[dict[str, Any]] = []
        index = index_list(self.file, self.reading, check_header=False)
        for entry in self._entries(0, len(index.offsets), index):
            with suppress(RowProblem):
                found.append(parse_entry(entry, index.header))
            if len(found) == count:
                break
        return found

    def _records(self, start: int, stop: int) -> Iterator[Record]:
        """The entries that rows start..stop-1 are made of."""
        if start >= stop:
            return
        first, last = self._index.runs.records(start, stop)
        for number, entry in enumerate(self._entries(first, last, self._index), start=first):
            yield record_of(number, entry, self._index.header, self.reading.columns)

    def _entries(self, start: int, stop: int, index: ListIndex) -> Iterator[Entry]:
        """Entries start..stop-1 of the list."""
        entries = read_entries(self.file, index, start)
        for number in range(start, stop):
            try:
                yield next(entries)
            except StopIteration:
                raise unreadable_file(self.file, EOFError(f"entry {number} of {stop} is not there any more")) from None
            except DataError:
                raise
            except Exception as error:  # a remote file fails in its library's own ways
                raise unreadable_file(self.file, error) from error
