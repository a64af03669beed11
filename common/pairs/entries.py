"""The entries of a list of pairs: where each begins, and what its text says.

    JSON lines   one object a line
    CSV, TSV     a header, then one entry a line or, inside quotes, several
    JSON         one array of objects

An entry that cannot be understood is an entry all the same, and its neighbours are not touched by it.
"""

import csv
import hashlib
import json
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple, cast

import numpy as np

from inpo.common.errors import DataError
from inpo.common.pairs.columns import SIDES, ColumnMap, Reading, brief, missing_field
from inpo.common.pairs.fields import holds_singles, is_ranking, without_part
from inpo.common.pairs.file_state import FileState, file_state
from inpo.common.pairs.files import ByteStream, open_binary, unreadable_file
from inpo.common.pairs.pair import RowProblem
from inpo.common.pairs.runs import Record, RunIndex, runs
from inpo.common.pairs.signatures import Likely, likely_kind
from inpo.common.text import TextProblem, decode_text, refuse_wide

LIST_SUFFIXES = (".jsonl", ".csv", ".tsv", ".json")
_MANY = 1000
"""Different unknown names that are counted one by one."""


class Entry(NamedTuple):
    """One entry as it lies in the file."""

    offset: int
    line: int
    """Line of the file at which it begins, from 1."""
    content: str | list[str] | RowProblem
    """JSON text, CSV fields, or why it is neither."""


@dataclass(frozen=True, kw_only=True)
class ListIndex:
    """Where the entries of a list are."""

    offsets: np.ndarray
    """int64 [entry]: the byte at which it begins."""
    lines: np.ndarray
    """int64 [entry]: its line, from 1."""
    runs: RunIndex
    """Which entries stand for which rows."""
    header: tuple[str, ...] | None
    """Column names of CSV and TSV."""
    not_read: dict[str, int]
    fingerprint: str
    state: FileState
    """Of the file, before it was gone through."""


def index_list(location: str, reading: Reading, *, check_header: bool = True) -> ListIndex:
    """Go through a list once. Raises DataError when the file as a whole is not what its name says."""
    suffix = PurePosixPath(location).suffix.lower()
    state = file_state(location)
    try:
        with open_binary(location) as stream:
            _refuse_other_kinds(location, stream.read(4096))
            stream.seek(0)
            if suffix == ".json":
                return _index_array(location, stream.read(), reading, state)
            reader = EntryReader(stream, delimiter=_DELIMITERS.get(suffix))
            header = reader.header()
            if header is not None and check_header:
                _check_header(location, header, reading.columns)
            return _index(reader.entries(), header, reader.digest, reading, state)
    except DataError:
        raise
    except Exception as error:  # a remote file fails in its library's own ways
        raise unreadable_file(location, error) from error


def read_entries(location: str, index: ListIndex, start: int) -> Iterator[Entry]:
    """Entries from number `start` on, read by seeking."""
    suffix = PurePosixPath(location).suffix.lower()
    with open_binary(location) as stream:
        if suffix == ".json":
            decoder = json.JSONDecoder()
            ends = [*index.offsets[1:].tolist(), None]
            for i in range(start, len(index.offsets)):
                begin = int(index.offsets[i])
                stream.seek(begin)
                # What follows an element, a comma and blanks, is cut off with it.
                text = stream.read(-1 if ends[i] is None else ends[i] - begin).decode("utf-8", "surrogateescape")
                try:
                    text = text[: decoder.raw_decode(text)[1]]
                except ValueError:
                    raise unreadable_file(location, EOFError(f"element {i} is not there any more")) from None
                yield Entry(begin, int(index.lines[i]), text)
        elif start < len(index.offsets):
            stream.seek(int(index.offsets[start]))
            reader = EntryReader(stream, delimiter=_DELIMITERS.get(suffix), line=int(index.lines[start]))
            yield from reader.entries()


def parse_entry(entry: Entry, header: tuple[str, ...] | None) -> dict[str, Any]:
    """The fields of an entry. Raises RowProblem bad_metadata that names its line."""
    try:
        if isinstance(entry.content, RowProblem):
            raise entry.content
        if isinstance(entry.content, str):
            return parse_object(entry.content)
        if header is None or len(entry.content) != len(header):
            detail = f"{len(entry.content)} fields, expected {len(header or ())}"
            raise RowProblem(reason="bad_metadata", detail=detail)
        for text in entry.content:
            _check_utf8(text)
        return dict(zip(header, entry.content, strict=True))
    except RowProblem as problem:
        raise RowProblem(reason=problem.reason, detail=f"line {entry.line}: {problem.detail}") from None


def record_of(number: int, entry: Entry, header: tuple[str, ...] | None, columns: ColumnMap) -> Record:
    """An entry as a record, or why it is none."""
    try:
        return number, columns.row(parse_entry(entry, header))
    except RowProblem as problem:
        return number, problem


def parse_object(text: str) -> dict[str, Any]:
    """JSON text that holds one object. Raises RowProblem bad_metadata."""
    _check_utf8(text)
    try:
        value = json.loads(text, object_pairs_hook=_no_name_twice)
    except (ValueError, RecursionError) as error:
        raise RowProblem(reason="bad_metadata", detail=f"no JSON: {error}") from None
    if not isinstance(value, dict):
        raise RowProblem(reason="bad_metadata", detail=f"JSON that holds {type(value).__name__}, not an object")
    return value


def count_fields(names: Iterable[str], not_read: Counter[str]) -> None:
    """Count these fields as not read."""
    for name in names:
        key = f"field {brief(name)}"
        not_read[key if key in not_read or len(not_read) < _MANY else "field: others"] += 1


class EntryReader:
    """Entries of JSON lines, CSV or TSV from where the stream stands, and a digest of the bytes gone through."""

    def __init__(self, stream: ByteStream, *, delimiter: str | None, line: int = 1) -> None:
        self._stream = stream
        self._delimiter = delimiter
        self._position = stream.tell()
        self._line = line
        self._lines = self._text_lines()
        self.digest = _digest()

    def header(self) -> tuple[str, ...] | None:
        """The names in the first line that is not blank; None for JSON lines."""
        if self._delimiter is None:
            return None
        for entry in self.entries():
            if isinstance(entry.content, RowProblem):
                raise ValueError(f"line {entry.line}, the header: {entry.content.detail}")
            return tuple(name.strip() for name in entry.content)
        return ()

    def entries(self) -> Iterator[Entry]:
        """Every entry that is not blank."""
        if self._delimiter is None:
            for offset, line, text in self._lines:
                if text.strip():
                    yield Entry(offset, line, text)
        else:
            yield from self._csv_entries(self._delimiter)

    def _csv_entries(self, delimiter: str) -> Iterator[Entry]:
        pending: deque[tuple[int, int, str]] = deque()
        taken: list[tuple[int, int, str]] = []

        def lines() -> Iterator[str]:
            while True:
                line = pending.popleft() if pending else next(self._lines, None)
                if line is None:
                    return
                taken.append(line)
                yield line[2]

        source = lines()
        while True:
            taken.clear()
            try:
                fields = next(csv.reader(source, delimiter=delimiter, strict=True))
            except StopIteration:
                return
            except csv.Error as error:
                if not taken:
                    return
                # A quote that does not close runs into the lines below it. They are read again, without it.
                pending.extendleft(reversed(taken[1:]))
                if len(taken) > 1:
                    source = lines()
                yield Entry(taken[0][0], taken[0][1], RowProblem(reason="bad_metadata", detail=f"no CSV: {error}"))
                continue
            if fields:
                yield Entry(taken[0][0], taken[0][1], fields)

    def _text_lines(self) -> Iterator[tuple[int, int, str]]:
        """(offset, line number, text with its end) of every line; CR alone ends one too."""
        while piece := self._stream.readline():
            self.digest.update(piece)
            for line in piece.splitlines(keepends=True):
                offset, number = self._position, self._line
                self._position += len(line)
                self._line += 1
                if offset == 0:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                # Bytes that are not UTF-8 become surrogates, which are refused for the one row they are in.
                yield offset, number, line.decode("utf-8", "surrogateescape")


_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def _index(
    entries: Iterator[Entry], header: tuple[str, ...] | None, digest: Any, reading: Reading, state: FileState
) -> ListIndex:
    offsets, lines = [], []
    not_read: Counter[str] = Counter()

    def records() -> Iterator[Record]:
        for entry in entries:
            offsets.append(entry.offset)
            lines.append(entry.line)
            number, row = record_of(len(offsets) - 1, entry, header, reading.columns)
            if header is None and not isinstance(row, RowProblem):
                count_fields(without_part(row, ranking=is_ranking(row)), not_read)
            yield number, row

    found = RunIndex.of(runs(records()), reading.pairs_from)
    if header is not None:
        void = without_part(reading.columns.row(dict.fromkeys(header)), ranking=False)
        not_read.update({f"column {brief(name)}": len(offsets) for name in void})
    return ListIndex(
        offsets=np.array(offsets, dtype=np.int64),
        lines=np.array(lines, dtype=np.int64),
        runs=found,
        header=header,
        not_read=dict(not_read),
        fingerprint=digest.hexdigest(),
        state=state,
    )


def _index_array(location: str, data: bytes, reading: Reading, state: FileState) -> ListIndex:
    try:
        text = decode_text(data)
        elements = _elements(text, mark=len(data) - len(text.encode("utf-8")))
        return _index(elements, None, _digest(data), reading, state)
    except (TextProblem, json.JSONDecodeError) as problem:
        raise DataError(
            "This list of pairs is no JSON array.",
            where=location,
            expected='[{"win": ..., "lose": ..., "prompt": ...}, ...] in UTF-8',
            got=str(problem),
            fix="correct that place; or, with one object a line, name the file .jsonl",
        ) from None


def _elements(text: str, *, mark: int) -> Iterator[Entry]:
    """The elements of a JSON array, `mark` bytes after the beginning of the file. Raises JSONDecodeError."""
    decoder = json.JSONDecoder()

    def blank(at: int) -> int:
        return cast(re.Match[str], _BLANK.match(text, at)).end()

    at = blank(0)
    if text[at : at + 1] != "[":
        raise json.JSONDecodeError("Expecting '['", text, at)
    at, seen, offset, line = blank(at + 1), 0, mark, 1
    while text[at : at + 1] != "]":
        try:
            end = decoder.raw_decode(text, at)[1]
        except RecursionError:
            raise json.JSONDecodeError("Nested too deep", text, at) from None
        offset, line, seen = offset + len(text[seen:at].encode("utf-8")), line + text.count("\n", seen, at), at
        yield Entry(offset, line, text[at:end])
        at = blank(end)
        if text[at : at + 1] == ",":
            at = blank(at + 1)
            if text[at : at + 1] == "]":
                raise json.JSONDecodeError("Expecting value", text, at)
        elif text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    if blank(at + 1) != len(text):
        raise json.JSONDecodeError("Extra data", text, blank(at + 1))


_BLANK = re.compile(r"[ \t\r\n]*")


def _digest(data: bytes = b"") -> Any:
    return hashlib.blake2b(data, digest_size=16)


def _refuse_other_kinds(location: str, head: bytes) -> None:
    """Raise DataError for a file that is no text of UTF-8, or an array where lines are due."""
    problem = likely_kind(head) if head else None
    if problem is None or problem.what.startswith(("JSON", "UTF-16")):
        try:
            refuse_wide(head)
            problem = None
        except TextProblem as error:
            fix = "save the file as UTF-8; in PowerShell: ... | Out-File -Encoding utf8 pairs.jsonl"
            problem = Likely(str(error), fix)
    if problem is not None:
        raise DataError(
            "This list of pairs cannot be read.",
            where=location,
            expected="UTF-8 text",
            got=problem.what,
            fix=problem.fix,
        )
    if location.lower().endswith(".jsonl") and re.match(rb"(\xef\xbb\xbf)?\s*\[\s*(\{|$)", head):
        raise DataError(
            "This list of pairs is one JSON array, not JSON lines.",
            where=location,
            expected="one JSON object a line",
            got="an array, which begins with [",
            fix="name the file .json, or write its objects one a line without commas between them",
        )


def _check_header(location: str, header: tuple[str, ...], columns: ColumnMap) -> None:
    twice = [name for name, count in Counter(header).items() if count > 1]
    problem = columns_problem(columns, header)
    if not twice and problem is None:
        return
    raise DataError(
        "This list of pairs names a column twice." if twice else "This list of pairs lacks columns.",
        where=location,
        expected="a first line that names the columns win, lose, prompt and perhaps label, id, or other names and "
        "--columns win=...,lose=...",
        got=", ".join(map(brief, twice or header)) or "an empty file",
        fix="put those names into the first line, separated by "
        + ("tabs" if location.endswith(".tsv") else "commas")
        + ("" if twice or not header else f", or say --columns win=...,lose=...,prompt=... ({problem})"),
    )


def columns_problem(columns: ColumnMap, names: Sequence[str]) -> str | None:
    """Why no pair can be made of columns of these names, of which none is a list; None if some can."""
    absent = columns.absent(names)
    if absent:
        return missing_field(absent[:1], names)
    row = columns.row(dict.fromkeys(names))
    if holds_singles(row) or any(all(row.columns(role) for role in sides) for sides in SIDES):
        return None
    half = next(((one, other) for one, other in (*SIDES, SIDES[0]) if row.columns(one) or row.columns(other)), None)
    missing = [role for role in half or SIDES[0] if not row.columns(role)]
    return missing_field(columns.names(*missing[: 1 if half else 2]), names)


def _check_utf8(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        detail = f"byte 0x{byte:02x} is not UTF-8: Latin-1 or Windows-1252 perhaps"
        raise RowProblem(reason="bad_metadata", detail=detail) from None


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {brief(twice)} is there twice")
    return fields
