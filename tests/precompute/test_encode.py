"""What makes latents of images: the VAE, and in which dtype."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from inpo.common.models import open_model
from inpo.precompute import encode
from inpo.precompute.components import Components
from inpo.precompute.configuration import build_manifest
from inpo.precompute.settings import PrecomputeSettings


def _with_vae_config(pipeline: Path, folder: Path, force_upcast: bool | None) -> Path:
    """A copy of a pipeline whose VAE says so; None: it says nothing, like those saved before there was a word for
    it.
    """
    shutil.copytree(pipeline, folder)
    file = folder / "vae" / "config.json"
    config = json.loads(file.read_text())
    config.pop("force_upcast", None)
    file.write_text(json.dumps(config | ({} if force_upcast is None else {"force_upcast": force_upcast})))
    return folder


@pytest.mark.parametrize(
    ("force_upcast", "dtype", "expected"),
    [
        (True, "bfloat16", "float32"),
        (None, "bfloat16", "float32"),
        (False, "bfloat16", "bfloat16"),
        (False, "float16", "float16"),
        (False, "float32", "float32"),
    ],
)
def test_the_vae_is_in_float32_unless_its_configuration_says_otherwise(
    pipelines: Callable, tmp_path: Path, force_upcast: bool | None, dtype: str, expected: str
) -> None:
    model = open_model(str(_with_vae_config(pipelines("sdxl"), tmp_path / "model", force_upcast)))
    manifest = build_manifest(PrecomputeSettings(resolution=32, dtype=dtype), model, device_type="cpu")
    assert manifest.vae_dtype == expected


def test_a_replacement_vae_speaks_for_itself(pipelines: Callable, tmp_path: Path) -> None:
    """The repaired SDXL VAE beside a model whose own VAE needs float32."""
    repaired = _with_vae_config(pipelines("sdxl"), tmp_path / "repaired", False)
    model = open_model(str(pipelines("sdxl")), vae=str(repaired / "vae"))
    manifest = build_manifest(PrecomputeSettings(resolution=32, dtype="bfloat16"), model, device_type="cpu")
    assert manifest.vae_dtype == "bfloat16"


def test_the_vae_of_a_bfloat16_run_computes_in_float32(
    pipelines: Callable, examples: Callable, write_tars: Callable, run: Callable, tmp_path: Path, by_id: Callable
) -> None:
    """The dtype in which its last layer ran, and latents bit for bit those of a float32 run; with `force_upcast: false`
    the same layer runs in bfloat16."""
    source = write_tars(tmp_path / "pairs", examples(2), 2)
    ran: list[torch.dtype] = []

    def watch(components: Components) -> None:
        layer = components.images.vae.quant_conv
        layer.register_forward_hook(lambda module, inputs, output: ran.append(output.dtype))

    run.prepare = watch
    settings = {"grid_points": 1, "timesteps_per_pair": 1}
    single = by_id(run.cache(source, pipelines("sdxl"), tmp_path / "a", dtype="float32", **settings), "x0")
    mixed = by_id(run.cache(source, pipelines("sdxl"), tmp_path / "b", dtype="bfloat16", **settings), "x0")
    assert set(ran) == {torch.float32}
    for pair_id, x0 in single.items():
        np.testing.assert_array_equal(mixed[pair_id], x0)
    ran.clear()
    repaired = _with_vae_config(pipelines("sdxl"), tmp_path / "repaired", False)
    half = by_id(run.cache(source, repaired, tmp_path / "c", dtype="bfloat16", **settings), "x0")
    assert set(ran) == {torch.bfloat16}
    for pair_id, x0 in single.items():
        assert 0 < np.abs(half[pair_id].astype(float) - x0).max() < 0.05 * np.abs(x0.astype(float)).max()


@pytest.mark.parametrize("size", [(32, 64), (64, 32)])
def test_high_and_wide_images_go_through_the_vae_in_equal_numbers(
    pipelines: Callable, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    """As many as have the pixels that go together, which is what `inpo plan` counts."""
    monkeypatch.setattr(encode, "_PIXELS_PER_VAE_CALL", 3 * 32 * 64)
    model, seen = open_model(str(pipelines())), []
    vae = model.load_vae()
    vae.quant_conv.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    encoder = encode.ImageEncoder(
        vae, model.family, vae_dtype="float32", sample=False, seed=0, device=torch.device("cpu")
    )
    encoder([np.zeros((3, *size), np.uint8)] * 7, [str(number) for number in range(7)])
    assert seen == [3, 3, 1]
    assert encode.images_per_vae_call(*size) == 3
