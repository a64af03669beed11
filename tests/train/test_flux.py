"""FLUX on the whole way: packing inside the call, a guidance that both stages are told, levels in half precision."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from PIL import Image

from inpo.common.cache import open_cache
from inpo.common.cache_settings import CacheSettings
from inpo.common.errors import CacheMismatch, UsageError
from inpo.common.families import FAMILIES
from inpo.common.models import open_model
from inpo.common.testing import save_tiny_pipeline
from inpo.inspection.drift import measure_drift
from inpo.inspection.verify import verify
from inpo.precompute.run import run_precompute
from inpo.precompute.settings import RayOptions


@pytest.fixture(scope="module", params=["flux", "flux-schnell"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("model") / request.param, request.param)


@pytest.fixture(scope="module")
def precompute(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    place = tmp_path_factory.mktemp("pairs")
    rows = []
    for row in range(3):
        for side in ("win", "lose"):
            pixels = np.random.default_rng(row).integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels if side == "win" else pixels[::-1]).save(place / f"{row}-{side}.png")
        rows.append({"win": f"{row}-win.png", "lose": f"{row}-lose.png", "prompt": "a red cat " * (row + 1)})
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def make(location: Path, model: Path | None = None, **settings: Any) -> str:
        settings = {"resolution": 48, "grid_points": 3, "timesteps_per_pair": 3, "decode_workers": 0, **settings}
        sections = ({"model": str(model or folder)}, {"pairs": str(place), "cache": str(location)}, settings)
        assert run_precompute(None, *sections, ray_options=RayOptions(), dry_run=False) == 0
        return str(location)

    return make


@pytest.fixture(scope="module")
def made(precompute: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return precompute(tmp_path_factory.mktemp("cache") / "c")


def has_guidance(folder: Path) -> bool:
    return "schnell" not in str(folder)


def velocity(pipeline: Any, guidance: float = 1.0) -> torch.Tensor:
    """As the pipeline asks for it, at two times."""
    embedding, pooled, ids = pipeline.encode_prompt(["a red cat", "the sky"], None, device="cpu")
    x = torch.randn(2, 36, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return pipeline.transformer(
            hidden_states=x,
            timestep=torch.tensor([0.12, 0.87]),
            guidance=torch.full((2,), guidance) if pipeline.transformer.config.guidance_embeds else None,
            encoder_hidden_states=embedding,
            pooled_projections=pooled,
            txt_ids=ids,
            img_ids=pipeline._prepare_latent_image_ids(2, 6, 6, "cpu", torch.float32),
        ).sample


@pytest.mark.parametrize("lora", [0, 2])
def test_what_is_trained_is_read_back_by_the_pipelines_own_loader(
    made: str, folder: Path, run: Callable[..., Path], lora: int
) -> None:
    output = run(
        model=str(folder),
        caches=[made],
        steps=2,
        learning_rate=1e-2,
        lora_rank=lora,
        beta=100.0,
        gradient_checkpointing=bool(lora),
    )
    base: Any = DiffusionPipeline.from_pretrained(folder)
    before = velocity(base)
    if lora:
        base.load_lora_weights(str(output / "lora"))
        after, held = velocity(base), {name for name, _ in base.transformer.named_parameters() if "lora_A" in name}
        assert any("add_q_proj" in name for name in held)
        assert any("single_transformer_blocks" in name for name in held)
        base.fuse_lora()
        torch.testing.assert_close(velocity(base), after, rtol=0, atol=1e-5)
    else:
        trained = DiffusionPipeline.from_pretrained(output / "pipeline")
        assert type(trained) is FluxPipeline
        after = velocity(trained)
    assert not torch.allclose(before, after, atol=1e-4)
    start = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
    assert start["loss"] == pytest.approx(np.log(2), abs=1e-5)


def test_the_cache_is_verified_and_inverted_again(made: str, folder: Path) -> None:
    model = open_model(str(folder))
    found = verify(made, model=model)
    assert found.findings == []
    assert max(found.reinverted.values()) < 1e-3
    assert measure_drift(made, model).verdict == "keep"


def test_embedded_guidance_is_identity(
    precompute: Callable[..., str], made: str, folder: Path, run: Callable[..., Path], tmp_path: Path
) -> None:
    manifest = open_cache(made).manifest
    if not has_guidance(folder):
        assert manifest.static == {}
        with pytest.raises(UsageError, match="no use"):
            precompute(tmp_path / "c", embedded_guidance=1.0)
        return
    assert manifest.static == {"embedded_guidance": 1.0}
    assert CacheSettings.of(manifest).embedded_guidance == 1.0
    with pytest.raises(CacheMismatch, match=r"static\.embedded_guidance"):
        precompute(Path(made), embedded_guidance=3.5)
    other = precompute(tmp_path / "other", embedded_guidance=3.5)
    with pytest.raises(CacheMismatch, match="static"):
        run(model=str(folder), caches=[made, other])
    # Both stages have it from the manifest: the zero-step proof holds for either, and the errors differ.
    run(model=str(folder), caches=[other], steps=1, lora_rank=2)
    errors = [next(iter(open_cache(each))).read("reference_error") for each in (made, other)]
    assert not np.allclose(*errors, rtol=1e-4)


def test_caches_of_other_families_are_refused(
    precompute: Callable[..., str], made: str, run: Callable[..., Path], tmp_path: Path
) -> None:
    other = save_tiny_pipeline(tmp_path / "sd3", "sd3")
    with pytest.raises(CacheMismatch):
        precompute(Path(made), other)
    with pytest.raises(CacheMismatch):
        run(model=str(other), caches=[made])
    with pytest.raises(CacheMismatch):
        measure_drift(made, open_model(str(other)))


# torch's, of the transformer's own norms under autocast
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_walks_levels_that_the_network_sees_exactly(
    precompute: Callable[..., str], tmp_path: Path, dtype: str
) -> None:
    times = FAMILIES["flux"].exact(dtype)
    assert times is not None
    seen = times.float().to(getattr(torch, dtype)) * 1000  # as the transformer does it
    assert seen.tolist() == (1000 * times).tolist()
    assert len(times) == 124
    if dtype == "bfloat16":
        manifest = open_cache(precompute(tmp_path / "c", dtype=dtype, inverter="ab2")).manifest
        assert set(manifest.levels.label) <= set(times.tolist())
        with pytest.raises(UsageError, match="one level"):
            precompute(tmp_path / "d", dtype=dtype, grid_points=300)
