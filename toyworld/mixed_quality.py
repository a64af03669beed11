"""Pictures of mixed quality under right captions, as in data gathered from the web.

The base model learns from these, so it makes good and bad images for one prompt, and a preference has something to
prefer. Every flaw comes with its own probability, independently of the others; about one picture in three has none.
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageFilter

from inpo.toyworld.scenes import COLOURS, Look, Scene, draw_captions, parse_caption, render

MISPLACED = 0.2
WRONG_COLOUR = 0.18
SWAPPED = 0.25
"""Probability that two objects have each other's colours."""
MISSING = 0.12
"""Probability that one of two objects is not there."""
LOW_CONTRAST = 0.15
BLURRED = 0.2
NOISY = 0.12


def mixed_render(scene: Scene, rng: np.random.Generator) -> UInt8[np.ndarray, "64 64 3"]:
    """One picture of the scene with whatever flaws the generator draws."""
    objects = list(scene.objects)
    if len(objects) == 2 and rng.random() < SWAPPED:
        objects = [replace(one, colour=other.colour) for one, other in zip(objects, reversed(objects), strict=True)]
    if len(objects) == 2 and rng.random() < MISSING:
        del objects[rng.integers(2)]
    looks = []
    for drawn in objects:
        shift, colour = rng.uniform(-2, 2, 2), np.array(COLOURS[drawn.colour], dtype=np.float64)
        # Either flaw is the picture's, not each object's: two objects share its probability.
        if rng.random() < MISPLACED / len(objects):
            angle = rng.uniform(0, 2 * np.pi)
            shift = shift + rng.uniform(7, 15) * np.array([np.cos(angle), np.sin(angle)])
        if rng.random() < WRONG_COLOUR / len(objects):
            other = COLOURS[rng.choice([name for name in COLOURS if name != drawn.colour])]
            colour = colour + rng.uniform(0.4, 1.0) * (np.array(other) - colour)
        (x, y), (red, green, blue) = shift.tolist(), colour.tolist()
        looks.append(Look(shift=(x, y), scale=float(rng.uniform(0.93, 1.07)), colour=(red, green, blue)))
    clean = render(replace(scene, objects=tuple(objects)), looks)
    picture: Float[np.ndarray, "64 64 3"] = clean.astype(np.float32)
    if rng.random() < LOW_CONTRAST:
        grey = picture.mean()
        picture = grey + rng.uniform(0.3, 0.65) * (picture - grey)
    if rng.random() < BLURRED:
        picture = blur(picture, radius=rng.uniform(1.3, 3))
    if rng.random() < NOISY:
        picture = picture + rng.normal(0, rng.uniform(12, 30), picture.shape)
    return np.clip(np.round(picture), 0, 255).astype(np.uint8)


def foreign_look(
    picture: UInt8[np.ndarray, "64 64 3"], rng: np.random.Generator, *, strength: float
) -> UInt8[np.ndarray, "64 64 3"]:
    """The picture in a light from one side and with a hatching, which nothing in the training data has."""
    if not strength:
        return picture
    rows, columns = np.indices(picture.shape[:2]) / picture.shape[0] - 0.5
    light, hatching = rng.uniform(0, 2 * np.pi, 2)
    shade = 36 * (np.cos(light) * columns + np.sin(light) * rows)
    lines = 12 * np.sin(2 * np.pi * 11 * (np.cos(hatching) * columns + np.sin(hatching) * rows))
    changed = picture + strength * (shade + lines)[..., None]
    return np.clip(np.round(changed), 0, 255).astype(np.uint8)


def blur(picture: Float[np.ndarray, "64 64 3"], *, radius: float) -> Float[np.ndarray, "64 64 3"]:
    """Gaussian blur of an RGB picture with values 0 to 255; `radius` (standard deviation) in pixels."""
    image = Image.fromarray(np.clip(np.round(picture), 0, 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32)


def mixed_renders(count: int, *, seed: int) -> tuple[UInt8[np.ndarray, "picture 64 64 3"], list[str]]:
    """`count` pictures of drawn captions, and these."""
    rng = np.random.default_rng(seed)
    captions = draw_captions(count, rng)
    return np.stack([mixed_render(parse_caption(caption), rng) for caption in captions]), captions
