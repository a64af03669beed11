"""The last samples of a sweep's runs against the reference's at the same prompts and seeds, by scorers."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from inpo.common.denoiser import prepare_for_inference
from inpo.common.log import note
from inpo.common.processes import processes
from inpo.common.scorer import Scorer, alike, checked_scores
from inpo.train.configuration import Resolved
from inpo.train.samples import drawn_with, sample_images, sample_prompts


@dataclass(frozen=True, kw_only=True)
class SampleScore:
    """How a run's last samples stand against the reference's."""

    win_rate: float
    """Share of the prompts whose sample scores higher; a tie counts half."""
    mean: float
    reference_mean: float
    num_prompts: int


def last_sample(output: Path) -> Path | None:
    """The newest sample image of a run: all prompts side by side."""
    return max((output / "samples").glob("step-*.png"), default=None)


class SampleJudge:
    """Scores the reference's samples first, so that a scorer that cannot judge says so before anything is trained."""

    def __init__(self, scorers: Sequence[Scorer], runs: Mapping[str, Resolved]) -> None:
        self._scorers = scorers
        self._runs = runs
        self._reference: dict[tuple[Any, ...], dict[str, np.ndarray]] = {}
        for run in runs.values() if scorers else ():
            prompts = sample_prompts(run.settings, run.caches)
            if _key(run, prompts) not in self._reference:
                self._reference[_key(run, prompts)] = self._score(_of_reference(run, prompts), prompts)

    def compare(self, among: Collection[str]) -> dict[str, dict[str, SampleScore]]:
        """{run: {scorer: how its last samples stand}} of the runs `among` all; one without a sample of a trained
        network, or with one that cannot be read or was drawn otherwise than the reference's, is left out. Raises what
        `checked_scores` does."""
        found: dict[str, dict[str, SampleScore]] = {}
        for name, run in self._runs.items() if self._scorers else ():
            if name not in among:
                continue
            file, prompts = last_sample(run.output), sample_prompts(run.settings, run.caches)
            if file is None or file.stem == "step-00000000":
                continue
            try:
                with Image.open(file) as strip:
                    drawn, pixels = dict(strip.info), np.asarray(strip.convert("RGB"))
            except Exception as error:  # decoders fail on damaged bytes with any exception
                note(f"{file} cannot be read: it is not compared ({error})")
                continue
            if (told := drawn_with(prompts, run.settings)) != {name: drawn.get(name) for name in told}:
                note(f"{file} was drawn with other prompts, steps, guidance or seed: it is not compared")
                continue
            scores = self._score(_apart(pixels, len(prompts)), prompts)
            reference = self._reference[_key(run, prompts)]
            found[name] = {
                scorer: SampleScore(
                    win_rate=float(np.where(alike(score, reference[scorer]), 0.5, score > reference[scorer]).mean()),
                    mean=float(score.mean()),
                    reference_mean=float(reference[scorer].mean()),
                    num_prompts=len(prompts),
                )
                for scorer, score in scores.items()
            }
        return found

    def _score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, np.ndarray]:
        names = [f"the sample of {prompt[:80]!r}" for prompt in prompts]
        return {each.name: np.array(checked_scores(each, images, prompts, names)) for each in self._scorers}


def _key(run: Resolved, prompts: Sequence[str]) -> tuple[Any, ...]:
    """What decides the reference's samples."""
    settings = run.settings
    return (tuple(prompts), settings.sample_steps, settings.sample_guidance, settings.seed)


def _of_reference(run: Resolved, prompts: Sequence[str]) -> list[Image.Image]:
    manifest = run.caches[0].manifest
    network = run.model.load_network()
    prepare_for_inference(network, network_dtype=manifest.network_dtype, device=torch.device(processes().device))
    return _apart(sample_images(network, run.model, prompts, manifest, run.settings), len(prompts))


def _apart(strip: np.ndarray, count: int) -> list[Image.Image]:
    """The images that stand side by side."""
    return [Image.fromarray(np.ascontiguousarray(each)) for each in np.split(strip, count, axis=1)]
