"""Real tiny pipelines, pairs made here with Pillow and tarfile, and whole precompute runs in this process."""

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import inpo.precompute.phases as phases
import inpo.precompute.worker as precompute_worker
from inpo.common.cache import ARRAYS, Cache, open_cache
from inpo.precompute.components import Components
from inpo.precompute.encode import TextEncoder
from inpo.precompute.run import run_precompute
from inpo.precompute.settings import RayOptions
from tests.light import LIGHT, save_light_pipeline
from tests.rounding import record_bounds, rms

WORDS = ("a red cat", "a blue dog on the house", "photo of the sky", "green house")


@dataclass(frozen=True)
class Example:
    """One pair as the test made it."""

    pair_id: str
    prompt: str
    win: np.ndarray
    lose: np.ndarray


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """pipelines(kind="light"): a tiny pipeline folder, made once."""
    made: dict[str, Path] = {}

    def build(kind: str = LIGHT) -> Path:
        if kind not in made:
            made[kind] = save_light_pipeline(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return build


@pytest.fixture(scope="session")
def examples() -> Callable[..., list[Example]]:
    """examples(n, size=(32, 32)): smooth random images, win and lose different, prompts in turn."""

    def build(count: int, size: tuple[int, int] = (32, 32), first: int = 0) -> list[Example]:
        made = []
        for index in range(first, first + count):
            random = np.random.default_rng(index)
            sides = []
            for _ in range(2):
                coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
                sides.append(np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)))
            made.append(Example(f"pair-{index:03d}", WORDS[index % len(WORDS)], sides[0], sides[1]))
        return made

    return build


@pytest.fixture(scope="session")
def write_tars() -> Callable[..., str]:
    """write_tars(folder, pairs, per_tar): our own layout, numbered tars. Returns the source's location."""

    def build(folder: Path, pairs: list[Example], per_tar: int) -> str:
        folder.mkdir(parents=True, exist_ok=True)
        for number, start in enumerate(range(0, len(pairs), per_tar)):
            with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
                for pair in pairs[start : start + per_tar]:
                    members = {
                        "win.png": png(pair.win),
                        "lose.png": png(pair.lose),
                        "json": json.dumps({"id": pair.pair_id, "prompt": pair.prompt, "label": 1.0}).encode(),
                    }
                    for suffix, data in members.items():
                        info = tarfile.TarInfo(f"{pair.pair_id}.{suffix}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
        return str(folder)

    return build


@pytest.fixture
def tars(examples: Callable[..., list[Example]], write_tars: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """tars(count, per_tar): a source of so many pairs of the test's own."""
    return lambda count, per_tar: write_tars(tmp_path / "pairs", examples(count), per_tar)


@dataclass
class Runs:
    """Runs precompute in this process and keeps the components of each run, for counting or breaking them."""

    components: list[Components]
    prepare: Callable[[Components], None] | None = None
    encoded: list[str] = field(default_factory=list)
    """Every prompt that a text encoder was asked for."""
    embeddings: dict[str, torch.Tensor] = field(default_factory=dict)
    """What it gave for each."""
    prepare_texts: Callable[[TextEncoder], None] | None = None

    def __call__(
        self, pairs: str, model: Path, cache: Path, *, dry_run: bool = False, allow_remote: bool = False, **flags: Any
    ) -> int:
        settings = {
            "resolution": 32,
            "grid_points": 3,
            "timesteps_per_pair": 3,
            "batch_size": 4,
            "decode_workers": 0,
            "measure_inversion": 0.0,
            **flags,
        }
        return run_precompute(
            None,
            {"model": str(model)},
            {"pairs": pairs, "cache": str(cache), "allow_remote": allow_remote},
            settings,
            ray_options=RayOptions(),
            dry_run=dry_run,
        )

    def cache(self, pairs: str, model: Path, cache: Path, **flags: Any) -> Cache:
        """Run, expect success, and open the cache."""
        assert self(pairs, model, cache, **flags) == 0
        return open_cache(str(cache))

    @property
    def network_calls(self) -> int:
        return sum(each.denoiser.num_calls for each in self.components)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """run(pairs, model, cache, **settings) -> exit code; run.cache(...) -> the opened cache."""
    runs = Runs(components=[])
    load = precompute_worker.load_components

    def watched(*arguments: Any) -> Components:
        components = load(*arguments)
        if runs.prepare is not None:
            runs.prepare(components)
        runs.components.append(components)
        return components

    class Watched(TextEncoder):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            if runs.prepare_texts is not None:
                runs.prepare_texts(self)

        def __call__(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
            runs.encoded.extend(prompts)
            told = super().__call__(prompts)
            runs.embeddings.update(zip(prompts, told["embedding"], strict=True))
            return told

    monkeypatch.setattr(precompute_worker, "load_components", watched)
    monkeypatch.setattr(phases, "TextEncoder", Watched)
    return runs


@pytest.fixture(scope="session")
def by_id() -> Callable[[Cache, str], dict[str, np.ndarray]]:
    """by_id(cache, array): {pair id: its row}, whatever the sharding; of an image array [side, ...], of a group's its
    row.
    """

    def read(cache: Cache, path: str) -> dict[str, np.ndarray]:
        owner = {spec.path: spec.axes[0] for spec in (*ARRAYS, *cache.manifest.arrays)}[path]
        rows: dict[str, np.ndarray] = {}
        for shard in cache:
            of_pair = {"image": shard.sides, "group": shard.groups, "pair": lambda: slice(None)}[owner]()
            rows.update(zip(map(str, shard.read("pair/id")), shard.read(path)[of_pair], strict=True))
        return rows

    return read


LATENTS = ("x_t", "delta", "x0_t", "target")


def assert_same_but_for_rounding(first: Cache, second: Cache, by_id: Callable) -> None:
    """Every record of two caches of the same pairs, each tensor within its own bound (tests/rounding.py)."""
    left, right = (
        {name: by_id(cache, name) for name in (*LATENTS, "x0", "reference_error")} for cache in (first, second)
    )
    levels = first.manifest.levels
    for pair_id, timesteps in by_id(first, "timestep").items():
        for step, t in enumerate(timesteps):
            one, other = (
                {name: each[name][pair_id][:, step] for name in (*LATENTS, "reference_error")} for each in (left, right)
            )
            one["x0"], other["x0"] = left["x0"][pair_id], right["x0"][pair_id]
            bounds = record_bounds(one, a=levels.signal[t], s=levels.noise[t])
            for name, bound in bounds.items():
                apart = rms(one[name].astype(float) - other[name]) / rms(one[name])
                assert apart < bound, (name, pair_id, t, apart, bound)
