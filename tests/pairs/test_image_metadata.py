"""What other programs write into an image file beside its pixels: however much, it is no limit on them."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from inpo.common.pairs.images import ImageError, decode_image


def with_metadata(pixels: np.ndarray, *texts: tuple[str, tuple[object, ...]], **options: object) -> bytes:
    """A PNG with texts, each named by PngInfo's method, as other programs write them."""
    information = PngImagePlugin.PngInfo()
    for method, arguments in texts:
        getattr(information, method)(*arguments)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", pnginfo=information, **options)
    return stream.getvalue()


LONG = "workflow " * 300_000
METADATA: dict[str, dict[str, Any]] = {
    "zTXt": {"texts": [("add_text", ("workflow", LONG, True))]},
    "compressed iTXt": {"texts": [("add_itxt", ("workflow", LONG, "", "", True))]},
    "XMP": {"texts": [("add_itxt", ("XML:com.adobe.xmp", LONG, "", "", True))]},
    "profile": {"icc_profile": bytes(3_000_000)},
    "profile and texts": {"texts": [("add_text", ("a", LONG, True))] * 2, "icc_profile": bytes(2_000_000)},
    "70 MB of text in many": {"texts": [("add_text", (f"k{i}", "x" * 7_000_000)) for i in range(10)]},
    "70 MB of text packed": {"texts": [("add_text", ("k", "x" * 70_000_000, True))]},
    "70 MB of XMP packed": {"texts": [("add_itxt", ("XML:com.adobe.xmp", "x" * 70_000_000, "", "", True))]},
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_is_no_limit_on_pixels(name: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    options = dict(METADATA[name])
    data = with_metadata(pixels, *options.pop("texts", ()), **options)
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    np.testing.assert_array_equal(np.asarray(decode_image(data)), pixels)
    assert (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY) == limits  # they are the whole process's


@pytest.mark.parametrize("filler", ["", LONG])
@pytest.mark.parametrize("packed", [False, True])
def test_an_orientation_in_a_png_is_applied_however_long_its_text(filler: str, packed: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    xmp = f'<x tiff:Orientation="6"/>{filler}'
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    raw = exif.tobytes().hex()
    upright = np.rot90(pixels, -1)
    for text in (
        ("add_itxt", ("XML:com.adobe.xmp", xmp, "", "", packed)),
        ("add_text", ("Raw profile type exif", f"\nexif\n{len(raw) // 2}\n{raw}{'00' * len(filler)}\n", packed)),
    ):
        data = with_metadata(pixels, ("add_text", ("workflow", LONG, True)), text)
        np.testing.assert_array_equal(np.asarray(decode_image(data)), upright)


def test_a_png_cut_after_long_metadata_is_truncated() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    data = with_metadata(pixels, ("add_text", ("workflow", LONG, True)))
    for end in (len(data) - 2000, len(data) - 9000):
        with pytest.raises(ImageError) as caught:
            decode_image(data[:end])
        assert caught.value.reason == "truncated"
