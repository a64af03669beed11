"""The preference oracle: how well a picture shows what its caption says, as one number, in plain numpy.

Pixel values run from 0 to 1; colour distances are Euclidean in RGB, so at most sqrt(3).
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image

from inpo.toyworld.backdrops import SIZE, backdrop
from inpo.toyworld.scenes import Scene, object_mask, parse_caption, render

SHIFTS = tuple((x, y) for x in range(-2, 3) for y in range(-2, 3))
"""Shifts in pixels within which an object counts as being in its place."""
SHIFT_COST = 0.03
"""Overlap lost per pixel of shift."""
COLOUR_SCALE = 0.3
BACKDROP_SCALE = 0.15
GRAIN_SCALE = 0.04
"""Distances at which a part falls to 1/e."""
WEIGHTS = {"overlap": 2.0, "colour": 1.5, "backdrop": 1.0, "sharpness": 0.75, "contrast": 0.75}


class OracleParts(NamedTuple):
    """What the oracle looks at; each part lies between 0 and 1."""

    overlap: float
    """Soft intersection over union of what stands out from the backdrop and the ideal shape, best over shifts."""
    colour: float
    """Nearness of the object's mean colour to the caption's."""
    backdrop: float
    """Nearness of everything else to the caption's backdrop."""
    sharpness: float
    """Strength of the object's edges against ideal ones, less the grain of flat areas."""
    contrast: float
    """Distance between the object's mean colour and its surroundings', against the ideal distance."""


@cache
def _masks(size: str, shape: str, place: str) -> Float[np.ndarray, "shift 32 32"]:
    scene = Scene(size=size, shape=shape, place=place, colour="red", backdrop="at night")
    return np.stack([object_mask(scene, shift=shift) for shift in SHIFTS])


def _edges(picture: Float[np.ndarray, "32 32 3"]) -> Float[np.ndarray, "32 32"]:
    down, right = np.gradient(picture, axis=(0, 1))
    return np.sqrt((down**2 + right**2).sum(axis=-1))


def _grain(picture: Float[np.ndarray, "32 32 3"]) -> Float[np.ndarray, "30 30"]:
    """Distance of every inner pixel from the mean of its four neighbours."""
    neighbours = (picture[:-2, 1:-1] + picture[2:, 1:-1] + picture[1:-1, :-2] + picture[1:-1, 2:]) / 4
    return np.abs(picture[1:-1, 1:-1] - neighbours).mean(axis=-1)


def judge(picture: Float[np.ndarray, "32 32 3"], scene: Scene) -> OracleParts:
    """The oracle's parts for one picture (RGB from 0 to 1) of one scene."""
    behind = backdrop(scene.backdrop)
    masks = _masks(scene.size, scene.shape, scene.place)
    away = np.sqrt(((picture - behind) ** 2).sum(axis=-1))
    ideal_away = np.sqrt(((render(scene) / 255.0 - behind) ** 2).sum(axis=-1))
    typical = float((ideal_away * masks[SHIFTS.index((0, 0))]).sum() / masks[SHIFTS.index((0, 0))].sum())
    stands_out = np.clip(away / (0.6 * typical), 0, 1)
    union = np.maximum(stands_out, masks).sum(axis=(1, 2))
    overlaps = np.minimum(stands_out, masks).sum(axis=(1, 2)) / union
    overlaps = overlaps - SHIFT_COST * np.hypot(*np.array(SHIFTS).T)
    best = int(overlaps.argmax())

    mask, ideal = masks[best], render(scene, shift=SHIFTS[best]) / 255.0
    core, outside = mask > 0.9, mask < 0.02
    # Surroundings: outside the object but near it, where the eye compares.
    near = outside & _dilated(mask > 0.02, times=3)
    object_colour, ideal_colour = picture[core].mean(axis=0), ideal[core].mean(axis=0)
    step = np.linalg.norm(object_colour - picture[near].mean(axis=0))
    ideal_step = np.linalg.norm(ideal_colour - ideal[near].mean(axis=0))

    rim = _dilated((mask > 0.05) & (mask < 0.95), times=1)
    edges, ideal_edges = _edges(picture)[rim], _edges(ideal)[rim]
    flat = outside[1:-1, 1:-1]
    extra_grain = max(0.0, float((_grain(picture) - _grain(ideal))[flat].mean()))
    return OracleParts(
        overlap=max(0.0, float(overlaps[best])),
        colour=float(np.exp(-np.linalg.norm(object_colour - ideal_colour) / COLOUR_SCALE)),
        backdrop=float(np.exp(-away[outside].mean() / BACKDROP_SCALE)),
        sharpness=float(np.minimum(edges, ideal_edges).sum() / ideal_edges.sum() * np.exp(-extra_grain / GRAIN_SCALE)),
        contrast=min(1.0, float(step / ideal_step)),
    )


def _dilated(mask: np.ndarray, *, times: int) -> np.ndarray:
    for _ in range(times):
        padded = np.pad(mask, 1)
        mask = mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return mask


class OracleScorer:
    """Weighted sum of the oracle's parts, from 0 to 6; higher is better."""

    name = "toyworld-oracle"

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Float[np.ndarray, " image"]:
        """One number per image; UsageError for a prompt that is no caption of the toyworld."""
        scores = np.empty(len(images), dtype=np.float64)
        for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            picture = np.asarray(image.convert("RGB").resize((SIZE, SIZE)), dtype=np.float32) / 255
            parts = judge(picture, parse_caption(prompt))
            scores[index] = sum(WEIGHTS[name] * value for name, value in parts._asdict().items())
        return scores
