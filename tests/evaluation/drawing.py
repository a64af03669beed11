"""Images of a tiny model, made by `generate`, and their pixels."""

from pathlib import Path

import numpy as np

from inpo.common.models import open_model
from inpo.evaluation.generate import GenerateReport, generate
from inpo.evaluation.image_folder import ImageFolder
from inpo.evaluation.settings import EvaluateSettings

PROMPTS = ["a red cat", "a blue dog", "the sky"]


def make(model: Path, out: Path, prompts: list[str] = PROMPTS, **settings: object) -> GenerateReport:
    return generate(open_model(str(model)), prompts, EvaluateSettings(inference_steps=2, **settings), out)


def pixels(folder: Path) -> dict[tuple[str, int], np.ndarray]:
    images = ImageFolder(folder)
    return {entry.key: np.asarray(images.open(entry)).astype(int) for entry in images.entries}


def same(first: dict, second: dict) -> bool:
    """Equal keys and images, but for a rounding of one grey level that another batch size may bring."""
    return first.keys() == second.keys() and all(abs(first[key] - second[key]).max() <= 1 for key in first)
