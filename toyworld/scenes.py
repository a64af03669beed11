"""Captions, the scenes they describe, and clean pictures of those scenes.

A scene is one or two objects in front of one backdrop: "a small red heart on the left and a big blue star on the right
at sunset". Captions and scenes stand in one-to-one correspondence; `render` draws a scene at 64 x 64 pixels,
anti-aliased. Shape coordinates (u, v) run from -1 to 1 across the object's radius, u to the right and v down.
"""

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from jaxtyping import Bool, Float, UInt8

from inpo.common.errors import UsageError
from inpo.toyworld.backdrops import BACKDROPS, SIZE, SUPERSAMPLE, backdrop, box_downsample
from inpo.toyworld.split import SPLITS, Split

Shift = tuple[float | int, float | int]
"""Pixels to the right and down."""

RADII = {"small": 8.0, "big": 12.5}
"""Radius of an object in pixels."""
REACH = 16
"""Distance in pixels between the picture's middle and the object's, for every place but the middle."""
PLACES = {
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
    "in the middle": (0, 0),
}
LAYOUTS = (*((place,) for place in PLACES), ("on the left", "on the right"), ("at the top", "at the bottom"))
"""Where the objects of a scene are, in the order of the caption."""
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


ONE_OBJECT = 1 / 3
"""Share of the scenes with one object in whatever is drawn, though nearly all captions have two."""


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """What a caption says of one object: four attributes, each one of the words above."""

    size: str
    colour: str
    shape: str
    place: str

    @property
    def centre(self) -> tuple[int, int]:
        """Its ideal centre (x, y) in pixels from the upper left corner."""
        right, down = PLACES[self.place]
        return SIZE // 2 + right * REACH, SIZE // 2 + down * REACH


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a caption says."""

    objects: tuple[SceneObject, ...]
    """One or two, of different colours."""
    backdrop: str

    @property
    def caption(self) -> str:
        """The sentence that describes the scene."""
        return " and ".join(f"a {o.size} {o.colour} {o.shape} {o.place}" for o in self.objects) + f" {self.backdrop}"


OBJECT_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": tuple(RADII),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "place": tuple(PLACES),
}
"""Every attribute of an object with its words, in the order of the caption."""


@cache
def all_captions() -> tuple[str, ...]:
    """Every caption of the world in a fixed order: those with one object come first."""
    # Plain strings in one loop: there are too many to make a scene of each before it is asked for.
    phrases = {
        (place, colour): [f"a {size} {colour} {shape} {place}" for size in RADII for shape in SHAPES]
        for place in PLACES
        for colour in COLOURS
    }
    return tuple(
        f"{' and '.join(chosen)} {name}"
        for layout in LAYOUTS
        for name in BACKDROPS
        for colours in itertools.permutations([c for c in COLOURS if c not in CLASHES[name]], len(layout))
        for chosen in itertools.product(*(phrases[key] for key in zip(layout, colours, strict=True)))
    )


@cache
def _known() -> frozenset[str]:
    return frozenset(all_captions())


@cache
def _num_with_one_object() -> int:
    return sum(" and " not in caption for caption in all_captions())


def draw_captions(count: int, rng: np.random.Generator) -> list[str]:
    """Captions drawn anew each: a third of them with one object."""
    ones, total = _num_with_one_object(), len(all_captions())
    drawn = np.where(rng.random(count) < ONE_OBJECT, rng.integers(ones, size=count), rng.integers(ones, total, count))
    return [all_captions()[index] for index in drawn]


def parse_caption(caption: str) -> Scene:
    """The scene a caption describes; UsageError for a sentence that is none of the world's captions."""
    sentence = caption.strip()
    if sentence not in _known():
        raise UsageError(
            "This prompt is no caption of the toyworld.",
            where="the toyworld's scorers and pairs know its captions only",
            expected=f"a sentence like {all_captions()[0]!r}",
            got=repr(caption),
            fix="list the captions with `inpo toyworld prompts`",
        )
    (name,) = (name for name in BACKDROPS if sentence.endswith(name))
    objects = []
    for phrase in sentence.removesuffix(f" {name}").split(" and "):
        _, *words = phrase.split(" ", maxsplit=len(OBJECT_ATTRIBUTES))
        objects.append(SceneObject(**dict(zip(OBJECT_ATTRIBUTES, words, strict=True))))
    return Scene(objects=tuple(objects), backdrop=name)


@cache
def captions(split: Split) -> tuple[str, ...]:
    """The captions of one split, from a stable hash: 65% train, 15% validation, 20% test.

    They are shuffled by another hash so that any prefix is mixed alike: one caption in three has one object, until
    there are no more of these.
    """
    if split not in SPLITS:
        raise UsageError(
            "There is no such split.",
            where="--split",
            expected=", ".join(SPLITS),
            got=repr(split),
            fix="take one of these",
        )
    buckets = {"train": range(13), "validation": range(13, 16), "test": range(16, 20)}[split]
    ones, total = _num_with_one_object(), len(all_captions())
    # Captions of one object come as much sooner than their hash says as there are fewer of them.
    odds = ONE_OBJECT / (1 - ONE_OBJECT) * (total - ones) / ones
    order = {}
    for index, caption in enumerate(all_captions()):
        text = caption.encode()
        if int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") % 20 in buckets:
            place = int.from_bytes(hashlib.blake2b(text, digest_size=8, salt=b"order").digest(), "big")
            order[caption] = place / odds if index < ones else place
    return tuple(sorted(order, key=order.__getitem__))


def _inside(
    shape: str, u: Float[np.ndarray, "1 columns"], v: Float[np.ndarray, "rows 1"]
) -> Bool[np.ndarray, "rows columns"]:
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
    raise UsageError("There is no such shape.", expected=", ".join(SHAPES), got=repr(shape), fix="take one of these")


@dataclass(frozen=True, kw_only=True)
class Look:
    """How an object is drawn, other than its caption says."""

    shift: Shift = (0, 0)
    scale: float = 1.0
    """Of its radius."""
    colour: tuple[float, float, float] | None = None
    """RGB from 0 to 255, in place of its own."""


AS_SAID = Look()


@lru_cache(maxsize=1024)
def _coverage(
    drawn: SceneObject, look: Look
) -> tuple[tuple[slice, slice], Float[np.ndarray, "y x"], Float[np.ndarray, "y x"]]:
    """The part of the picture an object lies in, its pixels' coverage from 0 to 1, and their shade from -1 to 1."""
    radius, span = RADII[drawn.size] * look.scale, []
    coordinates = []
    for middle, moved in zip(drawn.centre, look.shift, strict=True):
        first, last = (np.clip(middle + moved + side * 1.1 * radius, 0, SIZE) for side in (-1, 1))
        span.append(slice(int(first), math.ceil(last)))
        fine = np.arange(span[-1].start * SUPERSAMPLE, span[-1].stop * SUPERSAMPLE, dtype=np.float32)
        coordinates.append(((fine + 0.5) / SUPERSAMPLE - middle - moved) / radius)
    u, v = coordinates[0][None, :], coordinates[1][:, None]
    mask = box_downsample(_inside(drawn.shape, u, v).astype(np.float32))
    shade = box_downsample(np.clip((u + v) / 2, -1, 1))
    mask.flags.writeable = shade.flags.writeable = False
    return (span[1], span[0]), mask, shade


def object_mask(drawn: SceneObject, look: Look = AS_SAID) -> Float[np.ndarray, "64 64"]:
    """Coverage of every pixel by the object, 0 to 1."""
    mask = np.zeros((SIZE, SIZE), dtype=np.float32)
    window, covered, _ = _coverage(drawn, look)
    mask[window] = covered
    return mask


def render(scene: Scene, looks: Sequence[Look] | None = None) -> UInt8[np.ndarray, "64 64 3"]:
    """A clean picture of the scene, lit from the upper left; `looks` has one for every object."""
    picture = backdrop(scene.backdrop).copy()
    for drawn, look in zip(scene.objects, looks or [AS_SAID] * len(scene.objects), strict=True):
        window, covered, shade = _coverage(drawn, look)
        mask, shade = covered[..., None], shade[..., None]
        paint = np.asarray(look.colour or COLOURS[drawn.colour], dtype=np.float32) / 255
        lit = np.where(shade > 0, paint * (1 - 0.3 * shade), paint + (1 - paint) * 0.4 * -shade)
        picture[window] += (lit - picture[window]) * mask
    return np.round(picture * 255).astype(np.uint8)
