"""What bytes that cannot be read most likely are, by how they begin. Asked only after the reading failed."""

import re
from typing import NamedTuple


class Likely(NamedTuple):
    """A recognised beginning: what it is, and what to do about it."""

    what: str
    fix: str


_UNCOMPRESS = "uncompress it first: rows are read by seeking"
_CONVERT = "convert it to PNG, JPEG or WebP"
_FETCH = "fetch the file itself again"

_BEGINNINGS: tuple[tuple[bytes, Likely], ...] = (
    (
        b"version https://git-lfs.github.com/spec/",
        Likely("a git-lfs pointer, not the file itself", "`git lfs pull` fetches the file"),
    ),
    (b"\x1f\x8b", Likely("gzip data", _UNCOMPRESS)),
    (b"\x28\xb5\x2f\xfd", Likely("zstd data", _UNCOMPRESS)),
    (b"\xfd7zXZ\0", Likely("xz data", _UNCOMPRESS)),
    (b"BZh", Likely("bzip2 data", _UNCOMPRESS)),
    (b"\x04\x22\x4d\x18", Likely("lz4 data", _UNCOMPRESS)),
    (b"7z\xbc\xaf\x27\x1c", Likely("a 7z archive", "unpack it first")),
    (b"Rar!\x1a\x07", Likely("a RAR archive", "unpack it first")),
    (b"PAR1", Likely("a parquet file", "name it .parquet")),
    (b"ARROW1", Likely("an Arrow file", "write it as parquet")),
    (b"\x89HDF", Likely("an HDF5 file", "write its rows in one of the forms of docs/data.md")),
    (b"\xff\x0a", Likely("a JPEG XL image, which is not read", _CONVERT)),
    (b"\0\0\0\x0cJXL ", Likely("a JPEG XL image, which is not read", _CONVERT)),
    (b"II\xbc", Likely("a JPEG XR image, which is not read", _CONVERT)),
    (b"qoif", Likely("a QOI image, which is not read", _CONVERT)),
    (b"\x76\x2f\x31\x01", Likely("an OpenEXR image, which is not read", _CONVERT)),
    (b"#?RADIANCE", Likely("a Radiance HDR image, which is not read", _CONVERT)),
    (b"8BPS", Likely("a Photoshop file, which is not read", _CONVERT)),
    (b"DDS ", Likely("a DDS texture, which is not read", _CONVERT)),
    (b"\0\0\1\0", Likely("a Windows icon, which is not read", _CONVERT)),
    (b"%PDF", Likely("a PDF document", _CONVERT)),
    (b"\x1a\x45\xdf\xa3", Likely("a Matroska or WebM video", "take a frame out of it")),
    (b"data:image/", Likely("an image as a data URL in base64 text", "decode it to bytes")),
    (b"iVBORw0KGgo", Likely("a PNG image in base64 text", "decode it to bytes")),
    (b"/9j/", Likely("a JPEG image in base64 text", "decode it to bytes")),
    (b"UklGR", Likely("a WebP image in base64 text", "decode it to bytes")),
    (b"\xff\xfe", Likely("UTF-16 text", "save it as UTF-8")),
    (b"\xfe\xff", Likely("UTF-16 text", "save it as UTF-8")),
)

_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def likely_kind(data: bytes) -> Likely | None:
    """What a file or its first bytes (512 are enough) look like; None for AVIF and whatever else is not recognised."""
    if not data:
        return Likely("an empty file", _FETCH)
    if not data.strip(b"\0"):
        return Likely("nothing but zero bytes, as a copy leaves that was not finished", _FETCH)
    for beginning, likely in _BEGINNINGS:
        if data.startswith(beginning):
            return likely
    if data.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        if b"[Content_Types].xml" in data[:512] or b"xl/" in data[:512]:
            return Likely("an Excel workbook", "export the sheet as CSV UTF-8")
        return Likely("a zip archive", "unpack it first")
    if data[257:262] == b"ustar":
        return Likely("a tar", "name it .tar")
    if data[4:8] == b"ftyp":
        return _boxed(data)
    text = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if re.match(rb"<(!doctype html|html|head|body|script|title)\b", text):
        return Likely("an HTML page, perhaps a host's error or login page", _FETCH)
    if re.match(rb"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?(<!doctype svg[^>]*>\s*)?<svg\b", text, re.DOTALL):
        return Likely("an SVG drawing, which is not read", _CONVERT)
    if text.startswith((b"<?xml", b"<error>")):
        return Likely("an XML document, perhaps a host's error message", _FETCH)
    if re.match(rb"[{\[]\s*[\"{\[\d\]}]", text):
        return Likely("JSON text, perhaps a host's error message", _FETCH)
    return None


def _boxed(data: bytes) -> Likely | None:
    """A file of ISO boxes, by the brands in its first box."""
    (size,) = (int.from_bytes(data[:4], "big"),)
    brands = {data[i : i + 4] for i in (8, *range(16, min(size, 128, len(data)), 4))}
    if brands & {b"avif", b"avis"}:
        return None
    if brands & set(_HEIF):
        return Likely("a HEIC image, which is not read", _CONVERT)
    if brands & {b"crx "}:
        return Likely("a camera's raw image, which is not read", _CONVERT)
    return Likely("a video or another file of the MP4 family", "take a frame out of it")
