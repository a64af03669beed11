"""The single file in the original layout, judged by diffusers' own loader."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

from inpo.common.errors import StorageError, UsageError
from inpo.common.models import open_model
from inpo.common.testing import save_tiny_pipeline
from inpo.train.export import export_single_file


@pytest.mark.parametrize("kind", ["sd15", "sd2-v", "sdxl"])
def test_single_file_loads_back_equal(make_world: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    folder = make_world(kind).model.folder
    file = export_single_file(folder, tmp_path / "one.safetensors", dtype="float32")
    cls = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    extra = {} if kind == "sdxl" else {"safety_checker": None, "requires_safety_checker": False}
    original = cls.from_pretrained(folder, **extra)
    loaded = cls.from_single_file(str(file), config=str(folder), **extra)
    components = ["unet", "vae", "text_encoder", *(["text_encoder_2"] if kind == "sdxl" else [])]
    for name in components:
        expected, got = getattr(original, name).state_dict(), getattr(loaded, name).state_dict()
        assert expected.keys() == got.keys()
        for key, value in expected.items():
            assert torch.equal(value, got[key]), f"{name}.{key}"


def test_the_libraries_say_nothing_over_a_whole_file(make_world: Callable[..., Any], tmp_path: Path) -> None:
    """They warn of weights "that should be kept in float32: []" where float32 is cast to float32."""
    folder = make_world("sdxl").model.folder
    file = export_single_file(folder, tmp_path / "one.safetensors", dtype="float32")
    model = open_model(str(file), model_config=str(folder))
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("diffusers").addHandler(handler)
    try:
        model.load_pipeline()
    finally:
        logging.getLogger("diffusers").removeHandler(handler)
    assert said == []


def test_open_clip_text_encoder_gets_its_own_names(tmp_path: Path) -> None:
    """SD 2.x's text encoder: activation gelu, projections packed into in_proj."""
    folder = save_tiny_pipeline(tmp_path / "model", "sd2-v")
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"quick_gelu"', '"gelu"'))
    file = export_single_file(folder, tmp_path / "one.safetensors", dtype="float32")
    names = load_file(file)
    assert names["cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"].shape == (96, 32)
    assert not any(name.startswith("cond_stage_model.transformer.") for name in names)
    loaded = StableDiffusionPipeline.from_single_file(
        str(file), config=str(folder), safety_checker=None, requires_safety_checker=False
    )
    original = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    for key, value in original.text_encoder.state_dict().items():
        assert torch.equal(value, loaded.text_encoder.state_dict()[key]), key


def test_names_of_the_real_layout(make_world: Callable[..., Any], tmp_path: Path) -> None:
    """Spot checks against names as Stable Diffusion 1.5's checkpoint has them (first blocks: equal in every size)."""
    file = export_single_file(make_world("sd15").model.folder, tmp_path / "one.safetensors", dtype="float16")
    tensors = load_file(file)
    assert {
        "model.diffusion_model.time_embed.0.weight",
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.input_blocks.1.0.in_layers.0.weight",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight",
        "model.diffusion_model.middle_block.1.proj_in.weight",
        "model.diffusion_model.out.2.bias",
        "first_stage_model.encoder.down.0.block.0.norm1.weight",
        "first_stage_model.decoder.mid.attn_1.q.weight",
        "first_stage_model.quant_conv.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
    } <= tensors.keys()
    assert {value.dtype for value in tensors.values()} == {torch.float16}


def test_the_space_is_looked_at_first(
    make_world: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth less than the file takes is refused before anything is written."""
    folder, file = make_world("sd15").model.folder, tmp_path / "out/one.safetensors"
    size = export_single_file(folder, tmp_path / "whole.safetensors", dtype="float16").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size * 9 // 10))
    with pytest.raises(StorageError, match="too small for this file"):
        export_single_file(folder, file, dtype="float16")
    assert not file.parent.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size))
    assert export_single_file(folder, file, dtype="float16").stat().st_size == size


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to export here"):
        export_single_file(tmp_path, tmp_path / "one.safetensors", dtype="float16")
    with pytest.raises(UsageError, match="written as safetensors"):
        export_single_file(tmp_path, tmp_path / "one.ckpt", dtype="float16")
    with pytest.raises(UsageError, match=r"--single-file model\.safetensors"):
        export_single_file(tmp_path, Path("."), dtype="float16")
