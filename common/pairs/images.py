"""From an encoded image file to 8-bit pixels of the right size.

    bytes --decode_image--> PIL image, RGB 8 bit, upright --prepare_image--> levels uint8 [3, h, w]

ICC profiles are not applied. Pixels of the two sides go through here with the same crop and the same flip.
"""

import io
import re
import struct
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageFile, features

from inpo.common.pairs.png import without_metadata
from inpo.common.pairs.signatures import likely_kind

ImageProblem = Literal["empty_image", "unreadable", "truncated", "decompression_bomb", "unsupported_mode"]
"""Reasons of an ImageError; the same words as in `inpo.common.pairs.pair.SKIP_REASONS`."""

MAX_PIXELS = 89_478_485
"""Default limit on width x height, Pillow's own: 256 MiB of 8-bit RGB, a square of 9459 pixels."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""Formats that are read. Others are refused: Pillow's list also holds formats that start outside programs."""

Crop = Literal["center"]

# `decode_image` has its own limit. Set once here and not around each call: filters belong to the process, threads
# included.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageError(Exception):
    """An image file that gives no pixels. `reason` is a stable word, `detail` one line for people."""

    def __init__(self, reason: ImageProblem, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[object, ...]:
        return (ImageError, (self.reason, self.detail))


@dataclass(frozen=True, kw_only=True)
class PreparedImage:
    """Pixels for the VAE and what a network may be told of the image."""

    levels: UInt8[np.ndarray, "3 h w"]
    """8-bit RGB, [h, w] = resolution: a quarter of the memory while a shard's images wait for the VAE."""
    original_size: tuple[int, int]
    """(height, width) of the decoded image, after EXIF rotation, before resizing."""
    crop_top_left: tuple[int, int]
    """(top, left) of the crop in the resized image, as shown: mirrored when the image is flipped."""


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS, behind: int = 255) -> Image.Image:
    """Decode an image file of any mode to upright 8-bit RGB.

    Transparency is laid on the grey `behind`; 16-bit grey is scaled by 255/65535; the first frame of an animation is
    taken; EXIF orientation is applied. Raises ImageError; images above `max_pixels` are refused before their pixels are
    decoded.
    """
    if len(data) == 0:
        raise ImageError("empty_image", "zero bytes")
    try:
        image = Image.open(io.BytesIO(without_metadata(data)), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise ImageError("decompression_bomb", f"{image.width}x{image.height} pixels, limit {max_pixels}")
        image.load()
        if ImageFile.LOAD_TRUNCATED_IMAGES and _ends_early(data):  # other libraries set this for the whole process
            raise ImageError("truncated", f"{len(data)} bytes")
        return _to_rgb(_upright(image), behind)
    except (ImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("decompression_bomb", str(error)) from error
    except Exception as error:  # decoders fail on hostile bytes with any exception: OSError, struct.error, SyntaxError
        raise _classify(data, error) from error


def prepare_image(image: Image.Image, *, resolution: tuple[int, int], crop: Crop, flip: bool) -> PreparedImage:
    """Resize (LANCZOS, antialiased) until the image just covers `resolution`, (height, width); cut the middle out of
    it, and flip left-right on request.

    `image` is RGB. Only the cropped part is resampled, so a 1x50000 image costs no more than a square one.
    """
    if image.mode != "RGB":
        raise ValueError(f"prepare_image takes RGB, got {image.mode}")
    if crop != "center":
        raise ValueError(f"unknown crop {crop!r}")
    (width, height), (rows, columns) = image.size, resolution
    scale = max(rows / height, columns / width)
    resized_width = max(columns, round(width * scale))
    resized_height = max(rows, round(height * scale))
    top, left = (resized_height - rows) // 2, (resized_width - columns) // 2
    box = (
        left * width / resized_width,
        top * height / resized_height,
        min(width, (left + columns) * width / resized_width),
        min(height, (top + rows) * height / resized_height),
    )
    cropped = image.resize((columns, rows), Image.Resampling.LANCZOS, box=box)
    if flip:
        cropped = cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        left = resized_width - columns - left
    levels = np.ascontiguousarray(np.array(cropped, dtype=np.uint8).transpose(2, 0, 1))
    return PreparedImage(levels=levels, original_size=(height, width), crop_top_left=(top, left))


def shown_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of an image file as it is shown, from its header alone; None where that says nothing."""
    try:
        image = Image.open(io.BytesIO(without_metadata(data)), formats=FORMATS)
    except Exception:  # as in `decode_image`, which says why
        return None
    # Pillow has turned the size of a TIFF already.
    turned = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)
    return (image.width, image.height) if turned else (image.height, image.width)


_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int | None:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a damaged EXIF block says nothing about orientation; the pixels are whole
        return None
    return orientation if isinstance(orientation, int) else None


def _upright(image: Image.Image) -> Image.Image:
    operation = _TRANSPOSE.get(_orientation(image) or 1)
    return image if operation is None else image.transpose(operation)


def _to_rgb(image: Image.Image, behind: int) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise ImageError("unsupported_mode", f"mode {image.mode} with values outside 0..65535")
        grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"):
        raise ImageError("unsupported_mode", f"mode {image.mode} has no defined 8-bit RGB")
    if image.has_transparency_data:
        # Premultiplied modes convert only to their straight twin.
        straight = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)
        rgba = (image.convert(straight) if straight else image).convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (behind, behind, behind, 255))
        return Image.alpha_composite(ground, rgba).convert("RGB")
    return image.convert("RGB")


def _classify(data: bytes, error: Exception) -> ImageError:
    # Pillow prints its file object with the place in memory, which no two runs share.
    detail = re.sub(r" <_io\.BytesIO object at 0x[0-9A-Fa-f]+>", "", f"{type(error).__name__}: {error}")
    likely = likely_kind(data)
    if likely is not None:
        return ImageError("unreadable", f"{likely.what}: {likely.fix} ({len(data)} bytes)")
    if data[4:8] == b"ftyp" and not features.check("avif"):
        return ImageError("unreadable", "an AVIF image, which this Pillow was built without: convert it to PNG")
    if "truncated" in str(error).lower() or _ends_early(data):
        return ImageError("truncated", f"{len(data)} bytes; {detail}")
    return ImageError("unreadable", f"{len(data)} bytes beginning {data[:8].hex()}; {detail}")


def _ends_early(data: bytes) -> bool:
    """Whether a file with a known signature lacks its end. Asked of files that failed to decode."""
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in data[-64:]
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        position = 8
        while position + 12 <= len(data):
            length, kind = struct.unpack_from(">I4s", data, position)
            if kind == b"IEND":
                return False
            position += 12 + length
        return True
    if data.startswith(b"RIFF") and len(data) >= 8:
        return bool(8 + struct.unpack_from("<I", data, 4)[0] > len(data))
    if data.startswith((b"GIF87a", b"GIF89a")):
        return not data.endswith(b"\x3b")
    if data.startswith(b"BM") and len(data) >= 6:
        return bool(struct.unpack_from("<I", data, 2)[0] > len(data))
    if data.startswith((b"II*\0", b"MM\0*")) and len(data) >= 8:
        (directory,) = struct.unpack_from("<I" if data.startswith(b"II") else ">I", data, 4)
        return bool(directory + 2 > len(data))
    if data.startswith(b"\xff\x4f\xff\x51"):  # bare JPEG 2000 codestream
        return not data.endswith(b"\xff\xd9")
    if data[4:8] in (b"ftyp", b"jP  "):
        return _boxes_end_early(data)
    # A beginning of a signature and nothing more.
    return any(signature.startswith(data) for signature in (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"GIF89a"))


def _boxes_end_early(data: bytes) -> bool:
    """Whether a box of AVIF or JPEG 2000 (size, kind, content) reaches beyond the end."""
    position = 0
    while position + 8 <= len(data):
        (size,) = struct.unpack_from(">I", data, position)
        if size == 1 and position + 16 <= len(data):
            (size,) = struct.unpack_from(">Q", data, position + 8)
        if size == 0:  # to the end of the file; JPEG 2000 then ends with its own marker
            return data[4:8] == b"jP  " and not data.endswith(b"\xff\xd9")
        if size < 8:
            return False
        position += size
    return position != len(data)
