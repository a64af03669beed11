"""What must be right on a GPU, on tiny worlds. The same bodies run on a CPU, so that they stay true where no GPU is."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from inpo.common.cache import Cache, open_cache
from inpo.common.tensor_watch import TensorWatch
from inpo.common.testing import save_tiny_pipeline
from inpo.precompute.run import run_precompute
from inpo.precompute.settings import RayOptions
from inpo.train.run import run_train


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the stages compute in this test."""
    if request.param == "cpu":
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    elif not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("model") / "sd15", "sd15")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six pairs of smooth random images."""
    folder, random = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    lines = []
    for number in range(6):
        names = {side: f"{number}.{side}.png" for side in ("win", "lose")}
        for name in names.values():
            coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(folder / name)
        lines.append(json.dumps(names | {"prompt": ("a red cat", "a blue dog")[number % 2], "id": f"pair-{number}"}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


@pytest.fixture
def precompute(model: Path, pairs: str, device: torch.device, tmp_path: Path) -> Callable[..., Cache]:
    """precompute(name, **settings): a cache in bfloat16, made on the test's device."""

    def make(name: str, **flags: Any) -> Cache:
        settings = {
            "resolution": 32,
            "grid_points": 4,
            "timesteps_per_pair": 2,
            "batch_size": 3,
            "decode_workers": 0,
            "measure_inversion": 0.0,
            "dtype": "bfloat16",
            "compile": "off",
        } | flags
        told = {"model": str(model)}, {"pairs": pairs, "cache": str(tmp_path / name)}, settings
        assert run_precompute(None, *told, ray_options=RayOptions(), dry_run=False) == 0
        return open_cache(str(tmp_path / name))

    return make


@pytest.fixture
def train(model: Path, tmp_path: Path) -> Callable[..., Path]:
    """train(name, cache, **settings): train in this process; the run's folder."""
    from accelerate.state import AcceleratorState

    def call(name: str, cache: Cache, *, resume: str = "auto", **flags: Any) -> Path:
        settings = {
            "output": tmp_path / name,
            "steps": 4,
            "batch_size": 2,
            "log_every": 2,
            "save_every": 2,
            "held_out": 0.0,
            "tracker": "none",
            "learning_rate": 1e-4,
            "compile": "off",
        } | flags
        AcceleratorState._reset_state(reset_partial_state=True)
        assert run_train(None, {"model": str(model)}, [cache.location], settings, resume=resume) == 0
        return tmp_path / name

    return call


@pytest.fixture
def no_waits(device: torch.device) -> Callable[[], Any]:
    """no_waits(): inside, the CPU must not wait for a number of the device."""

    @contextmanager
    def guarded() -> Iterator[None]:
        if device.type == "cuda":
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode(before)
            return
        with TensorWatch() as watch:
            yield
        assert not watch.waits

    return guarded
