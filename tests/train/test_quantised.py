"""A frozen base in 8 bits under LoRA: the cache is of the quantised network, and so is the run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from inpo.common import denoiser
from inpo.common.cache import open_cache
from inpo.common.errors import CacheMismatch, UsageError
from inpo.common.models import open_model
from inpo.common.testing import save_tiny_pipeline
from inpo.inspection.verify import verify
from inpo.precompute.run import run_precompute
from inpo.precompute.settings import RayOptions

KIND = "sd3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("model") / KIND, KIND)


@pytest.fixture(scope="module")
def precompute(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    place = tmp_path_factory.mktemp("pairs")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    for side, image in zip(("win", "lose"), pixels, strict=True):
        Image.fromarray(image).save(place / f"{side}.png")
    (place / "pairs.jsonl").write_text(json.dumps({"win": "win.png", "lose": "lose.png", "prompt": "a red cat"}))

    def make(location: Path, dtype: str) -> str:
        settings = {"resolution": 32, "grid_points": 3, "timesteps_per_pair": 3, "decode_workers": 0, "dtype": dtype}
        sections = ({"model": str(folder)}, {"pairs": str(place), "cache": str(location)}, settings)
        assert run_precompute(None, *sections, ray_options=RayOptions(), dry_run=False) == 0
        return str(location)

    return make


def rounded(folder: Path) -> dict[str, torch.Tensor]:
    """The linear layers' weights in 8 bits: for each row a scale, by which the largest is 127."""
    network: Any = open_model(str(folder)).load_network()
    changed = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear):
            scale = module.weight.detach().abs().amax(1, keepdim=True) / 127.5
            changed[name] = (module.weight.detach() / scale).round().clamp(-128, 127) * scale
    return changed


def test_cache_and_run_are_of_the_quantised_network(
    folder: Path, precompute: Callable[..., str], run: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("torchao")
    cache, plain = precompute(tmp_path / "int8", "float32-int8"), precompute(tmp_path / "plain", "float32")
    assert open_cache(cache).manifest.network_dtype == "float32-int8"
    errors = [next(iter(open_cache(each))).read("reference_error") for each in (cache, plain)]
    assert not np.allclose(*errors, rtol=1e-5)
    assert np.allclose(*errors, rtol=0.1)
    model = open_model(str(folder))
    network: Any = model.load_network()
    denoiser.prepare_for_inference(network, network_dtype="float32-int8", device=torch.device("cpu"))
    weights = rounded(folder)
    for name, wanted in weights.items():
        held = network.get_submodule(name).weight.dequantize()
        assert (held - wanted).abs().max() <= wanted.abs().max() / 100, name
    found = verify(cache, model=model)
    assert found.findings == []
    assert max(found.reinverted.values()) < 1e-3

    output = run(model=str(folder), caches=[cache], steps=2, learning_rate=1e-2, lora_rank=2, beta=100.0)
    start = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
    assert start["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert (output / "lora" / "pytorch_lora_weights.safetensors").is_file()
    with pytest.raises(CacheMismatch, match="network_dtype"):
        precompute(Path(cache), "float32")
    with pytest.raises(CacheMismatch, match="network_dtype"):
        run(model=str(folder), caches=[cache, plain], lora_rank=2)
    with pytest.raises(CacheMismatch, match="network_dtype float32-int8"):
        run(model=str(folder), caches=[cache], dtype="float32", lora_rank=2)
    with pytest.raises(UsageError, match="--lora-rank"):
        run(model=str(folder), caches=[cache])
    shutil.rmtree(output)


def test_the_package_that_quantises_is_named(
    precompute: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denoiser, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install torchao"):
        precompute(tmp_path / "c", "bfloat16-int8")
    assert not (tmp_path / "c").exists()
