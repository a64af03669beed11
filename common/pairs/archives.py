"""Archives of images that lie beside a list, and in the folders on the way to an image.

An archive is a tar, a zip, or such a file cut into pieces (images.tar.aa, images.tar.ab, ..., images.zip.001). What it
holds is where unpacking would put it: beside the archive, or in a folder of the archive's name. A compressed tar is not
looked into: each image would cost all bytes before it.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import PurePosixPath
from typing import NamedTuple

from inpo.common.errors import DataError
from inpo.common.pairs.archive import Archive, Member
from inpo.common.pairs.columns import brief
from inpo.common.pairs.file_state import FileState
from inpo.common.pairs.files import filesystem, is_local, is_refusal, list_folder
from inpo.common.pairs.pair import RowProblem

_ARCHIVE = re.compile(
    r"(?P<name>.+\.(?:tar|zip))(?:(?:[._-](?:part[._-]?)?|part[._-]?)(?:(?P<digits>\d{1,6})|(?P<letters>[a-z]{2}|a(?!sc)[a-z]{2})))?",
    re.IGNORECASE,
)
"""A tar or zip, or a piece of one as `split` and others name them: .aa, .partaa, .part-01, .001, _0."""
_PACKED = re.compile(
    r"\.(?:(?:tar|zip)\.(?:gz|bz2|xz|zst|lz4|lzma)|tgz|tbz2?|txz|tzst|7z|rar)(?:[._-]?\w+)*$", re.IGNORECASE
)
"""What is not looked into, also in pieces."""
_ANY = re.compile(r"\.(?:tar|zip|tgz|tbz|txz|tzst|7z|rar)", re.IGNORECASE)


@dataclass(kw_only=True)
class Archives:
    """Those that lie beside a list and below, as they are now."""

    root: str
    """The list's folder."""
    allowed: Callable[[str], bool]
    """Whether a file may be read."""
    not_looked_into: str = ""
    """Words for such archives as were met."""
    _known: dict[str, tuple[Archive, ...]] = field(default_factory=dict)
    _failures: dict[Archive, DataError] = field(default_factory=dict)
    """Of archives that cannot be read: they are not gone through again for each name."""

    def find(self, inside: str) -> Member | None:
        """The member that stands for `root`/`inside`, of an archive in `root` or in a folder on the way; None if none
        has it. Raises RowProblem where two archives have it, DataError if none has it and one cannot be read.
        """
        *folders, _ = parts = inside.split("/")
        found: list[Member] = []
        failure: DataError | None = None
        for depth in range(len(parts) if ".." not in parts else 0):
            folder = "/".join([self.root, *folders[:depth]])
            if folder not in self._known:
                self._known[folder] = self._archives_in(folder)
            for archive in self._known[folder]:
                if archive not in self._failures:
                    try:
                        member = archive.find("/".join(parts[depth:]))
                        found += [member] if member is not None else []
                    except DataError as error:
                        self._failures[archive] = error
                failure = failure or self._failures.get(archive)
        if len(found) > 1:
            names = " and ".join(brief(member.archive.name) for member in found[:2])
            raise RowProblem(reason="missing_image", detail=f"{inside} is in {names}: keep one")
        if not found and failure is not None:
            raise failure
        return found[0] if found else None

    def _archives_in(self, folder: str) -> tuple[Archive, ...]:
        """The archives directly in a folder; none of one that is not there or may not be listed. Raises whatever a
        remote file system in trouble raises: nobody knows then what is there.
        """
        fs, path = filesystem(folder)
        try:
            is_there, changed = (
                (os.path.isdir(path), os.stat(path).st_mtime_ns) if is_local(fs) else (fs.isdir(path), None)
            )
            names = _names_in(folder, changed) if is_there else ()
            packed = [name for name in names if _PACKED.search(name)]
            pieces: dict[str, list[_Piece]] = {}
            for name in names:
                found = _ARCHIVE.fullmatch(name)
                if found and name not in packed:
                    piece = _Piece(found["digits"] or "", found["letters"] or "", f"{folder.rstrip('/')}/{name}")
                    pieces.setdefault(found["name"], []).append(piece)
            archives = [_archive(name, those) for name, those in pieces.items()]
        except Exception as error:  # every file system has exceptions of its own
            if is_local(fs) or is_refusal(error):
                return ()
            raise
        if packed:
            self.not_looked_into = (
                f"; compressed archives are not looked into ({brief(packed[0])}): unpack them beside "
            )
            self.not_looked_into += "the list, or make one .tar of them (docs/data.md, Archives)"
        far = [archive for archive in archives if archive.is_tar and not is_local(fs)]
        if far:  # its headers are strewn over all of it
            self.not_looked_into = f"; a tar at an address is not looked into ({brief(far[0].name)}): download it"
        return tuple(each for each in archives if each not in far and all(map(self.allowed, each.files)))


@lru_cache(maxsize=256)
def _names_in(folder: str, changed: int | None) -> tuple[str, ...]:
    """The files of a folder that may be archives or pieces of them; `changed` with its names."""
    fs, path = filesystem(folder)
    if is_local(fs):
        with os.scandir(path) as entries:
            names = sorted(entry.name for entry in entries if may_be_archive(entry.name) and entry.is_file())
    else:
        names = [PurePosixPath(file).name for file in list_folder(folder).files]
    return tuple(name for name in names if may_be_archive(name) and not name.startswith("."))


def may_be_archive(file: str) -> bool:
    """Whether a file's name is one of an archive or a piece of one, looked into or not."""
    return _ANY.search(PurePosixPath(file).name) is not None


class _Piece(NamedTuple):
    digits: str
    letters: str
    file: str

    @property
    def name(self) -> str:
        return PurePosixPath(self.file).name

    @property
    def number(self) -> int:
        """As `split` counts, in digits or in letters; -1: the whole."""
        if self.digits:
            return int(self.digits)
        number = -1 if not self.letters else 0
        for letter in self.letters.lower():
            number = 26 * number + ord(letter) - ord("a")
        return number


def _archive(name: str, pieces: list[_Piece]) -> Archive:
    # A file that was joined, with its pieces left beside it, is one archive.
    pieces = [each for each in pieces if each.number < 0] or sorted(pieces, key=lambda each: (each.number, each.file))
    states = tuple(FileState.now(each.file) for each in pieces)
    gap = None
    if pieces[0].number > (1 if pieces[0].digits else 0):
        gap = f"the pieces before {pieces[0].name} are not there"
    for before, after in pairwise(pieces):
        if after.number != before.number + 1:
            gap = gap or f"there is no piece between {before.name} and {after.name}, or there are two"
    return Archive(name=name, files=tuple(each.file for each in pieces), states=states, gap=gap)
