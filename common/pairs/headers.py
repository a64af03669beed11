"""The headers of a tar, one after the other, in bounded memory. Without webdataset, which brings torch: processes that
only decode images walk archives too.
"""

import tarfile
from collections.abc import Iterator
from typing import Any, cast

from inpo.common.pairs.files import ByteStream

PART = 1 << 20
"""Bytes that are read at once. No header is larger, whatever it announces."""
_BLOCK = 512


def tar_headers(stream: ByteStream) -> Iterator[tarfile.TarInfo]:
    """The header of every member of a tar, which is not compressed. Raises tarfile's errors, and ValueError at the end
    of a tar that ends early or is damaged.
    """
    end, count = 0, 0
    with tarfile.open(fileobj=cast(Any, _HeaderStream(stream)), mode="r:") as tar:
        while (info := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
            end, count = tar.offset, count + 1
            yield info
    # tarfile stops silently at a damaged header and at a clean cut; a whole tar ends with a block of zeros.
    stream.seek(end)
    block = stream.read(_BLOCK)
    if len(block) < _BLOCK or any(block):
        what = "ends early" if len(block) < _BLOCK else "has a damaged header"
        raise ValueError(f"the tar {what} at byte {end}, after {count} members")


class _HeaderStream:
    """What tarfile reads headers from: those of long names and pax are read whole, and may announce any size."""

    def __init__(self, stream: ByteStream) -> None:
        self.seek, self.tell, self._stream = stream.seek, stream.tell, stream

    def read(self, size: int) -> bytes:
        if size > PART:
            raise ValueError(f"a header of {size} bytes")
        return self._stream.read(size)


def has_bytes(info: tarfile.TarInfo) -> bool:
    """Whether a member's bytes lie behind its header, as a link's and a sparse file's do not."""
    return info.isreg() and not info.issparse()
