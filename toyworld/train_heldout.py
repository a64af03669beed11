"""Trains the held-out scorer on clean renders with a little noise, blur and contrast as augmentation."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from inpo.toyworld.heldout import NOT_ASKED, AttributeNet, log_probability, right_answers
from inpo.toyworld.mixed_quality import blur
from inpo.toyworld.scenes import Look, Scene, draw_captions, parse_caption, render
from inpo.toyworld.stages import StageSettings

SETTINGS = StageSettings(steps=400, batch_size=128, learning_rate=3e-3, matrix_rate=0.02)
CONFIDENCE = 0.9
"""The true answer's share of the training target, so that a log-probability stays bounded and calibrated."""


def augmented_render(scene: Scene, rng: np.random.Generator) -> Float[np.ndarray, "64 64 3"]:
    """A clean render, jittered by a few pixels, with light blur or noise; values from -1 to 1."""
    looks = []
    for _ in scene.objects:
        x, y = rng.uniform(-2.6, 2.6, 2).tolist()
        looks.append(Look(shift=(x, y), scale=float(rng.uniform(0.92, 1.08))))
    picture: np.ndarray = render(scene, looks).astype(np.float32)
    if rng.random() < 0.3:
        picture = blur(picture, radius=rng.uniform(0.3, 1.4))
    if rng.random() < 0.5:
        picture = picture + rng.normal(0, rng.uniform(2, 10), picture.shape)
    return (picture / 127.5 - 1).astype(np.float32)


class HeldoutTraining(nn.Module):
    """Cross-entropy of every question asked, with softened targets."""

    def __init__(self) -> None:
        super().__init__()
        self.net = AttributeNet()

    def forward(self, pictures: Float[Tensor, "picture 3 64 64"], right: Int[Tensor, "picture question"]) -> Tensor:
        by_question, asked = self.net(pictures), right != NOT_ASKED
        any_answer = torch.stack([logs.mean(dim=1) for logs in by_question], dim=1) * asked
        softened = CONFIDENCE * log_probability(by_question, right) + (1 - CONFIDENCE) * any_answer
        return -softened.sum() / asked.sum()


def draw_batch(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Pictures and the right answers of their captions, drawn anew."""
    rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
    captions = draw_captions(count, rng)
    pictures = np.stack([augmented_render(parse_caption(caption), rng) for caption in captions])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), right_answers(captions)
