"""The preference oracle: how well a picture shows what its caption says, as one number, in plain numpy.

Pixel values run from 0 to 1; colour distances are Euclidean in RGB, so at most sqrt(3).
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from inpo.toyworld.backdrops import SIZE, backdrop
from inpo.toyworld.scenes import Look, Scene, SceneObject, object_mask, parse_caption, render

REACH = 3
"""Pixels to every side within which an object counts as being in its place."""
SHIFT_COST = 0.015
"""Overlap lost per pixel of shift."""
COLOUR_SCALE = 0.3
BACKDROP_SCALE = 0.15
GRAIN_SCALE = 0.04
"""Distances at which a part falls to 1/e."""
UNSEEN, SEEN = 0.15, 0.6
"""Shares of an object's typical distance from the backdrop up to which a pixel does not stand out, and from which it
does wholly. Smaller differences from the backdrop are its own part's matter."""
WEIGHTS = {"overlap": 1.75, "colour": 2.0, "sharpness": 0.75, "contrast": 0.5}
BACKDROP_WEIGHT = 1.0


class ObjectParts(NamedTuple):
    """What the oracle looks at in one object; each part lies between 0 and 1."""

    overlap: float
    """Soft intersection over union of what stands out from the backdrop, on the object's side of the picture, and the
    ideal shape, best over shifts."""
    colour: float
    """Nearness of the object's mean colour to the caption's."""
    sharpness: float
    """Strength of the object's edges against ideal ones, less the grain of flat areas."""
    contrast: float
    """Distance between the object's mean colour and its surroundings', against the ideal distance."""


def _edges(picture: Float[np.ndarray, "64 64 3"]) -> Float[np.ndarray, "64 64"]:
    down, right = np.gradient(picture, axis=(0, 1))
    return np.sqrt((down**2 + right**2).sum(axis=-1))


def _grain(picture: Float[np.ndarray, "64 64 3"]) -> Float[np.ndarray, "62 62"]:
    """Distance of every inner pixel from the mean of its four neighbours."""
    neighbours = (picture[:-2, 1:-1] + picture[2:, 1:-1] + picture[1:-1, :-2] + picture[1:-1, 2:]) / 4
    return np.abs(picture[1:-1, 1:-1] - neighbours).mean(axis=-1)


@cache
def _sides(centres: tuple[tuple[int, int], ...]) -> Bool[np.ndarray, "object 64 64"]:
    """The pixels nearest to each object's ideal centre."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    distances = np.stack([np.hypot(x - right, y - down) for right, down in centres])
    return distances <= distances.min(axis=0)


@cache
def _ideal_mask(drawn: SceneObject) -> Float[np.ndarray, "64 64"]:
    return object_mask(drawn)


@lru_cache(maxsize=1024)
def _ideal_away(scene: Scene) -> Float[np.ndarray, "64 64"]:
    """How far each pixel of a clean picture is from its backdrop."""
    away = np.sqrt(((render(scene) / 255 - backdrop(scene.backdrop)) ** 2).sum(axis=-1))
    away.flags.writeable = False
    return away


def _best_shift(
    stands_out: Float[np.ndarray, "64 64"], mask: Float[np.ndarray, "64 64"]
) -> tuple[tuple[int, int], float]:
    """The shift (x, y) of the ideal shape that fits best, and its overlap."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(stands_out, REACH), (SIZE, SIZE))
    common = np.minimum(windows, mask).sum(axis=(2, 3))
    overlaps = common / (stands_out.sum() + mask.sum() - common)
    down, right = np.mgrid[-REACH : REACH + 1, -REACH : REACH + 1]
    overlaps = overlaps - SHIFT_COST * np.hypot(right, down)
    row, column = np.unravel_index(overlaps.argmax(), overlaps.shape)
    return (int(column) - REACH, int(row) - REACH), max(0.0, float(overlaps[row, column]))


def judge(picture: Float[np.ndarray, "64 64 3"], scene: Scene) -> tuple[list[ObjectParts], float]:
    """The oracle's parts for every object of a scene in one picture (RGB from 0 to 1), and for its backdrop.

    The backdrop's part is the nearness to the caption's backdrop of everything that is no object.
    """
    behind = backdrop(scene.backdrop)
    away = np.sqrt(((picture - behind) ** 2).sum(axis=-1))
    ideal_away = _ideal_away(scene)
    overlaps, looks = [], []
    for drawn, side in zip(scene.objects, _sides(tuple(drawn.centre for drawn in scene.objects)), strict=True):
        mask = _ideal_mask(drawn)
        typical = float((ideal_away * mask).sum() / mask.sum())
        shift, overlap = _best_shift(np.clip((away / typical - UNSEEN) / (SEEN - UNSEEN), 0, 1) * side, mask)
        overlaps.append(overlap)
        looks.append(Look(shift=shift))

    ideal = render(scene, looks) / 255.0
    masks = [object_mask(drawn, look) for drawn, look in zip(scene.objects, looks, strict=True)]
    outside = np.max(masks, axis=0) < 0.02
    flat = outside[1:-1, 1:-1]
    extra_grain = max(0.0, float((_grain(picture) - _grain(ideal))[flat].mean()))
    edges, ideal_edges = _edges(picture), _edges(ideal)

    def parts(mask: Float[np.ndarray, "64 64"], overlap: float) -> ObjectParts:
        core = mask > 0.9
        # Surroundings: outside the object but near it, where the eye compares.
        near = outside & _dilated(mask > 0.02, times=5)
        object_colour, ideal_colour = picture[core].mean(axis=0), ideal[core].mean(axis=0)
        step = np.linalg.norm(object_colour - picture[near].mean(axis=0))
        ideal_step = np.linalg.norm(ideal_colour - ideal[near].mean(axis=0))
        rim = _dilated((mask > 0.05) & (mask < 0.95), times=1)
        sharpness = np.minimum(edges[rim], ideal_edges[rim]).sum() / ideal_edges[rim].sum()
        return ObjectParts(
            overlap=overlap,
            colour=float(np.exp(-np.linalg.norm(object_colour - ideal_colour) / COLOUR_SCALE)),
            sharpness=float(sharpness * np.exp(-extra_grain / GRAIN_SCALE)),
            contrast=min(1.0, float(step / ideal_step)),
        )

    return (
        [parts(mask, overlap) for mask, overlap in zip(masks, overlaps, strict=True)],
        float(np.exp(-away[outside].mean() / BACKDROP_SCALE)),
    )


def _dilated(mask: np.ndarray, *, times: int) -> np.ndarray:
    for _ in range(times):
        padded = np.pad(mask, 1)
        mask = mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return mask


class OracleScorer:
    """Weighted sum of an object's parts, the mean of both objects where there are two, and of the backdrop's part: from
    0 to 6, higher is better."""

    name = "toyworld-oracle"

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Float[np.ndarray, " image"]:
        """One number per image; UsageError for a prompt that is no caption of the toyworld."""
        scores = np.empty(len(images), dtype=np.float64)
        for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            picture = np.asarray(image.convert("RGB").resize((SIZE, SIZE)), dtype=np.float32) / 255
            objects, behind = judge(picture, parse_caption(prompt))
            of_objects = [sum(WEIGHTS[name] * value for name, value in parts._asdict().items()) for parts in objects]
            scores[index] = np.mean(of_objects) + BACKDROP_WEIGHT * behind
        return scores
