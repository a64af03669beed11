"""The held-out scorer: a small CNN's log-probability of what the caption says.

It was trained on clean renders (toyworld/train_heldout.py) and never makes labels, so a model that learns to please the
oracle alone does not please it.
"""

import itertools
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from inpo.toyworld.backdrops import SIZE
from inpo.toyworld.scenes import ATTRIBUTES, parse_caption

WEIGHTS = Path(__file__).parent / "heldout.safetensors"
BATCH_SIZE = 128


class AttributeNet(nn.Module):
    """Reads the five attributes of a scene from its picture."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64)
        layers: list[nn.Module] = []
        for index, (narrow, wide) in enumerate(itertools.pairwise(widths)):
            stride = 1 if index == 0 else 2
            layers += [nn.Conv2d(narrow, wide, 3, stride=stride, padding=1), nn.GroupNorm(8, wide), nn.SiLU()]
        layers += [nn.Conv2d(widths[-1], 16, 3, stride=2, padding=1), nn.SiLU(), nn.Flatten()]
        self.body = nn.Sequential(*layers, nn.Linear(16 * 4 * 4, 96), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(96, len(words)) for name, words in ATTRIBUTES.items()})

    def forward(self, pictures: Float[Tensor, "picture 3 32 32"]) -> dict[str, Float[Tensor, "picture word"]]:
        """Log-probabilities of every attribute's words, for pictures with values from -1 to 1."""
        features = self.body(pictures)
        return {name: head(features).log_softmax(dim=-1) for name, head in self.heads.items()}


def attribute_indices(captions: Sequence[str]) -> Int[Tensor, "caption attribute"]:
    """Index of each caption's word for every attribute."""
    scenes = [parse_caption(caption) for caption in captions]
    return torch.tensor([[words.index(getattr(s, name)) for name, words in ATTRIBUTES.items()] for s in scenes])


def log_probability(
    net: AttributeNet, pictures: Float[Tensor, "picture 3 32 32"], attributes: Int[Tensor, "picture attribute"]
) -> Float[Tensor, "picture attribute"]:
    """Log-probability of each picture's given word, per attribute."""
    by_attribute = net(pictures)
    picked = [by_attribute[name].gather(1, attributes[:, [index]]) for index, name in enumerate(ATTRIBUTES)]
    return torch.cat(picked, dim=1)


@cache
def _trained_net() -> AttributeNet:
    net = AttributeNet()
    net.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    return net.eval()


class HeldoutScorer:
    """Log-probability (nats, at most 0) of the caption's five attributes, summed; higher is better."""

    name = "toyworld-heldout"

    @torch.inference_mode()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Float[np.ndarray, " image"]:
        """One number per image; UsageError for a prompt that is no caption of the toyworld."""
        attributes = attribute_indices(prompts)
        scores = np.empty(len(images), dtype=np.float64)
        for start in range(0, len(images), BATCH_SIZE):
            some = slice(start, start + BATCH_SIZE)
            pictures = np.stack([np.asarray(image.convert("RGB").resize((SIZE, SIZE))) for image in images[some]])
            tensor = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
            scores[some] = log_probability(_trained_net(), tensor, attributes[some]).sum(dim=1).double().numpy()
        return scores
