"""Decoding and preparing images: every mode, damage told apart, and geometry against Pillow's own two-step way."""

import contextlib
import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile

from inpo.common.pairs.images import ImageError, PreparedImage, decode_image, prepare_image, shown_size
from inpo.precompute.encode import pixels_from_levels

RED, WHITE = (255, 0, 0), (255, 255, 255)


def saved(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=format, **options)
    return stream.getvalue()


def png(width: int, height: int, bit_depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG assembled by hand: modes that Pillow cannot write, and sizes that need no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def palette_with_transparency() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    return image


def rotated_jpeg(orientation: int) -> bytes:
    """A 16x8 picture, red left half, stored so that `orientation` brings it upright."""
    upright = Image.new("RGB", (16, 8), WHITE)
    upright.paste(RED, (0, 0, 8, 8))
    inverse = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]
    stored = upright
    for operation in inverse:
        stored = stored.transpose(operation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(stored, "JPEG", quality=100, subsampling=0, exif=exif)


MODES = {
    "rgb": (saved(Image.new("RGB", (2, 1), RED)), [RED, RED]),
    "rgba on white": (saved(Image.new("RGBA", (2, 1), (255, 0, 0, 128))), [(255, 127, 127)] * 2),
    "palette": (saved(palette_with_transparency()), [RED, (0, 0, 255)]),
    "palette with transparency": (saved(palette_with_transparency(), transparency=1), [RED, WHITE]),
    "rgb with a transparent colour": (saved(Image.new("RGB", (2, 1), RED), transparency=RED), [WHITE, WHITE]),
    "grey": (saved(Image.new("L", (2, 1), 77)), [(77, 77, 77)] * 2),
    "grey and alpha": (saved(Image.new("LA", (2, 1), (0, 0))), [WHITE, WHITE]),
    "one bit": (saved(Image.new("1", (2, 1), 1)), [WHITE, WHITE]),
    "cmyk": (saved(Image.new("CMYK", (2, 1), (0, 255, 255, 0)), "TIFF"), [RED, RED]),
    "cmyk jpeg": (saved(Image.new("CMYK", (2, 1), (0, 0, 0, 0)), "JPEG"), [WHITE, WHITE]),
    "16 bit grey": (
        png(3, 1, 16, 0, b"\0" + struct.pack(">HHH", 0, 257 * 100, 65535)),
        [(0, 0, 0), (100, 100, 100), WHITE],
    ),
    "16 bit rgb": (png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 65535, 0, 0)), [RED]),
    "16 bit tiff": (saved(Image.fromarray(np.array([[0, 65535]], dtype=np.uint16)), "TIFF"), [(0, 0, 0), WHITE]),
    "32 bit integers holding 16": (
        saved(Image.fromarray(np.array([[0, 65535]], dtype=np.int32)), "TIFF"),
        [(0, 0, 0), WHITE],
    ),
    "animated gif": (
        saved(Image.new("RGB", (2, 1), RED), "GIF", save_all=True, append_images=[Image.new("RGB", (2, 1), WHITE)]),
        [RED, RED],
    ),
    "animated webp": (
        saved(
            Image.new("RGB", (2, 1), RED),
            "WEBP",
            save_all=True,
            append_images=[Image.new("RGB", (2, 1), WHITE)],
            lossless=True,
        ),
        [RED, RED],
    ),
    "1x1": (saved(Image.new("RGB", (1, 1), RED)), [RED]),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_the_rgb_that_a_viewer_shows(name: str) -> None:
    data, expected = MODES[name]
    image = decode_image(data)
    assert image.mode == "RGB"
    found = np.asarray(image).reshape(-1, 3).tolist()
    assert found == [list(colour) for colour in expected]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int) -> None:
    image = decode_image(rotated_jpeg(orientation))
    assert image.size == (16, 8)
    np.testing.assert_allclose(image.getpixel((2, 4)), RED, atol=2)
    np.testing.assert_allclose(image.getpixel((13, 4)), WHITE, atol=2)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_header_alone_says_how_large_an_image_is_shown(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = saved(Image.new("RGB", (16, 8), RED), format, exif=exif)
    assert shown_size(data) == decode_image(data).size[::-1] == ((8, 16) if orientation < 5 else (16, 8))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow says so; the pixels are whole
def test_damaged_exif_leaves_the_pixels_as_stored() -> None:
    image = decode_image(saved(Image.new("RGB", (4, 2), RED), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"))
    assert image.size == (4, 2)


def test_floats_have_no_defined_range_and_are_refused() -> None:
    with pytest.raises(ImageError) as error:
        decode_image(saved(Image.new("F", (2, 2), 0.5), "TIFF"))
    assert error.value.reason == "unsupported_mode"


def test_integers_beyond_16_bit_are_refused() -> None:
    with pytest.raises(ImageError) as error:
        decode_image(saved(Image.fromarray(np.array([[70000]], dtype=np.int32)), "TIFF"))
    assert error.value.reason == "unsupported_mode"


def test_zero_bytes_are_told_apart() -> None:
    with pytest.raises(ImageError) as error:
        decode_image(b"")
    assert error.value.reason == "empty_image"


@pytest.mark.parametrize(
    "data", [b"no image at all", b"\0" * 4096, b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe EPSF-3.0\n"]
)
def test_what_is_no_image_is_unreadable(data: bytes) -> None:
    with pytest.raises(ImageError) as error:
        decode_image(data)
    assert " at 0x" not in error.value.detail  # a place in memory, which no two runs share
    assert error.value.reason == "unreadable"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"])
@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.9])
def test_a_cut_file_is_truncated_in_every_format(encoded: Callable[..., bytes], format: str, share: float) -> None:
    whole = encoded(3, size=(96, 96), format=format)
    decode_image(whole)
    with pytest.raises(ImageError) as error:
        decode_image(whole[: max(3, int(share * len(whole)))])
    assert error.value.reason == "truncated"


@pytest.mark.parametrize(("format", "option"), [("JPEG", "progressive"), ("TIFF", "compression"), ("WEBP", "lossless")])
def test_cut_files_of_other_encodings_are_truncated(format: str, option: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    whole = saved(Image.fromarray(pixels), format, **{option: "tiff_lzw" if option == "compression" else True})
    with pytest.raises(ImageError) as error:
        decode_image(whole[: len(whole) // 2])
    assert error.value.reason == "truncated"


def test_a_cut_file_stays_truncated_when_the_process_lets_pillow_fill_in(
    encoded: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole = encoded(3, size=(96, 96), format="JPEG")
    assert decode_image(whole).size == (96, 96)
    with pytest.raises(ImageError) as error:
        decode_image(whole[: len(whole) // 2])
    assert error.value.reason == "truncated"


def test_a_damaged_but_whole_png_is_unreadable(encoded: Callable[..., bytes]) -> None:
    data = bytearray(encoded(0, size=(64, 64)))
    data[60:4000] = bytes(3940)
    with pytest.raises(ImageError) as error:
        decode_image(bytes(data))
    assert error.value.reason == "unreadable"


@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (20_000, 20_000), (2**31 - 1, 1)])
def test_decompression_bombs_are_refused_before_decoding(width: int, height: int) -> None:
    # The file claims the size and holds one byte of pixels: decoding it would say truncated.
    with pytest.raises(ImageError) as error:
        decode_image(png(width, height, 8, 2, b"\0"))
    assert error.value.reason == "decompression_bomb"


def test_the_pixel_limit_is_the_callers(encoded: Callable[..., bytes]) -> None:
    data = encoded(0, size=(8, 8))
    assert decode_image(data, max_pixels=64).size == (8, 8)
    with pytest.raises(ImageError, match="8x8 pixels, limit 63"):
        decode_image(data, max_pixels=63)


def test_a_very_large_image_below_the_limit_is_read() -> None:
    assert decode_image(saved(Image.new("1", (6000, 6000)))).size == (6000, 6000)


@given(data=st.binary(max_size=200), head=st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a"]))
@settings(max_examples=150)
def test_hostile_bytes_give_an_image_or_an_image_error(data: bytes, head: bytes) -> None:
    with contextlib.suppress(ImageError):
        assert decode_image(head + data).mode == "RGB"


def two_steps(image: Image.Image, resolution: int) -> np.ndarray:
    """Resize the whole image, then crop the middle."""
    scale = resolution / min(image.size)
    size = [round(side * scale) for side in image.size]
    resized = image.resize(tuple(size), Image.Resampling.LANCZOS)
    left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    return np.asarray(resized.crop((left, top, left + resolution, top + resolution)))


def pixels(prepared: PreparedImage) -> torch.Tensor:
    """What the VAE is given."""
    return pixels_from_levels(torch.from_numpy(prepared.levels))


def smooth(width: int, height: int) -> Image.Image:
    x, y = np.linspace(0, 1, width), np.linspace(0, 1, height)[:, None]
    planes = [120 + 100 * np.sin(5 * x + 2 * y), 255 * x + 0 * y, 0 * x + 255 * y]
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


@pytest.mark.parametrize("size", [(64, 64), (100, 64), (64, 101), (37, 53), (16, 16), (9, 31), (1, 1), (200, 65)])
def test_resize_and_crop_agree_with_pillow_in_two_steps(size: tuple[int, int]) -> None:
    image = smooth(*size)
    prepared = prepare_image(image, resolution=(32, 32), crop="center", flip=False)
    assert pixels(prepared).shape == (3, 32, 32)
    assert pixels(prepared).dtype == torch.float32
    assert prepared.original_size == (size[1], size[0])
    levels = ((pixels(prepared) + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(levels - two_steps(image, 32)).max() <= 2.01


def test_resize_is_antialiased(encoded: Callable[..., bytes]) -> None:
    # Noise shrunk 16 times averages 256 pixels, so its spread falls about 16 times; plain sampling would keep it.
    image = decode_image(encoded(2, size=(512, 512)))
    shown = pixels(prepare_image(image, resolution=(32, 32), crop="center", flip=False))
    spread = ((shown + 1) * 127.5).std()
    assert 255 / 12**0.5 / 16 * 0.8 < spread < 255 / 12**0.5 / 16 * 1.5


def test_an_image_of_the_right_size_is_only_scaled_to_minus_one_and_one() -> None:
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    shown = pixels(prepare_image(image, resolution=(8, 8), crop="center", flip=False))
    np.testing.assert_array_equal(shown.numpy(), np.asarray(image).transpose(2, 0, 1).astype(np.float32) / 127.5 - 1)
    ends = Image.fromarray(np.array([[[0, 255, 0]]], dtype=np.uint8))
    assert pixels(prepare_image(ends, resolution=(1, 1), crop="center", flip=False)).flatten().tolist() == [
        -1.0,
        1.0,
        -1.0,
    ]


@pytest.mark.parametrize(
    ("size", "flip", "expected"),
    [((48, 32), False, (0, 8)), ((48, 32), True, (0, 8)), ((32, 49), False, (8, 0)), ((49, 32), True, (0, 9))],
)
def test_crop_offset_is_that_of_the_image_shown(
    encoded: Callable[..., bytes], size: tuple[int, int], flip: bool, expected: tuple[int, int]
) -> None:
    image = decode_image(encoded(1, size=size))
    assert prepare_image(image, resolution=(32, 32), crop="center", flip=flip).crop_top_left == expected


def test_flip_mirrors_the_same_crop(encoded: Callable[..., bytes]) -> None:
    image = decode_image(encoded(1, size=(40, 33)))
    plain = pixels(prepare_image(image, resolution=(32, 32), crop="center", flip=False))
    flipped = pixels(prepare_image(image, resolution=(32, 32), crop="center", flip=True))
    assert torch.equal(flipped, plain.flip(-1))


def test_a_thin_image_costs_no_more_than_its_crop() -> None:
    # Resized whole it would have 64 * 3,200,000 pixels.
    prepared = prepare_image(Image.new("RGB", (1, 50_000), RED), resolution=(64, 64), crop="center", flip=False)
    assert prepared.original_size == (50_000, 1)
    assert prepared.crop_top_left == ((64 * 50_000 - 64) // 2, 0)
    assert pixels(prepared)[0].eq(1.0).all()
    assert pixels(prepared)[1:].eq(-1.0).all()


def test_image_errors_survive_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(ImageError("truncated", "12 bytes")))
    assert (error.reason, error.detail) == ("truncated", "12 bytes")


LIKELY = {
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40),
    "HEIF with a general brand": b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(40),
    "JPEG XL": b"\xff\x0a" + bytes(range(30)),
    "JPEG XL in boxes": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(30),
    "gzip": b"\x1f\x8b\x08\0" + bytes(range(20)),
    "zstd": b"\x28\xb5\x2f\xfd" + bytes(range(20)),
    "xz": b"\xfd7zXZ\0" + bytes(range(20)),
    "a zip archive": b"PK\x03\x04" + bytes(range(26)),
    "an HTML page": b"\n<!DOCTYPE html>\n<html><head>",
    "an HTML page without a type": b"<html lang=en>",
    "an XML document": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "JSON text": b'{"error": "not found"}',
    "an SVG drawing": b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"></svg>',
    "a PDF document": b"%PDF-1.7\n",
    "base64 text": b"iVBORw0KGgoAAAANSUhEUgAA",
    "MP4 family": b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + bytes(40),
    "nothing but zero bytes": bytes(1000),
}


@pytest.mark.parametrize("kind", LIKELY)
def test_what_is_no_image_is_named(kind: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(LIKELY[kind])
    assert caught.value.reason == "unreadable"
    words = {"HEIF with a general brand": "HEIC", "JPEG XL in boxes": "JPEG XL"}
    assert words.get(kind, kind.removesuffix(" without a type")) in caught.value.detail
