"""WebDataset tars of pairs: our own layout and the one of the public Pick-a-Pic v2 mirrors.

    ours     <key>.win.<ext>  <key>.lose.<ext>  <key>.json {"prompt": ..., "label": P(win preferred), "id": ...}
             and <key>.noise_win.npy  <key>.noise_lose.npy where the noise that they were made from is known
    mirror   <key>.jpg_0  <key>.jpg_1  <key>.label_0  <key>.label_1  <key>.caption   each with any further extension

A member's text and the fields of the JSON member mean the same as anywhere (fields.py); images are members. One input
shard for each tar, one row for each sample. The headers are walked once (`tar_index`), after which any range of rows is
read by seeking: rows before it are neither read nor kept. A remote tar is walked by reading it once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from inpo.common.pairs.columns import IMAGE_ROLES, NOISE_ROLES, SIDES, USUAL, ColumnMap, Reading
from inpo.common.pairs.entries import parse_object
from inpo.common.pairs.fields import items, prompts_of
from inpo.common.pairs.file_state import unchanged
from inpo.common.pairs.files import ByteStream, open_binary, read_as, unreadable_file
from inpo.common.pairs.pair import MAX_IMAGE_BYTES, Pair, RowProblem, Skipped, id_or, too_large
from inpo.common.pairs.tar_index import FILE_ROLES, SIDE_ROLES, TEXT_ROLES, TarIndex, index_tar
from inpo.common.pairs.values import as_number
from inpo.common.text import TextProblem, decode_text


@dataclass(frozen=True, kw_only=True)
class TarShard:
    """One tar; a row is a sample, that is, neighbouring members with one key."""

    name: str
    file: str
    reading: Reading = USUAL

    @cached_property
    def _index(self) -> TarIndex:
        return index_tar(self.file, self.reading.columns)

    @property
    def num_rows(self) -> int:
        """Samples in the tar, from its headers. Raises DataError when the tar is damaged or holds no pairs."""
        return len(self._index)

    @property
    def not_read(self) -> Mapping[str, int]:
        """Members without a role, links, and fields of JSON members that no pair is made of."""
        return self._index.not_read

    @property
    def has_lists(self) -> bool:
        """Whether a sample says of which list its pair is, as `inpo data pack` writes it."""
        return self._index.has_lists

    def group_sizes(self, start: int, stop: int) -> np.ndarray:
        """A sample is a pair."""
        return np.full(max(0, min(stop, self.num_rows) - start), 2)

    def fingerprint(self) -> str:
        """blake2b of every member's name, size and time and of the content of all members that are not images."""
        return read_as(self._index.fingerprint, self.reading)

    def rows(self, start: int, stop: int) -> Iterator[Pair | Skipped]:
        """Samples start..stop-1, read by seeking. Raises DataError when the tar ends early, or was written again."""
        return map(self._row, self._samples(start, stop))

    def prompts(self, start: int, stop: int) -> Iterator[str]:
        """From the members that are not images. Raises DataError as `rows` does."""
        for sample in self._samples(start, stop):
            try:
                fields = sample.fields()
            except RowProblem:  # gives no pair
                continue
            yield from prompts_of(self.reading.columns.row(fields))

    def head(self, count: int) -> list[dict[str, Any]]:
        """The fields of the first samples; of an image its bytes. Raises DataError."""
        found: list[dict[str, Any]] = []
        for sample in self._samples(0, min(count, self.num_rows)):
            images = {name for role in FILE_ROLES for name in self.reading.columns.names(role)}
            try:
                fields = sample.fields().items()
                found.append({n: sample.read(str(v)) if n in images and v is not None else v for n, v in fields})
            except RowProblem:
                continue
        return found

    def _samples(self, start: int, stop: int) -> Iterator["_Sample"]:
        index = self._index
        stop = min(stop, len(index))
        if start >= stop:
            return
        with unchanged(self.file, index.state), open_binary(self.file) as stream:
            for row in range(start, stop):
                yield _Sample(file=self.file, stream=stream, index=index, row=row, columns=self.reading.columns)

    def _row(self, sample: "_Sample") -> Pair | Skipped:
        # A key names a sample within its tar only: mirrors count from 0 in every tar.
        key = f"{self.name}/{sample.index.key(sample.row)}"
        try:
            fields = sample.fields()
        except RowProblem as problem:
            pair_id = id_or(key, f"{self.name}/{sample.row}")
            return Skipped(pair_id=pair_id, reason=problem.reason, detail=problem.detail, row=sample.row)
        row = self.reading.columns.row(fields)
        told: dict[str, Any] = {"name": self.name, "default_id": key, "with_noise": self.reading.with_noise}
        return next(items(row, number=sample.row, read=lambda role, _: sample.read(role), **told))


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """The members of one row; bytes are read when asked for."""

    file: str
    stream: ByteStream
    index: TarIndex
    row: int
    columns: ColumnMap

    def fields(self) -> dict[str, Any]:
        """What the sample says. The value of an image is its role; a text member and a field of the JSON must agree."""
        doubled, linked = self.index.doubled_roles(self.row), self.index.linked_roles(self.row)
        if doubled:
            raise RowProblem(reason="bad_metadata", detail=f"more than one member for {', '.join(doubled)}")
        if linked:
            detail = (
                f"{', '.join(linked)} is a link or sparse, without bytes here; tar --dereference --hard-dereference"
            )
            raise RowProblem(reason="missing_image", detail=detail)
        images = self.columns.names(*IMAGE_ROLES, *NOISE_ROLES)
        fields = {name: value for name, value in self.json().items() if name not in images}
        for role in TEXT_ROLES:
            text = self.text(role)
            if text is None:
                continue
            name = self.columns.names(role)[0]
            other = fields.get(name)
            if other not in (None, text) and (as_number(text) is None or as_number(text) != as_number(other)):
                raise RowProblem(reason="bad_metadata", detail=f"the {name} member and the JSON's {name} differ")
            fields[name] = text
        sides = [role for role in SIDE_ROLES if self.index.member(self.row, role) is not None]
        if not sides:
            raise RowProblem(reason="missing_image", detail="no image member")
        for layout in SIDES:
            if set(layout) & set(sides):
                fields |= {self.columns.names(role)[0]: role if role in sides else None for role in layout}
        noise = [role for role in FILE_ROLES if role not in SIDE_ROLES and self.index.member(self.row, role)]
        return fields | {self.columns.names(role)[0]: role for role in noise}

    def read(self, role: str) -> bytes | None:
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

    def text(self, role: str) -> str | None:
        """A text member; the line end at its end belongs to the file, not to the text."""
        data = self.read(role)
        if data is None:
            return None
        try:
            return decode_text(data).rstrip("\r\n")
        except TextProblem as problem:
            raise RowProblem(reason="bad_metadata", detail=f"member {role}: {problem}") from None

    def json(self) -> dict[str, Any]:
        text = self.text("json")
        if text is None:
            return {}
        try:
            return parse_object(text)
        except RowProblem as problem:
            raise RowProblem(reason=problem.reason, detail=f"member json: {problem.detail}") from None
