"""PNG files without the metadata that no pixel needs.

Interfaces store whole workflows in their pictures. Pillow refuses a compressed text or profile above 1 MiB, and that
limit belongs to the whole process, so the chunks are left out before it sees them.
"""

import struct
import zlib

from PIL import PngImagePlugin

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_METADATA_BYTES = 16 << 20
"""Limit on all texts of a file that the orientation may stand in; what inflates to more is left out."""

_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_ORIENTATION = (b"Raw profile type exif", b"XML:com.adobe.xmp")
"""Texts in which Pillow looks for the orientation."""


def without_metadata(data: bytes) -> bytes:
    """The same file without profile and texts; those that may hold the orientation stay, inflated where they are long.

    Bytes that are no PNG, and what follows damage, stay as they are.
    """
    if not data.startswith(SIGNATURE):
        return data
    kept: list[bytes] = [SIGNATURE]
    position = begin = len(SIGNATURE)
    room = MAX_METADATA_BYTES
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if kind == b"IEND" or end > len(data):
            break
        if kind == b"iCCP" or kind in _TEXT:
            stays, taken = _orientation_text(kind, data[position + 8 : end - 4], data[position:end], room)
            kept += [data[begin:position], stays]
            room -= taken
            begin = end
        position = end
    return data if begin == len(SIGNATURE) else b"".join([*kept, data[begin:]])


def _orientation_text(kind: bytes, content: bytes, chunk: bytes, room: int) -> tuple[bytes, int]:
    """The chunk as it may stay, or nothing, and the bytes of its text."""
    keyword, _, rest = content.partition(b"\0")
    if kind not in _TEXT or keyword not in _ORIENTATION:
        return b"", 0
    head = b""
    if kind == b"zTXt":
        packed = rest[1:]
    elif kind == b"iTXt" and rest[:2] == b"\1\0":
        language, _, rest = rest[2:].partition(b"\0")
        translated, _, packed = rest.partition(b"\0")
        head = b"\0\0" + language + b"\0" + translated + b"\0"
    else:
        return (chunk, len(content)) if len(content) <= room else (b"", 0)
    try:
        text = zlib.decompressobj().decompress(packed, room + 1)
    except zlib.error:
        return chunk, 0
    if len(text) > room:
        return b"", 0
    if len(text) < PngImagePlugin.MAX_TEXT_CHUNK:
        return chunk, len(text)
    content = keyword + b"\0" + head + text
    kind = b"tEXt" if kind == b"zTXt" else b"iTXt"
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return chunk, len(text)
