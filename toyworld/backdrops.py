"""The six backdrops of the toyworld: a sky with a gradient over some ground, drawn once at 64 x 64 pixels."""

from collections.abc import Callable
from functools import cache

import numpy as np
from jaxtyping import Float

from inpo.common.errors import UsageError

SIZE = 64
"""Width and height of every picture in pixels."""
UNITS = 32
"""Width and height of every picture in the units that the backdrops are drawn in."""
SUPERSAMPLE = 4
"""Sub-pixels per pixel and axis; their mean is the anti-aliased pixel."""

Canvas = Float[np.ndarray, "side side 3"]
Line = Float[np.ndarray, "side 1"]
Row = Float[np.ndarray, "1 side"]


def box_downsample(fine: Float[np.ndarray, "rows columns *channels"]) -> Float[np.ndarray, "y x *channels"]:
    """Mean of every pixel's sub-pixels."""
    rows, columns, *channels = fine.shape
    blocks = fine.reshape(rows // SUPERSAMPLE, SUPERSAMPLE, columns // SUPERSAMPLE, SUPERSAMPLE, *channels)
    return blocks.mean(axis=(1, 3), dtype=np.float32)


def _gradient(y: Line, *stops: tuple[float | int, tuple[int, int, int]]) -> Float[np.ndarray, "side 1 3"]:
    """Colours interpolated between stops (height in units, RGB 0..255), for every row."""
    heights = [height for height, _ in stops]
    channels = [np.interp(y, heights, [rgb[channel] for _, rgb in stops]) for channel in range(3)]
    return (np.stack(channels, axis=-1) / 255).astype(np.float32)


def _over(sky: Canvas, ground: Float[np.ndarray, "..."], inside: np.ndarray) -> Canvas:
    return np.where(inside[..., None], ground, sky).astype(np.float32)


def _night(x: Row, y: Line) -> Canvas:
    canvas = _gradient(y, (0, (16, 20, 56)), (32, (66, 58, 120))) * np.ones_like(x)[..., None]
    for star_x, star_y in ((3, 4), (12, 2), (20, 6), (28, 3), (25, 13), (6, 14), (15, 19), (30, 21), (2, 23)):
        canvas = _over(canvas, np.array([0.95, 0.92, 0.75]), (x - star_x - 0.5) ** 2 + (y - star_y - 0.5) ** 2 < 0.3)
    return _over(canvas, np.array([20, 20, 42]) / 255, y > 28 - 1.6 * np.sin(x / 5))


def _sunset(x: Row, y: Line) -> Canvas:
    stops = ((0, (70, 58, 140)), (12, (196, 96, 150)), (25, (255, 190, 110)))
    canvas = _gradient(y, *stops) * np.ones_like(x)[..., None]
    return _over(canvas, np.array([72, 40, 76]) / 255, y > 26.5 + 1.2 * np.sin(x / 4 + 2))


def _sea(x: Row, y: Line) -> Canvas:
    canvas = _gradient(y, (0, (104, 186, 236)), (19, (186, 228, 246))) * np.ones_like(x)[..., None]
    water = _gradient(y, (19, (40, 128, 186)), (32, (18, 78, 140))) * np.ones_like(x)[..., None]
    crests = (np.sin(y * 1.9 + np.sin(x / 3.2) * 1.3) > 0.8)[..., None]
    return _over(canvas, np.where(crests, water + 0.13, water), (y > 20) | np.zeros_like(x, dtype=bool))


def _meadow(x: Row, y: Line) -> Canvas:
    canvas = _gradient(y, (0, (92, 166, 234)), (24, (180, 220, 246))) * np.ones_like(x)[..., None]
    far = _over(canvas, np.array([132, 196, 98]) / 255, y > 20 + 2.2 * np.sin(x / 6 + 1))
    return _over(far, np.array([92, 166, 72]) / 255, y > 25 + 1.8 * np.sin(x / 5 + 4))


def _desert(x: Row, y: Line) -> Canvas:
    canvas = _gradient(y, (0, (246, 200, 136)), (22, (252, 230, 184))) * np.ones_like(x)[..., None]
    far = _over(canvas, np.array([226, 168, 100]) / 255, y > 22 - 2.4 * np.sin(x / 6.5))
    return _over(far, np.array([198, 132, 76]) / 255, y > 27 + 2.2 * np.sin(x / 7 + 0.5))


def _snow(x: Row, y: Line) -> Canvas:
    canvas = _gradient(y, (0, (168, 190, 216)), (22, (212, 222, 234))) * np.ones_like(x)[..., None]
    far = _over(canvas, np.array([232, 238, 246]) / 255, y > 20 + 1.8 * np.sin(x / 5 + 3))
    return _over(far, np.array([252, 252, 253]) / 255, y > 25.5 + 1.6 * np.sin(x / 6))


BACKDROPS: dict[str, Callable[[Row, Line], Canvas]] = {
    "at night": _night,
    "at sunset": _sunset,
    "over the sea": _sea,
    "over a meadow": _meadow,
    "over the desert": _desert,
    "in the snow": _snow,
}


@cache
def backdrop(name: str) -> Float[np.ndarray, "64 64 3"]:
    """The picture behind the objects, RGB from 0 to 1; read-only, as it is shared."""
    if name not in BACKDROPS:
        raise UsageError(
            "There is no such backdrop.", expected=", ".join(BACKDROPS), got=repr(name), fix="take one of these"
        )
    centres = (np.arange(SIZE * SUPERSAMPLE, dtype=np.float32) + 0.5) * UNITS / (SIZE * SUPERSAMPLE)
    picture = box_downsample(BACKDROPS[name](centres[None, :], centres[:, None]))
    picture.flags.writeable = False
    return picture
