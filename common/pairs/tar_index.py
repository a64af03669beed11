"""Where the members of every sample of a tar lie, found by walking its headers once.

A sample is what it is to any webdataset reader: neighbouring members with one key, which webdataset's own
`base_plus_ext` finds. A member that comes twice spoils its sample and no other.
"""

import hashlib
import re
import tarfile
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from webdataset.tariterators import base_plus_ext

from inpo.common.errors import DataError
from inpo.common.pairs.columns import IMAGE_ROLES, NOISE_ROLES, ColumnMap, brief
from inpo.common.pairs.entries import count_fields, parse_object
from inpo.common.pairs.fields import without_part
from inpo.common.pairs.file_state import FileState, file_state
from inpo.common.pairs.files import ByteStream, open_binary, unreadable_file
from inpo.common.pairs.headers import PART, has_bytes, tar_headers
from inpo.common.pairs.pair import RowProblem
from inpo.common.pairs.values import is_null
from inpo.common.text import TextProblem, decode_text

SIDE_ROLES = ("win", "lose", "image1", "image2")
TEXT_ROLES = (
    "prompt",
    "label",
    "label1",
    "label2",
    "votes",
    "votes1",
    "votes2",
    "has_label",
    "score1",
    "score2",
    "id",
    "list",
)
FILE_ROLES = (*SIDE_ROLES, *NOISE_ROLES[1:])
ROLES = (*FILE_ROLES, "json", *TEXT_ROLES)
"""What a member may be: one of the sides or its noise, a text, or a JSON object with fields."""
_ALSO_PROMPT = ("original_prompt", "txt", "text")
"""What mirrors call the prompt, and what nobody would call a column so."""

_ABSENT, _DOUBLED, _LINK = -1, -2, -3
_TYPES = {
    tarfile.LNKTYPE: "hard link",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.GNUTYPE_SPARSE: "sparse file",
    tarfile.FIFOTYPE: "pipe",
}


@dataclass(frozen=True, kw_only=True)
class TarIndex:
    """Places of the members, by row and role. 336 bytes a row and its key; picklable."""

    keys: bytes
    """The samples' keys, one a line; a line break in a key is stored as NUL, which no id may have either."""
    places: np.ndarray
    """int64 [row, role, 2]: offset and size of a member; -1 where absent, -2 where there are two, -3 where it is a link
    or the like, without bytes of its own.
    """
    not_read: dict[str, int]
    """Members that are part of no sample or have no role in it, by suffix or type, and fields of JSON members."""
    has_lists: bool
    """Whether a member says of which list a pair is."""
    fingerprint: str
    state: FileState
    """Of the file, before it was walked."""

    def __len__(self) -> int:
        return int(self.places.shape[0])

    def key(self, row: int) -> str:
        return self._key_list()[row]

    def member(self, row: int, role: str) -> tuple[int, int] | None:
        offset, size = self.places[row, ROLES.index(role)]
        return None if offset < 0 else (int(offset), int(size))

    def doubled_roles(self, row: int) -> list[str]:
        return [role for i, role in enumerate(ROLES) if self.places[row, i, 0] == _DOUBLED]

    def linked_roles(self, row: int) -> list[str]:
        return [role for i, role in enumerate(ROLES) if self.places[row, i, 0] == _LINK]

    def _key_list(self) -> list[str]:
        cached = self.__dict__.get("_keys")
        if cached is None:
            cached = self.keys.decode("utf-8", "surrogateescape").split("\n")
            object.__setattr__(self, "_keys", cached)
        return cached

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_keys"}


def role_of(suffix: str, columns: ColumnMap) -> str | None:
    """The part a member plays, from what follows its key: `win.png` is win, `label_0.txt` is label1."""
    name = suffix.split(".", 1)[0]
    if name == "json":
        return name
    if name in _ALSO_PROMPT and "prompt" not in dict(columns.chosen):
        return "prompt"
    role = columns.role_of(name)
    return role if role in ROLES else None


class _Member(NamedTuple):
    key: str
    suffix: str
    name: str
    place: tuple[int, int]
    fields: frozenset[str]
    """Names in a JSON member."""
    of_list: bool
    """Whether it says of which list the pair is."""


def index_tar(location: str, columns: ColumnMap) -> TarIndex:
    """Walk the headers of a tar. Raises DataError when it is compressed, damaged, cut, or holds no pairs."""
    not_read: Counter[str] = Counter()
    state = file_state(location)
    with open_binary(location) as stream:
        try:
            members, digest = _walk(stream, not_read, columns)
        except Exception as error:  # tarfile's errors, and whatever a remote file raises
            raise unreadable_file(location, error) from error
    rows: dict[str, list[set[str]]] = {}
    keys: list[str] = []
    tables: list[np.ndarray] = []
    for key, sample in groupby(members, key=lambda member: member.key):
        table = np.full((len(ROLES), 2), _ABSENT, dtype=np.int64)
        fields: frozenset[str] = frozenset()
        for member in sample:
            role, fields = role_of(member.suffix, columns), fields | member.fields
            if role is None:
                not_read[f"member .{brief(member.suffix)}"] += 1
                continue
            i = ROLES.index(role)
            table[i] = (_DOUBLED, _DOUBLED) if table[i, 0] != _ABSENT else member.place
        present = {role for role, (offset, _) in zip(ROLES, table, strict=True) if offset != _ABSENT}
        if not present:
            continue  # a README or a checksum list beside the samples
        _count_void(fields, present, not_read, columns)
        key = key.removeprefix("./")
        earlier = rows.setdefault(key, [])
        if any(present.isdisjoint(other) for other in earlier):
            raise DataError(
                "The members of a sample do not lie together in this tar.",
                where=f"{location}, sample {key}",
                expected="webdataset order: all members of one key after one another",
                fix="write the tar again with `tar --sort=name`, or with `inpo data pack`",
            )
        earlier.append(present)
        keys.append(key.replace("\n", "\0"))
        tables.append(table)
    if (members or not_read) and not tables:
        raise DataError(
            "This tar holds no preference pairs.",
            where=location,
            expected="<key>.win.<ext> <key>.lose.<ext> <key>.json, or <key>.jpg_0 <key>.jpg_1 <key>.label_0 ...",
            got=", ".join(brief(member.name) for member in members[:5]) or ", ".join(not_read),
            fix="see docs/data.md for the two layouts; --columns win=...,lose=... names members of other names",
        )
    places = np.stack(tables) if tables else np.empty((0, len(ROLES), 2), dtype=np.int64)
    packed = "\n".join(keys).encode("utf-8", "surrogateescape")
    return TarIndex(
        keys=packed,
        places=places,
        not_read=dict(not_read),
        has_lists=any(member.of_list for member in members),
        fingerprint=digest,
        state=state,
    )


def _walk(stream: ByteStream, not_read: Counter[str], columns: ColumnMap) -> tuple[list[_Member], str]:
    """All members with a name that counts, and the fingerprint. What has no bytes or no name is counted."""
    digest = hashlib.blake2b(digest_size=16)
    members: list[_Member] = []
    for info in tar_headers(stream):
        if info.isdir():
            continue
        if _is_hidden(info.name):
            not_read["hidden member"] += 1
            continue
        digest.update(f"{info.name}\0{info.size}\0{info.mtime}\0".encode("utf-8", "surrogateescape"))
        key, suffix = base_plus_ext(info.name)
        if key is None:
            not_read["member without a suffix"] += 1
            continue
        suffix = suffix if columns.chosen else suffix.lower()
        role = role_of(suffix, columns)
        place, fields, of_list = (info.offset_data, info.size), frozenset[str](), False
        if not has_bytes(info):
            not_read[f"member that is a {_TYPES.get(info.type, 'device')}"] += 1
            if role is None:
                continue
            place = (_LINK, _LINK)
        elif role is not None and role not in FILE_ROLES:
            # A changed label or prompt may keep its size and time.
            stream.seek(info.offset_data)
            left, head = info.size, b""
            while left and (part := stream.read(min(left, PART))):  # a header may announce any size
                digest.update(part)
                head, left = head or part, left - len(part)
            if role == "json" and info.size <= PART:
                told = _told(head)
                fields, of_list = frozenset(told), not is_null(columns.row(told).get("list"))
            of_list = of_list or (role == "list" and bool(head.strip()))
        members.append(_Member(key, suffix, info.name, place, fields, of_list))
    return members, digest.hexdigest()


def _told(data: bytes) -> dict[str, Any]:
    try:
        return parse_object(decode_text(data))
    except (TextProblem, RowProblem):
        return {}  # the row says it when it is read


def _count_void(fields: frozenset[str], present: set[str], not_read: Counter[str], columns: ColumnMap) -> None:
    """Count what has no part in a sample's pair: fields of its JSON, and a label where it cannot say which image."""
    members = {columns.names(role)[0] for role in present - {"json"}}
    void = set(without_part(columns.row(dict.fromkeys({*fields, *members})), ranking=False))
    files = set(columns.names(*IMAGE_ROLES, *NOISE_ROLES))  # which are members of their own
    count_fields(fields & (void | files), not_read)
    if void & members:
        not_read["member .label"] += 1


def _is_hidden(name: str) -> bool:
    # webdataset's own meta files, and what file managers leave behind
    return re.match(r"__[^/]*__($|/)", name) is not None or name.rsplit("/", 1)[-1].startswith(".")
