"""Tiny models, a scorer from an installed package, folders of images with known scores."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.labelling import write_cache, write_source
from tests.light import save_light_pipeline

PLUGIN = """
import numpy as np

class RedScorer:
    '''Mean red value, 0..255: the picture decides, not the prompt.'''
    name = "red"
    preference_temperature = 50.0
    def score(self, images, prompts):
        return np.array([np.asarray(image)[..., 0].mean() for image in images], dtype=np.float64)

class DarkScorer(RedScorer):
    name = "dark"
    def score(self, images, prompts):
        return 255 - super().score(images, prompts)

class CoarseScorer(RedScorer):
    name = "coarse"
    def score(self, images, prompts):
        return super().score(images, prompts) // 100

class BlueScorer(RedScorer):
    name = "org/blue"

class WideScorer(RedScorer):
    name = "red*"

class ColdScorer(RedScorer):
    name = "cold"
    preference_temperature = 0

class HotScorer(RedScorer):
    name = "hot"
    preference_temperature = float("nan")

class WordyScorer(RedScorer):
    name = "wordy"
    preference_temperature = "1"

class MuteScorer:
    name = "mute"

class ShyScorer(RedScorer):
    name = "shy"
    def __init__(self):
        raise RuntimeError("no weights in this place")

class BrokenScorer:
    name = "broken"
    def score(self, images, prompts):
        return np.full(len(images), np.nan)

class FailingScorer:
    name = "failing"
    def score(self, images, prompts):
        raise KeyError("clip")
"""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_light_pipeline(tmp_path_factory.mktemp("models") / "base", seed=0)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_light_pipeline(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is not ours, as pip would leave it, with four scorers, and some that are none."""
    site = tmp_path / "site"
    info = site / "red_scorers-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "red_scorers.py").write_text(PLUGIN)
    (site / "raising_package.py").write_text("raise ValueError('no such device')")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: red-scorers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[inpo.scorers]\nred = red_scorers:RedScorer\nbroken = red_scorers:BrokenScorer\n"
        "failing = red_scorers:FailingScorer\n"
        "dark = red_scorers:DarkScorer\ncoarse = red_scorers:CoarseScorer\n"
        "org/blue = red_scorers:BlueScorer\nred* = red_scorers:WideScorer\nmute = red_scorers:MuteScorer\n"
        "cold = red_scorers:ColdScorer\nhot = red_scorers:HotScorer\nwordy = red_scorers:WordyScorer\n"
        "shy = red_scorers:ShyScorer\nraising = raising_package:Scorer\n"
        "alias = red_scorers:RedScorer\nlost = red_scorers:LostScorer\nabsent = no_such_package:Scorer\n"
    )
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, "red_scorers", raising=False)


def picture(red: int, size: int = 8) -> Image.Image:
    return Image.new("RGB", (size, size), (red, 40, 90))


@pytest.fixture(scope="session")
def save_images() -> Callable[..., Path]:
    """save_images(folder, reds, per_prompt=1): one-coloured images, by hand, with prompts p0, p1, ..."""

    def save(folder: Path, reds: Sequence[int], *, per_prompt: int = 1, seed: int = 0, size: int = 8) -> Path:
        (folder / "images").mkdir(parents=True)
        lines = []
        for index, red in enumerate(reds):
            picture(red, size).save(folder / "images" / f"{index}.png")
            prompt = f"prompt $ number {index // per_prompt} \u2028 ü"
            lines.append({"prompt": prompt, "seed": seed + index % per_prompt, "file": f"images/{index}.png"})
        (folder / "images.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return folder

    return save


class CountingScorer:
    """Mean red value; counts what it was asked."""

    name = "counting"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        self.asked += prompts
        return np.array([np.asarray(image)[..., 0].mean() for image in images], dtype=np.float64)


@pytest.fixture
def counting() -> CountingScorer:
    return CountingScorer()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "pairs")


@pytest.fixture
def cache(tmp_path: Path, source: Path) -> Path:
    return write_cache(tmp_path / "cache", source)
