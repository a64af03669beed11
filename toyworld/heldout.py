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

from inpo.toyworld.backdrops import BACKDROPS, SIZE
from inpo.toyworld.scenes import OBJECT_ATTRIBUTES, PLACES, parse_caption

WEIGHTS = Path(__file__).parent / "heldout.safetensors"
BATCH_SIZE = 128


ABSENT = "absent"
PLACE_QUESTIONS: dict[str, tuple[str, ...]] = {
    "size": (ABSENT, *OBJECT_ATTRIBUTES["size"]),
    "colour": OBJECT_ATTRIBUTES["colour"],
    "shape": OBJECT_ATTRIBUTES["shape"],
}
"""What is asked of every place, with the possible answers; colour and shape only where there is an object."""
QUESTIONS = {
    **{f"{name} {place}": answers for place in PLACES for name, answers in PLACE_QUESTIONS.items()},
    "backdrop": tuple(BACKDROPS),
}
NOT_ASKED = -1


class AttributeNet(nn.Module):
    """Reads from a picture what lies at every place, and before which backdrop."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 32, 48, 32)
        layers: list[nn.Module] = []
        for narrow, wide in itertools.pairwise(widths):
            layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), nn.GroupNorm(8, wide), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 4 * 4, 128), nn.SiLU())
        self.head = nn.Linear(128, sum(map(len, QUESTIONS.values())))

    def forward(self, pictures: Float[Tensor, "picture 3 64 64"]) -> list[Float[Tensor, "picture _"]]:
        """Log-probabilities of every question's answers, for pictures with values from -1 to 1."""
        answers = self.head(self.body(pictures)).split([len(answers) for answers in QUESTIONS.values()], dim=1)
        return [each.log_softmax(dim=1) for each in answers]


def right_answers(captions: Sequence[str]) -> Int[Tensor, "caption question"]:
    """Index of the answer that each caption gives to every question, NOT_ASKED where there is none."""
    rows = []
    for caption in captions:
        scene = parse_caption(caption)
        told = {f"size {place}": ABSENT for place in PLACES} | {"backdrop": scene.backdrop}
        told |= {f"{name} {o.place}": getattr(o, name) for o in scene.objects for name in PLACE_QUESTIONS}
        rows.append([answers.index(told[name]) if name in told else NOT_ASKED for name, answers in QUESTIONS.items()])
    return torch.tensor(rows)


def log_probability(
    by_question: list[Float[Tensor, "picture _"]], right: Int[Tensor, "picture question"]
) -> Float[Tensor, "picture question"]:
    """Log-probability of each picture's right answers, 0 for what is not asked."""
    picked = [each.gather(1, right[:, [index]].clamp(min=0)) for index, each in enumerate(by_question)]
    return torch.cat(picked, dim=1) * (right != NOT_ASKED)


@cache
def _trained_net() -> AttributeNet:
    net = AttributeNet()
    net.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    return net.eval()


class HeldoutScorer:
    """Log-probability (nats, at most 0) of what the caption says of every place and the backdrop, summed; higher is
    better."""

    name = "toyworld-heldout"

    @torch.inference_mode()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Float[np.ndarray, " image"]:
        """One number per image; UsageError for a prompt that is no caption of the toyworld."""
        right = right_answers(prompts)
        scores = np.empty(len(images), dtype=np.float64)
        for start in range(0, len(images), BATCH_SIZE):
            some = slice(start, start + BATCH_SIZE)
            pictures = np.stack([np.asarray(image.convert("RGB").resize((SIZE, SIZE))) for image in images[some]])
            tensor = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
            scores[some] = log_probability(_trained_net()(tensor), right[some]).sum(dim=1).double().numpy()
        return scores
