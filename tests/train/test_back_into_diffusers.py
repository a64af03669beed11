"""From a user's images to diffusers' own pipeline classes: precompute, train, load, generate."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, PixArtSigmaPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from inpo.common.testing import save_tiny_pipeline
from inpo.precompute.run import run_precompute
from inpo.precompute.settings import RayOptions


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    """Three pairs as a user has them: image files of other sizes and a list."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    rows = []
    for row, size in enumerate([(40, 40), (64, 32), (32, 48)]):
        draw = np.random.default_rng(row)
        for side in ("win", "lose"):
            pixels = draw.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{row}-{side}.png")
        rows.append({"win": f"{row}-win.png", "lose": f"{row}-lose.png", "prompt": f"a red cat {row}", "id": str(row)})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' multistep scheduler
@pytest.mark.parametrize(
    ("kind", "pipeline_class", "prediction_type"),
    [
        ("sd15", StableDiffusionPipeline, "epsilon"),
        ("sd2-v", StableDiffusionPipeline, "v_prediction"),
        ("sdxl", StableDiffusionXLPipeline, "epsilon"),
        ("pixart-sigma", PixArtSigmaPipeline, "epsilon"),
    ],
)
def test_precompute_train_and_generate(
    pairs: str, run: Callable[..., Path], tmp_path: Path, kind: Any, pipeline_class: type, prediction_type: str
) -> None:
    model, cache = save_tiny_pipeline(tmp_path / "model", kind), str(tmp_path / "cache")
    settings = {"resolution": 32, "grid_points": 2, "timesteps_per_pair": 2, "measure_inversion": 0.0}
    settings["decode_workers"] = 0
    assert (
        run_precompute(
            None,
            {"model": str(model)},
            {"pairs": pairs, "cache": cache},
            settings,
            ray_options=RayOptions(),
            dry_run=False,
        )
        == 0
    )
    output = run(model=str(model), caches=[cache], steps=2, learning_rate=1e-3)
    trained: Any = DiffusionPipeline.from_pretrained(output / "pipeline")
    assert type(trained) is pipeline_class
    assert trained.scheduler.config.prediction_type == prediction_type
    base: Any = DiffusionPipeline.from_pretrained(model)
    network = "transformer" if kind == "pixart-sigma" else "unet"
    before, after = (getattr(each, network).state_dict() for each in (base, trained))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    trained.set_progress_bar_config(disable=True)
    own = {"use_resolution_binning": False, "clean_caption": False} if kind == "pixart-sigma" else {}
    (image,) = trained("a red cat", num_inference_steps=2, height=32, width=32, output_type="np", **own).images
    assert image.shape == (32, 32, 3)
    assert np.isfinite(image).all()
