"""Where the members of every sample of a tar lie, found by walking its headers once.

Grouping into samples is webdataset's own (`base_plus_ext`, `group_by_keys`), fed with places instead of bytes, so a tar
means here what it means to any webdataset reader.
"""

import hashlib
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
from webdataset.tariterators import base_plus_ext, group_by_keys

from inpo.common.errors import DataError
from inpo.common.pairs.files import ByteStream, open_binary, unreadable_file

Role = Literal["win", "lose", "jpg_0", "jpg_1", "json", "caption", "label_0", "label_1", "has_label", "id"]
ROLES: tuple[Role, ...] = get_args(Role)
IMAGE_ROLES = ("win", "lose", "jpg_0", "jpg_1")
CAPTION_NAMES = ("caption", "prompt", "original_prompt", "txt", "text")
ID_NAMES = ("id", "ranking_id", "pair_id")

_ABSENT, _DOUBLED = -1, -2
_BLOCK = 512


@dataclass(frozen=True, kw_only=True)
class TarIndex:
    """Places of the members, by row and role. 160 bytes a row and its key; picklable."""

    keys: bytes
    """The samples' keys, one a line; a line break in a key is stored as NUL, which no id may have either."""
    places: np.ndarray
    """int64 [row, role, 2]: offset and size of a member; -1 where absent, -2 where there are two."""
    fingerprint: str

    def __len__(self) -> int:
        return int(self.places.shape[0])

    def key(self, row: int) -> str:
        return self._key_list()[row]

    def member(self, row: int, role: Role) -> tuple[int, int] | None:
        offset, size = self.places[row, ROLES.index(role)]
        return None if offset < 0 else (int(offset), int(size))

    def doubled_roles(self, row: int) -> list[Role]:
        return [role for i, role in enumerate(ROLES) if self.places[row, i, 0] == _DOUBLED]

    def _key_list(self) -> list[str]:
        cached = self.__dict__.get("_keys")
        if cached is None:
            cached = self.keys.decode("utf-8", "surrogateescape").split("\n")
            object.__setattr__(self, "_keys", cached)
        return cached

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_keys"}


def role_of(suffix: str) -> Role | None:
    """The part a member plays, from what follows its key: `win.png` is win, `label_0.txt` is label_0."""
    first = suffix.split(".", 1)[0]
    if first in CAPTION_NAMES:
        return "caption"
    if first in ID_NAMES:
        return "id"
    return next((role for role in ROLES if first == role), None)


def index_tar(location: str) -> TarIndex:
    """Walk the headers of a tar. Raises DataError when it is compressed, damaged, cut, or holds no pairs."""
    with open_binary(location) as stream:
        try:
            members, digest = _walk(stream)
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            raise unreadable_file(location, error) from error
    try:
        samples = list(group_by_keys(iter(members), keys=_split))
    except ValueError as error:  # two members of one name beside each other
        raise unreadable_file(location, error) from error
    rows: dict[str, list[set[Role]]] = {}
    keys: list[str] = []
    tables: list[np.ndarray] = []
    for sample in samples:
        table = np.full((len(ROLES), 2), _ABSENT, dtype=np.int64)
        for suffix, place in sample.items():
            role = None if suffix.startswith("__") else role_of(suffix)
            if role is not None:
                i = ROLES.index(role)
                table[i] = (_DOUBLED, _DOUBLED) if table[i, 0] != _ABSENT else place
        present = {role for role, (offset, _) in zip(ROLES, table, strict=True) if offset != _ABSENT}
        if not present:
            continue  # a README or a checksum list beside the samples
        key = sample["__key__"].removeprefix("./")
        earlier = rows.setdefault(key, [])
        if any(present.isdisjoint(other) for other in earlier):
            raise DataError(
                "the members of a sample do not lie together in this tar",
                where=f"{location}, sample {key}",
                expected="webdataset order: all members of one key after one another",
                fix="write the tar again with `tar --sort=name`, or with `inpo data pack`",
            )
        earlier.append(present)
        keys.append(key.replace("\n", "\0"))
        tables.append(table)
    if members and not tables:
        raise DataError(
            "this tar holds no preference pairs",
            where=location,
            expected="<key>.win.<ext> <key>.lose.<ext> <key>.json, or <key>.jpg_0 <key>.jpg_1 <key>.label_0 ...",
            got=", ".join(member["fname"] for member in members[:5]),
            fix="see docs/data.md for the two layouts",
        )
    places = np.stack(tables) if tables else np.empty((0, len(ROLES), 2), dtype=np.int64)
    return TarIndex(keys="\n".join(keys).encode("utf-8", "surrogateescape"), places=places, fingerprint=digest)


def _split(name: str) -> tuple[str | None, str | None]:
    base, extension = base_plus_ext(name)
    return base, extension


def _walk(stream: ByteStream) -> tuple[list[dict[str, Any]], str]:
    """All regular members as webdataset file samples whose data is (offset, size), and the fingerprint."""
    digest = hashlib.blake2b(digest_size=16)
    members: list[dict[str, Any]] = []
    end = 0
    with tarfile.open(fileobj=cast(Any, stream), mode="r:") as tar:
        for info in _members(tar):
            size = info.size if info.isreg() else 0
            end = info.offset_data + -(-size // _BLOCK) * _BLOCK
            if not info.isreg() or _is_hidden(info.name):
                continue
            digest.update(f"{info.name}\0{info.size}\0{info.mtime}\0".encode("utf-8", "surrogateescape"))
            _, suffix = base_plus_ext(info.name)
            role = role_of(suffix.lower()) if suffix else None
            if role is not None and role not in IMAGE_ROLES:
                # A changed label or prompt may keep its size and time.
                stream.seek(info.offset_data)
                left = info.size
                while left and (part := stream.read(min(left, 1 << 20))):  # a header may announce any size
                    digest.update(part)
                    left -= len(part)
            members.append({"fname": info.name, "data": (info.offset_data, info.size), "__url__": ""})
    # tarfile stops silently at a damaged header and at a clean cut; a whole tar ends with a block of zeros.
    stream.seek(end)
    block = stream.read(_BLOCK)
    if len(block) < _BLOCK or any(block):
        what = "ends early" if len(block) < _BLOCK else "has a damaged header"
        raise ValueError(f"the tar {what} at byte {end}, after {len(members)} members")
    return members, digest.hexdigest()


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (info := tar.next()) is not None:
        tar.members = []  # tarfile keeps every header otherwise
        yield info


def _is_hidden(name: str) -> bool:
    # webdataset's own meta files, and what file managers leave behind
    return re.match(r"__[^/]*__($|/)", name) is not None or name.rsplit("/", 1)[-1].startswith(".")
