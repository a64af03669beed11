"""Whole sampling runs in this process, with a scorer of the test's own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import inpo.common.scorer as scorers
import inpo.precompute.worker as precompute_worker
from inpo.common.cache import Cache, open_cache
from inpo.precompute.components import Components
from inpo.precompute.settings import RayOptions
from inpo.rounds.sample import configure_sample, run_sample
from tests.precompute.conftest import pipelines  # noqa: F401  (a fixture)

PROMPTS = ("a red cat", "a blue dog on the house", "photo of the sky", "green house")


@dataclass
class Brightness:
    """A scorer: the mean of red. `told` may answer in its place."""

    name: str = "brightness"
    told: Callable[[Sequence[str]], list[float]] | None = None
    batches: list[int] = field(default_factory=list)

    def score(self, images: Sequence[Any], prompts: Sequence[str]) -> np.ndarray:
        self.batches.append(len(images))
        if self.told is not None:
            return np.array(self.told(prompts))
        return np.array([np.asarray(image, dtype=np.float64)[..., 0].mean() for image in images])


@pytest.fixture
def scorer(monkeypatch: pytest.MonkeyPatch) -> Brightness:
    made = Brightness()

    class Entry:
        name = made.name

        def load(self) -> Callable[[], Brightness]:
            return lambda: made

    monkeypatch.setattr(scorers, "entry_points", lambda group: [Entry()])
    return made


@dataclass
class Samples:
    """Runs `inpo sample` in this process and keeps the components of each run, for counting."""

    prompts: Path
    components: list[Components]

    def __call__(self, model: Path, cache: Path, **flags: Any) -> int:
        settings = {
            "prompts": str(self.prompts),
            "scorer": "brightness",
            "per_prompt": 2,
            "resolution": "32",
            "inference_steps": 3,
            "guidance": 2.0,
            "timesteps_per_pair": 2,
            "batch_size": 4,
            **flags,
        }
        resolved = configure_sample(None, {"model": str(model)}, {"cache": str(cache)}, settings)
        return run_sample(resolved, None, ray_options=RayOptions(), dry_run=False)

    def cache(self, model: Path, cache: Path, **flags: Any) -> Cache:
        """Run, expect success, and open the cache."""
        assert self(model, cache, **flags) == 0
        return open_cache(str(cache))

    @property
    def network_calls(self) -> int:
        return sum(each.denoiser.num_calls for each in self.components)


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch, scorer: Brightness, tmp_path: Path) -> Samples:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    runs = Samples(prompts=prompts, components=[])
    load = precompute_worker.load_components

    def watched(*arguments: Any) -> Components:
        components = load(*arguments)
        runs.components.append(components)
        return components

    monkeypatch.setattr(precompute_worker, "load_components", watched)
    return runs
