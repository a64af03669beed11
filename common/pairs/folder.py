"""A list of pairs, pairs.jsonl, .json, .csv or .tsv, whose images are files beside it or URLs.

    {"win": "img/1a.png", "lose": "img/1b.png", "prompt": "a red cube", "label": 0.8, "id": "cube-1"}
    {"images": ["img/1a.png", "img/1b.png", "img/1c.png"], "ranks": [2, 1, 3], "prompt": "a red cube"}

Images are paths relative to the list and below its folder; with `allow_remote` also any other path or a URL that fsspec
knows (reach.py). fields.py says what the fields mean.
One input shard: the list. Its entries are found once, then any range of rows is read by seeking; images are read only
for rows that are asked for.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Literal

from inpo.common.errors import DataError
from inpo.common.pairs.entries import Entry, ListIndex, index_list, parse_entry, read_entries
from inpo.common.pairs.fields import items, prompts_of
from inpo.common.pairs.files import shard_names, unreadable_file
from inpo.common.pairs.pair import Pair, RowProblem, Skipped
from inpo.common.pairs.reach import Reach


@dataclass(frozen=True, kw_only=True)
class ListSource:
    """One list of pairs."""

    location: str
    file: str
    not_read: Mapping[str, int] = field(default_factory=dict)
    """Other files beside the list, images aside."""
    allow_remote: bool = False
    kind: Literal["folder"] = "folder"

    def input_shards(self) -> list["ListShard"]:
        """The list as one shard."""
        return [ListShard(name=shard_names([self.file])[0], file=self.file, allow_remote=self.allow_remote)]


@dataclass(frozen=True, kw_only=True)
class ListShard:
    """The rows of a list; blank lines are no rows, and a ranking is a row for every two of its images."""

    name: str
    file: str
    allow_remote: bool = False
    """Whether rows may name what lies outside the list's folder, here or on other hosts."""

    @cached_property
    def _index(self) -> ListIndex:
        return index_list(self.file)

    @property
    def num_rows(self) -> int:
        """Rows of the list. Raises DataError when it cannot be read."""
        return int(self._index.first_rows[-1])

    @property
    def not_read(self) -> Mapping[str, int]:
        """The fields or columns that no pair is made of, and in how many entries they are."""
        return self._index.not_read

    def fingerprint(self) -> str:
        """blake2b of the list's bytes. The images are not part of it: give a replaced image a new name or the pair a
        new id.
        """
        return self._index.fingerprint

    def rows(self, start: int, stop: int) -> Iterator[Pair | Skipped]:
        """Rows start..stop-1 with their images.

        Raises DataError when the list fails, and when hosts failed and no image at all was read: an outage. A row whose
        image alone cannot be fetched is Skipped.
        """
        header, stop = self._index.header, min(stop, self.num_rows)
        if start >= stop:
            return
        reach = Reach(self.file, allow_remote=self.allow_remote)
        for entry, begin, end in self._entries(start, stop):
            row, wanted = max(begin, start), min(end, stop)
            for item in islice(self._items(entry, header, begin, row - begin, reach), wanted - row):
                yield item
                row += 1
            if row < wanted:
                raise unreadable_file(self.file, EOFError(f"row {row} is not what it was"))
        reach.refuse_outage(self.file)

    def prompts(self, start: int, stop: int) -> Iterator[str]:
        """From the list alone; of a ranking once. Raises DataError when the list fails."""
        for entry, _, _ in self._entries(start, min(stop, self.num_rows)):
            try:
                fields = parse_entry(entry, self._index.header)
            except RowProblem:  # gives no pair
                continue
            yield from prompts_of(fields)

    def _entries(self, start: int, stop: int) -> Iterator[tuple[Entry, int, int]]:
        """(entry, its first row, one after its last) of the entries that hold rows start..stop-1."""
        if start >= stop:
            return
        index = self._index
        first = index.entry_of(start)
        entries = enumerate(read_entries(self.file, index, first), start=first)
        row = start
        while row < stop:
            try:
                number, entry = next(entries)
            except StopIteration:
                raise unreadable_file(self.file, EOFError(f"row {row} of {stop} is not there any more")) from None
            except DataError:
                raise
            except Exception as error:  # a remote file fails in its library's own ways
                raise unreadable_file(self.file, error) from error
            begin, row = int(index.first_rows[number]), int(index.first_rows[number + 1])
            yield entry, begin, row

    def _items(
        self, entry: Entry, header: tuple[str, ...] | None, row: int, skip: int, reach: Reach
    ) -> Iterator[Pair | Skipped]:
        try:
            fields = parse_entry(entry, header)
        except RowProblem as problem:
            yield Skipped(pair_id=f"{self.name}/{row}", reason=problem.reason, detail=problem.detail, row=row)
            return
        yield from items(fields, row=row, skip=skip, name=self.name, default_id=None, read=reach.read)
