"""Captions, the scenes they describe, and clean pictures of those scenes.

A scene is one shape in front of one backdrop: "a small red heart on the left at sunset". Captions and scenes stand in
one-to-one correspondence; `render` draws a scene at 32 x 32 pixels, anti-aliased. Shape coordinates (u, v) run from -1
to 1 across the object's radius, u to the right and v down.
"""

import hashlib
import itertools
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Bool, Float, UInt8

from inpo.common.errors import UsageError
from inpo.toyworld.backdrops import BACKDROPS, SIZE, SUPERSAMPLE, backdrop, box_downsample
from inpo.toyworld.split import SPLITS, Split

Shift = tuple[float | int, float | int]
"""Pixels to the right and down."""

RADII = {"small": 5.5, "big": 9.0}
"""Radius of the object in pixels."""
REACH = {"small": 8.5, "big": 6.0}
"""Distance in pixels between the picture's middle and the object's, for every place but the middle."""
PLACES = {
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
    "in the middle": (0, 0),
}
COLOURS = {
    "red": (214, 48, 52),
    "orange": (245, 140, 40),
    "yellow": (252, 214, 60),
    "green": (40, 150, 80),
    "blue": (50, 90, 215),
    "purple": (135, 60, 175),
    "pink": (250, 130, 180),
    "white": (250, 250, 250),
}
SHAPES = ("ball", "box", "triangle", "heart", "star", "moon")
CLASHES = {
    "at night": ("purple",),
    "at sunset": ("orange", "pink"),
    "over the sea": ("blue",),
    "over a meadow": ("green",),
    "over the desert": ("yellow", "orange"),
    "in the snow": ("white",),
}
"""Colours hardly seen before a backdrop: no caption combines them."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a caption says: five attributes, each one of the words above."""

    size: str
    colour: str
    shape: str
    place: str
    backdrop: str

    @property
    def caption(self) -> str:
        """The sentence that describes the scene."""
        return f"a {self.size} {self.colour} {self.shape} {self.place} {self.backdrop}"


ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": tuple(RADII),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "place": tuple(PLACES),
    "backdrop": tuple(BACKDROPS),
}
"""Every attribute of a scene with its words, in the order of the caption."""


@cache
def scenes_by_caption() -> dict[str, Scene]:
    """All scenes of the world, keyed by their captions, in a fixed order."""
    scenes = (Scene(**dict(zip(ATTRIBUTES, words, strict=True))) for words in itertools.product(*ATTRIBUTES.values()))
    return {scene.caption: scene for scene in scenes if scene.colour not in CLASHES[scene.backdrop]}


def parse_caption(caption: str) -> Scene:
    """The scene a caption describes; UsageError for a sentence that is none of the world's captions."""
    scene = scenes_by_caption().get(caption.strip())
    if scene is None:
        example = next(iter(scenes_by_caption()))
        raise UsageError(
            "this prompt is no caption of the toyworld",
            where="the toyworld's scorers and pairs know its captions only",
            expected=f"a sentence like {example!r}",
            got=repr(caption),
            fix="list the captions with `inpo toyworld prompts`",
        )
    return scene


def split_of(caption: str) -> Split:
    """The split a caption belongs to, from a stable hash: 65% train, 15% validation, 20% test."""
    bucket = int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "big") % 20
    return "train" if bucket < 13 else "validation" if bucket < 16 else "test"


@cache
def captions(split: Split) -> tuple[str, ...]:
    """The captions of one split, in an order shuffled by the hash so that any prefix is a fair sample."""
    if split not in SPLITS:
        raise UsageError("unknown split", expected=", ".join(SPLITS), got=repr(split))
    ours = [caption for caption in scenes_by_caption() if split_of(caption) == split]
    return tuple(sorted(ours, key=lambda caption: hashlib.blake2b(caption.encode(), salt=b"order").digest()))


@cache
def _pixel_grid() -> tuple[Float[np.ndarray, "1 side"], Float[np.ndarray, "side 1"]]:
    """Horizontal and vertical pixel coordinates of the sub-pixel centres."""
    centres = (np.arange(SIZE * SUPERSAMPLE, dtype=np.float32) + 0.5) / SUPERSAMPLE
    return centres[None, :], centres[:, None]


def _inside(
    shape: str, u: Float[np.ndarray, "1 side"], v: Float[np.ndarray, "side 1"]
) -> Bool[np.ndarray, "side side"]:
    match shape:
        case "ball":
            return u**2 + v**2 < 0.9
        case "box":
            return np.maximum(np.abs(u), np.abs(v)) < 0.82
        case "triangle":
            return (v < 0.8) & (np.abs(u) < (v + 0.95) * 0.57)
        case "heart":
            x, y = u * 1.18, -v * 1.12 + 0.12
            return (x**2 + y**2 - 1) ** 3 - x**2 * y**3 < 0
        case "star":
            angle = np.arctan2(u, -v)
            sector = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
            # A spike's edge runs from its tip (radius 1.05, sector 0) to the notch (radius 0.48, 36 degrees).
            tip, notch = np.array([1.05, 0.0]), 0.48 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
            x, y = np.hypot(u, v) * np.cos(sector), np.hypot(u, v) * np.sin(sector)
            return (notch[0] - tip[0]) * (y - tip[1]) - (notch[1] - tip[1]) * (x - tip[0]) > 0
        case "moon":
            return (u**2 + v**2 < 0.95) & ((u - 0.48) ** 2 + (v + 0.18) ** 2 > 0.62)
    raise UsageError("unknown shape", expected=", ".join(SHAPES), got=repr(shape))


def object_centre(scene: Scene) -> tuple[float, float]:
    """The object's ideal centre (x, y) in pixels from the upper left corner."""
    right, down = PLACES[scene.place]
    return SIZE / 2 + right * REACH[scene.size], SIZE / 2 + down * REACH[scene.size]


def object_mask(scene: Scene, *, shift: Shift = (0, 0), scale: float = 1.0) -> Float[np.ndarray, "32 32"]:
    """Coverage of every pixel by the object, 0 to 1; `shift` in pixels to the right and down, `scale` of its radius."""
    u, v = _object_coordinates(scene, shift, scale)
    return box_downsample(_inside(scene.shape, u, v).astype(np.float32))


def _object_coordinates(
    scene: Scene, shift: Shift, scale: float
) -> tuple[Float[np.ndarray, "1 side"], Float[np.ndarray, "side 1"]]:
    x, y = object_centre(scene)
    radius = RADII[scene.size] * scale
    columns, rows = _pixel_grid()
    return (columns - x - shift[0]) / radius, (rows - y - shift[1]) / radius


def render(
    scene: Scene, *, shift: Shift = (0, 0), scale: float = 1.0, colour: tuple[int, int, int] | None = None
) -> UInt8[np.ndarray, "32 32 3"]:
    """A clean picture of the scene, lit from the upper left.

    `shift` moves the object (pixels, right and down), `scale` multiplies its radius, `colour` replaces its RGB colour.
    """
    u, v = _object_coordinates(scene, shift, scale)
    mask = box_downsample(_inside(scene.shape, u, v).astype(np.float32))[..., None]
    shade = box_downsample(np.clip((u + v) / 2, -1, 1))[..., None]
    paint = np.asarray(colour or COLOURS[scene.colour], dtype=np.float32) / 255
    lit = np.where(shade > 0, paint * (1 - 0.3 * shade), paint + (1 - paint) * 0.4 * -shade)
    picture = backdrop(scene.backdrop) * (1 - mask) + lit * mask
    return np.round(picture * 255).astype(np.uint8)
