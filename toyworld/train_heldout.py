"""Trains the held-out scorer on clean renders with a little noise, blur and contrast as augmentation."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from inpo.toyworld.heldout import AttributeNet, attribute_indices, log_probability
from inpo.toyworld.mixed_quality import blur
from inpo.toyworld.scenes import Scene, render, scenes_by_caption
from inpo.toyworld.stages import StageSettings

SETTINGS = StageSettings(steps=450, batch_size=128, learning_rate=3e-3)
CONFIDENCE = 0.9
"""The true word's share of the training target, so that a log-probability stays bounded and calibrated."""


def augmented_render(scene: Scene, rng: np.random.Generator) -> Float[np.ndarray, "32 32 3"]:
    """A clean render, jittered by a pixel, with light blur or noise; values from -1 to 1."""
    shift = rng.uniform(-1.3, 1.3, 2)
    picture: np.ndarray = render(scene, shift=(float(shift[0]), float(shift[1])), scale=float(rng.uniform(0.92, 1.08)))
    picture = picture.astype(np.float32)
    if rng.random() < 0.3:
        picture = blur(picture, radius=rng.uniform(0.2, 0.8))
    if rng.random() < 0.5:
        picture = picture + rng.normal(0, rng.uniform(2, 10), picture.shape)
    return (picture / 127.5 - 1).astype(np.float32)


class HeldoutTraining(nn.Module):
    """Cross-entropy of every attribute with softened targets."""

    def __init__(self) -> None:
        super().__init__()
        self.net = AttributeNet()

    def forward(
        self, pictures: Float[Tensor, "picture 3 32 32"], attributes: Int[Tensor, "picture attribute"]
    ) -> Tensor:
        right = -log_probability(self.net, pictures, attributes).mean()
        any_word = -torch.stack([logs.mean() for logs in self.net(pictures).values()]).mean()
        return CONFIDENCE * right + (1 - CONFIDENCE) * any_word


def draw_batch(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    captions = list(scenes_by_caption())
    picked = [captions[int(i)] for i in torch.randint(len(captions), (count,), generator=generator)]
    rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
    scenes = scenes_by_caption()
    pictures = np.stack([augmented_render(scenes[caption], rng) for caption in picked])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), attribute_indices(picked)
