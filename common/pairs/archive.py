"""One archive of images, a tar or a zip, or such a file cut into pieces, which are read as one.

    Archive --find--> Member --read_member--> bytes

Its members are found once, as 37 bytes each; then one is read by seeking. Nothing is written, and names that lead
elsewhere, links and devices are no members.
"""

import hashlib
import io
import stat
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, NamedTuple, cast

import numpy as np

from inpo.common.pairs.columns import brief
from inpo.common.pairs.file_state import FileState, refuse_changed
from inpo.common.pairs.files import ByteStream, open_binary, unreadable_file
from inpo.common.pairs.headers import has_bytes, tar_headers
from inpo.common.pairs.pair import MAX_IMAGE_BYTES, RowProblem, too_large

MAX_MEMBERS = 20_000_000
"""Limit on an archive's members, whose index is kept in memory."""

_PLACE = np.dtype([("offset", "<i8"), ("packed", "<i8"), ("size", "<i8"), ("crc", "<u4"), ("how", "u1")])
_MEMBER = np.dtype([("key", "<u8"), ("place", _PLACE)])
_STORED, _DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
_IN_TAR, _LINK, _LOCKED, _OTHER, _TWICE = 200, 201, 202, 203, 204
_NO_BYTES = {
    _LINK: "is a link or the like, without bytes there: write the archive anew with what it points to",
    _LOCKED: "is encrypted: unpack it",
    _OTHER: "is compressed in a way that is not read: unpack it",
    _TWICE: "is there twice: keep one",
}
_LOCAL_HEADER = 30
_TAR_BLOCK = 512


class Member(NamedTuple):
    """Where the bytes of a member are."""

    archive: "Archive"
    offset: int
    packed: int
    size: int
    crc: int
    how: int


@dataclass(frozen=True, kw_only=True)
class Archive:
    """One archive, of one file or of pieces."""

    name: str
    """Without the ending of its pieces: images.tar."""
    files: tuple[str, ...]
    states: tuple[FileState, ...]
    """Of each file, what was found in another state is not looked for in this one."""
    gap: str | None
    """Which piece is missing."""

    @property
    def folders(self) -> tuple[str, ...]:
        """What a member's name may be led by: nothing, or a folder that is called after the archive."""
        return "", f"{PurePosixPath(self.name).stem}/", f"{self.name}/"

    @property
    def is_tar(self) -> bool:
        return self.name.lower().endswith(".tar")

    def find(self, name: str) -> Member | None:
        """The member of a name, as a list beside the archive says it. Raises DataError when the archive cannot be
        read.
        """
        keys, places = _members(self)
        for folder in self.folders:
            if not name.startswith(folder):
                continue
            key = _key(name.removeprefix(folder))
            at = int(np.searchsorted(keys, np.uint64(key)))
            if at < len(keys) and keys[at] == key:
                offset, packed, size, crc, how = places[at].tolist()
                is_twice = at + 1 < len(keys) and keys[at + 1] == key
                return Member(self, offset, packed, size, crc, _TWICE if is_twice else how)
        return None

    def open(self) -> "_Joined":
        return _Joined(self.files, [state.size for state in self.states])


def read_member(member: Member, what: str) -> bytes:
    """The bytes of a member. Raises RowProblem when it has none, or more than an image may have, DataError when its tar
    was written again, and whatever its file system raises.
    """
    where = f"{what} in {brief(member.archive.name)}"
    if member.how in _NO_BYTES:
        raise RowProblem(reason="missing_image", detail=f"{where} {_NO_BYTES[member.how]}")
    if max(member.size, member.packed) > MAX_IMAGE_BYTES:
        raise too_large(where, max(member.size, member.packed))
    with member.archive.open() as stream:
        begin = member.offset
        if member.how != _IN_TAR:
            stream.seek(begin)
            header = stream.read(_LOCAL_HEADER)
            begin += _LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        stream.seek(begin)
        data = stream.read(member.packed)
    if member.how == _IN_TAR:  # a zip has checksums
        for file, state in zip(member.archive.files, member.archive.states, strict=True):
            refuse_changed(file, state)
    is_whole = len(data) == member.packed
    if member.how == _DEFLATED:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.size + 1)
        except zlib.error:
            is_whole = False
    if not is_whole or len(data) != member.size or (member.how != _IN_TAR and zlib.crc32(data) != member.crc):
        raise RowProblem(reason="missing_image", detail=f"{where} is damaged: get the archive again")
    return data


@lru_cache(maxsize=10_000)  # all of a folder are asked for each name
def _members(archive: Archive) -> tuple[np.ndarray, np.ndarray]:
    """[member] of an archive, sorted by key: the keys, and the places. Raises DataError."""
    where = archive.files[0]
    try:
        if archive.gap is not None:
            raise ValueError(archive.gap)
        with archive.open() as stream:
            walk = _walk_tar if archive.is_tar else _walk_zip
            members = np.fromiter(_limited(walk(stream)), dtype=_MEMBER)
    except Exception as error:  # tarfile's and zipfile's errors, and whatever a remote file raises
        raise unreadable_file(where, error, what="archive of images") from error
    order = np.argsort(members["key"], kind="stable")
    # Each lies together: of a field of records numpy makes a copy, all of it, for every search.
    return members["key"][order], members["place"][order]


def _limited(members: Iterator[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    for number, member in enumerate(members):
        if number == MAX_MEMBERS:
            raise ValueError(f"more than {MAX_MEMBERS:,} members")
        yield member


def _walk_tar(stream: "_Joined") -> Iterator[tuple[Any, ...]]:
    for info in tar_headers(io.BufferedReader(stream, _TAR_BLOCK)):
        name = _safe(info.name)
        if not info.isdir() and name is not None:
            how = _IN_TAR if has_bytes(info) else _LINK
            yield _key(name), (info.offset_data, info.size, info.size, 0, how)


def _walk_zip(stream: "_Joined") -> Iterator[tuple[Any, ...]]:
    with zipfile.ZipFile(cast(Any, stream)) as archive:
        for info in archive.infolist():
            name = _safe(info.filename)
            if info.is_dir() or name is None:
                continue
            how = info.compress_type if info.compress_type in (_STORED, _DEFLATED) else _OTHER
            how = _LOCKED if info.flag_bits & 1 else how
            how = _LINK if stat.S_ISLNK(info.external_attr >> 16) else how
            yield _key(name), (info.header_offset, info.compress_size, info.file_size, info.CRC, how)


def _safe(name: str) -> str | None:
    """A member's name as a path below the archive's folder; None if it leads elsewhere."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return None if name.startswith("/") or ".." in parts or not parts else "/".join(parts)


def _key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class _Joined(io.RawIOBase):
    """Files one after another as one; each is opened when it is read from."""

    def __init__(self, files: Sequence[str], sizes: Sequence[int]) -> None:
        self._files = files
        self._begins = np.concatenate([[0], np.cumsum(sizes)])
        self._at = 0
        self._open: tuple[int, ByteStream] | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._at = max(0, offset + (0, self._at, int(self._begins[-1]))[whence])
        return self._at

    def read(self, size: int = -1, /) -> bytes:
        end = int(self._begins[-1])
        stop = end if size is None or size < 0 else min(end, self._at + size)
        parts = []
        while self._at < stop:
            number = int(np.searchsorted(self._begins, self._at, "right")) - 1
            if self._open is None or self._open[0] != number:
                self._close()
                self._open = (number, open_binary(self._files[number], sequential=False))
            stream = self._open[1]
            stream.seek(self._at - int(self._begins[number]))
            part = stream.read(min(stop, int(self._begins[number + 1])) - self._at)
            if not part:
                break
            parts.append(part)
            self._at += len(part)
        return b"".join(parts)

    def readinto(self, buffer: Any, /) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def close(self) -> None:
        self._close()
        super().close()
