"""A list of pairs, pairs.jsonl or pairs.csv, whose images are files beside it or URLs.

    {"win": "img/1a.png", "lose": "img/1b.png", "prompt": "a red cube", "label": 0.8, "id": "cube-1"}

`win` and `lose` are paths relative to the list and below its folder; with `allow_remote` also any other path or a URL
that fsspec knows (reach.py). `label` (P(win preferred),
1.0 when the field is absent) and `id` are optional. One input shard: the list. Its lines are found once, then any range
of rows is read by seeking; images are read only for rows that are asked for.
"""

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np

from inpo.common.errors import DataError
from inpo.common.pairs.files import ByteStream, open_binary, shard_names, unreadable_file
from inpo.common.pairs.pair import (
    Pair,
    RowProblem,
    Skipped,
    check_id,
    check_image_bytes,
    check_text,
    parse_label,
    preference,
)
from inpo.common.pairs.reach import Reach


@dataclass(frozen=True, kw_only=True)
class ListSource:
    """One list of pairs."""

    location: str
    file: str
    allow_remote: bool = False
    kind: Literal["folder"] = "folder"

    def input_shards(self) -> list["ListShard"]:
        """The list as one shard."""
        return [ListShard(name=shard_names([self.file])[0], file=self.file, allow_remote=self.allow_remote)]


@dataclass(frozen=True, kw_only=True)
class _Lines:
    offsets: np.ndarray
    """int64 [row]: the byte at which each row begins."""
    header: tuple[str, ...] | None
    """Column names of a CSV file."""
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class ListShard:
    """The rows of a list; blank lines are no rows."""

    name: str
    file: str
    allow_remote: bool = False
    """Whether rows may name what lies outside the list's folder, here or on other hosts."""

    @cached_property
    def _lines(self) -> _Lines:
        with open_binary(self.file) as stream:
            reader = _Reader(stream, is_csv=_is_csv(self.file))
            try:
                header = reader.header()
                offsets = [offset for offset, _ in reader.records()]
            except (OSError, csv.Error) as error:
                raise unreadable_file(self.file, error) from error
        if header is not None and not {"win", "lose"} <= set(header):
            raise DataError(
                "this list of pairs lacks columns",
                where=self.file,
                expected="a first line that names the columns win, lose, prompt and perhaps label, id",
                got=", ".join(header) or "an empty file",
                fix="put the names into the first line, separated by commas",
            )
        return _Lines(offsets=np.array(offsets, dtype=np.int64), header=header, fingerprint=reader.digest.hexdigest())

    @property
    def num_rows(self) -> int:
        """Rows of the list. Raises DataError when it cannot be read."""
        return len(self._lines.offsets)

    def fingerprint(self) -> str:
        """blake2b of the list's bytes. The images are not part of it: give a replaced image a new name or the pair a
        new id.
        """
        return self._lines.fingerprint

    def rows(self, start: int, stop: int) -> Iterator[Pair | Skipped]:
        """Rows start..stop-1 with their images.

        Raises DataError when the list fails, and when hosts failed and no image at all was read: an outage. A row whose
        image alone cannot be fetched is Skipped.
        """
        lines = self._lines
        stop = min(stop, len(lines.offsets))
        if start >= stop:
            return
        reach = Reach(self.file, allow_remote=self.allow_remote)
        with open_binary(self.file) as stream:
            stream.seek(int(lines.offsets[start]))
            reader = _Reader(stream, is_csv=lines.header is not None)
            row = start
            for _, record in reader.records():
                yield self._row(record, lines.header, row, reach)
                row += 1
                if row == stop:
                    reach.refuse_outage(self.file)
                    return
        raise unreadable_file(self.file, EOFError(f"row {row} of {stop} is not there any more"))

    def _row(self, record: str | list[str], header: tuple[str, ...] | None, row: int, reach: Reach) -> Pair | Skipped:
        pair_id = f"{self.name}/{row}"
        try:
            fields = _fields(record, header)
            paths = {side: check_text(fields.get(side), what=side, missing="missing_image") for side in ("win", "lose")}
            prompt = fields.get("prompt")
            pair_id = _pair_id(fields, paths, prompt)
            prompt = check_text(prompt, what="prompt", missing="missing_prompt")
            swap, label = preference(parse_label(fields["label"]) if "label" in fields else 1.0)
            images = [check_image_bytes(reach.read(paths[side], side), what=side) for side in ("win", "lose")]
        except RowProblem as problem:
            return Skipped(pair_id=pair_id, reason=problem.reason, detail=problem.detail, row=row)
        win, lose = reversed(images) if swap else images
        return Pair(pair_id=pair_id, prompt=prompt, win=win, lose=lose, label=label, row=row)


class _Reader:
    """Records of a list with the byte at which each begins, and a digest of the bytes gone through."""

    def __init__(self, stream: ByteStream, *, is_csv: bool) -> None:
        self._stream = stream
        self._is_csv = is_csv
        self._position = stream.tell()
        self.digest = hashlib.blake2b(digest_size=16)

    def header(self) -> tuple[str, ...] | None:
        if not self._is_csv:
            return None
        first = next(csv.reader(self._text_lines()), [])
        return tuple(name.strip() for name in first)

    def records(self) -> Iterator[tuple[int, str | list[str]]]:
        """(offset, JSON text) or (offset, CSV fields) of every row that is not blank."""
        if self._is_csv:
            rows = csv.reader(self._text_lines(), strict=True)
            begin = self._position
            for fields in rows:
                if fields:
                    yield begin, fields
                begin = self._position
        else:
            begin = self._position
            for line in self._text_lines():
                if line.strip():
                    yield begin, line
                begin = self._position

    def _text_lines(self) -> Iterator[str]:
        while line := self._stream.readline():
            at_start = self._position == 0
            self._position += len(line)
            self.digest.update(line)
            if at_start:
                line = line.removeprefix(b"\xef\xbb\xbf")
            # Bytes that are not UTF-8 become surrogates, which check_text refuses for the one row they are in.
            yield line.decode("utf-8", "surrogateescape")


def _is_csv(file: str) -> bool:
    return PurePosixPath(file).suffix.lower() == ".csv"


def _fields(record: str | list[str], header: tuple[str, ...] | None) -> dict[str, Any]:
    if isinstance(record, str):
        try:
            value = json.loads(record)
        except ValueError as error:
            raise RowProblem(reason="bad_metadata", detail=str(error)) from None
        if not isinstance(value, dict):
            raise RowProblem(reason="bad_metadata", detail=f"{type(value).__name__}, not an object")
        return value
    if header is None or len(record) != len(header):
        raise RowProblem(reason="bad_metadata", detail=f"{len(record)} fields, expected {len(header or ())}")
    return dict(zip(header, record, strict=True))


def _pair_id(fields: dict[str, Any], paths: dict[str, str], prompt: object) -> str:
    """The id given, else a digest of what the row says: inserting or sorting rows changes no id."""
    given = fields.get("id")
    if isinstance(given, int) and not isinstance(given, bool):
        given = str(given)
    if given is not None and given != "":
        return check_id(given)
    content = json.dumps([paths["win"], paths["lose"], prompt], ensure_ascii=True)
    return hashlib.blake2b(content.encode("ascii"), digest_size=8).hexdigest()
