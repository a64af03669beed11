"""Pictures of mixed quality under right captions, as in data gathered from the web.

The base model learns from these, so it makes good and bad images for one prompt, and a preference has something to
prefer. Every flaw comes with its own probability, independently of the others; about two pictures in five have none.
"""

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageFilter

from inpo.toyworld.scenes import COLOURS, Scene, render, scenes_by_caption

MISPLACED = 0.15
WRONG_COLOUR = 0.15
LOW_CONTRAST = 0.15
BLURRED = 0.18
NOISY = 0.15


def mixed_render(scene: Scene, rng: np.random.Generator) -> UInt8[np.ndarray, "32 32 3"]:
    """One picture of the scene with whatever flaws the generator draws."""
    shift, colour = rng.uniform(-1, 1, 2), np.array(COLOURS[scene.colour], dtype=np.float64)
    if rng.random() < MISPLACED:
        angle = rng.uniform(0, 2 * np.pi)
        shift = shift + rng.uniform(4, 9) * np.array([np.cos(angle), np.sin(angle)])
    if rng.random() < WRONG_COLOUR:
        other = COLOURS[rng.choice([name for name in COLOURS if name != scene.colour])]
        colour = colour + rng.uniform(0.4, 1.0) * (np.array(other) - colour)
    red, green, blue = (int(channel) for channel in np.round(colour))
    picture: Float[np.ndarray, "32 32 3"] = render(
        scene, shift=(float(shift[0]), float(shift[1])), scale=float(rng.uniform(0.93, 1.07)), colour=(red, green, blue)
    ).astype(np.float32)
    if rng.random() < LOW_CONTRAST:
        grey = picture.mean()
        picture = grey + rng.uniform(0.3, 0.65) * (picture - grey)
    if rng.random() < BLURRED:
        picture = blur(picture, radius=rng.uniform(0.8, 1.7))
    if rng.random() < NOISY:
        picture = picture + rng.normal(0, rng.uniform(12, 30), picture.shape)
    return np.clip(np.round(picture), 0, 255).astype(np.uint8)


def blur(picture: Float[np.ndarray, "32 32 3"], *, radius: float) -> Float[np.ndarray, "32 32 3"]:
    """Gaussian blur of an RGB picture with values 0 to 255; `radius` (standard deviation) in pixels."""
    image = Image.fromarray(np.clip(np.round(picture), 0, 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32)


def mixed_renders(count: int, *, seed: int) -> tuple[UInt8[np.ndarray, "picture 32 32 3"], Int[np.ndarray, " picture"]]:
    """`count` pictures over all captions in turn, with the index of each one's caption in `scenes_by_caption`."""
    scenes = list(scenes_by_caption().values())
    caption_index = np.arange(count) % len(scenes)
    rng = np.random.default_rng(seed)
    return np.stack([mixed_render(scenes[index], rng) for index in caption_index]), caption_index
