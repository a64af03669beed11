"""What the end of a run needs is tried before its first step."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from inpo.common.errors import ModelError, StorageError, UsageError


@pytest.fixture
def broken(world: Any, tmp_path: Path) -> Callable[[str], str]:
    """A copy of the model in which a part lacks a weight, or is no JSON."""

    def make(part: str) -> str:
        folder = shutil.copytree(world.model.folder, tmp_path / "model")
        for file in (folder / part).glob("*.safetensors"):
            weights = load_file(file)
            del weights[sorted(weights)[0]]
            save_file(weights, file, metadata={"format": "pt"})
        if part == "tokenizer":
            (folder / part / "tokenizer.json").write_text("{")
        return str(folder)

    return make


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_a_part_that_only_the_pipeline_needs(
    run: Callable[..., Path], broken: Callable[[str], str], tmp_path: Path, part: str
) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        run(model=broken(part))
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_lora_run_needs_no_other_part_unless_it_draws_samples(
    run: Callable[..., Path], broken: Callable[[str], str], tmp_path: Path
) -> None:
    model = broken("vae")
    assert (run(model=model, steps=1, lora_rank=2) / "lora").is_dir()
    with pytest.raises(ModelError, match="vae cannot be loaded"):
        run(model=model, steps=1, lora_rank=2, sample_every=1, output=tmp_path / "other")


def test_steps_that_the_samples_schedule_does_not_take(run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not take this number of steps"):
        run(sample_every=1, sample_steps=1001)
    assert not (tmp_path / "run/checkpoints").exists()


def test_the_space_for_checkpoints_and_output(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted on the disk: with one byte less than a run leaves, and with what it leaves."""
    plain = run(steps=4, save_every=1, keep_last=9, output=tmp_path / "plain")
    checkpoints = sum(file.stat().st_size for file in plain.glob("checkpoints/*/*") if file.suffix == ".safetensors")
    weights = sum(file.stat().st_size for file in plain.glob("pipeline/*/*.safetensors"))
    assert 0 < checkpoints

    def free(size: float) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(size)))

    # AdamW keeps two numbers beside each weight; file headers are little.
    free(0.9 * (3 * checkpoints + weights))
    with pytest.raises(StorageError, match="disk is too small for this run") as caught:
        run(steps=4, save_every=1, keep_last=9, output=tmp_path / "small")
    assert "4 checkpoints" in str(caught.value)
    assert not (tmp_path / "small/checkpoints").exists()
    free(1.1 * (3 * checkpoints + weights))
    run(steps=4, save_every=1, keep_last=9, output=tmp_path / "enough")


def test_a_start_of_another_kind(make_world: Callable[..., Any], run: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="another kind than the reference") as caught:
        run(init_from=str(make_world("sd2-v").model.folder))
    assert "v_prediction" in str(caught.value)
