"""What the end of a run needs is tried before its first step."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from inpo.common.errors import ModelError, StorageError, UsageError
from inpo.common.models import open_model


@pytest.fixture
def broken(world: Any, tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """A model in which a part lacks a weight, or is no JSON, and a cache that names its parts as they are."""

    def make(part: str) -> dict[str, Any]:
        folder = shutil.copytree(world.model.folder, tmp_path / "model")
        for file in (folder / part).glob("*.safetensors"):
            weights = load_file(file)
            del weights[sorted(weights)[0]]
            save_file(weights, file, metadata={"format": "pt"})
        if part == "tokenizer":
            (folder / part / "tokenizer.json").write_text("{")
        cache = type(world)(model=open_model(str(folder))).cache(tmp_path / "cache", shards=(3,))
        return {"model": str(folder), "caches": [cache], "steps": 1}

    return make


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_a_part_that_only_the_pipeline_needs(
    run: Callable[..., Path], broken: Callable[[str], dict[str, Any]], tmp_path: Path, part: str
) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        run(**broken(part))
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_lora_run_needs_no_other_part_unless_it_draws_samples(
    run: Callable[..., Path], broken: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    options = broken("vae") | {"lora_rank": 2}
    assert (run(**options) / "lora").is_dir()
    with pytest.raises(ModelError, match="vae cannot be loaded"):
        run(**options, sample_every=1, output=tmp_path / "other")


def test_steps_that_the_samples_schedule_does_not_take(run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not take this number of steps"):
        run(sample_every=1, sample_steps=1001)
    assert not (tmp_path / "run/checkpoints").exists()


def test_the_space_for_checkpoints_and_output(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run leaves on the disk is what it asks for: a twentieth less is refused, a twentieth more is enough."""
    options = {"steps": 3, "save_every": 1, "keep_last": 9}
    plain = run(**options, output=tmp_path / "plain")
    checkpoints = sum(file.stat().st_size for file in plain.glob("checkpoints/*/*") if file.suffix == ".safetensors")
    weights = sum(file.stat().st_size for file in plain.glob("pipeline/*/*.safetensors"))
    assert 0 < checkpoints

    def free(size: float) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(size)))

    free(0.95 * (checkpoints + weights))
    with pytest.raises(StorageError, match="disk is too small for this run") as caught:
        run(**options, output=tmp_path / "small")
    assert "3 checkpoints" in str(caught.value)
    assert not (tmp_path / "small/checkpoints").exists()
    free(1.05 * (checkpoints + weights))
    run(**options, output=tmp_path / "enough")


def test_a_start_of_another_kind(make_world: Callable[..., Any], run: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="another kind than the reference") as caught:
        run(init_from=str(make_world("sd2-v").model.folder))
    assert "v_prediction" in str(caught.value)


def test_a_start_of_another_shape(world: Any, run: Callable[..., Path], tmp_path: Path) -> None:
    """Of the reference's family, prediction and schedule, for texts of another width."""
    folder = shutil.copytree(world.model.folder, tmp_path / "wide")
    config = UNet2DConditionModel.load_config(folder, subfolder="unet")
    width = config["cross_attention_dim"]
    wide = UNet2DConditionModel.from_config(config | {"cross_attention_dim": 2 * width})
    wide.save_pretrained(folder / "unet")
    with pytest.raises(UsageError, match="another kind than the reference") as caught:
        run(init_from=str(folder))
    assert f"attn2.to_k.weight of [{config['block_out_channels'][0]}, {width}]" in str(caught.value)
    assert not (tmp_path / "run/checkpoints").exists()
