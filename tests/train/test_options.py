"""Options that change how a run is made: several caches, a compiled network, the paper's two steps, W&B."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from inpo.common.errors import CacheMismatch
from inpo.common.models import open_model
from inpo.common.recipe import read_recipe, resolve
from inpo.train.metrics import MetricsWriter
from inpo.train.settings import TrainSettings


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_several_caches_make_one_run(world: Any, cache: str, run: Callable[..., Path], tmp_path: Path) -> None:
    other = world.cache(tmp_path / "other", shards=(3,), timesteps_per_pair=3, seed=1)
    output = run(caches=[cache, other], steps=2)
    card = (output / "pipeline" / "README.md").read_text()
    assert f"`{cache}`: 9 pairs, 18 records" in card
    assert f"`{other}`: 3 pairs, 9 records" in card
    saved = resolve(TrainSettings, "train", read_recipe(output / "recipe.toml"), {})
    assert saved.caches == (cache, other)


def test_the_two_steps_of_the_paper(world: Any, run: Callable[..., Path], tmp_path: Path) -> None:
    """docs/training.md: fine-tune on the preferred sides, invert with the result, train it; it is the reference too."""
    noised = world.cache(tmp_path / "sft-cache", shards=(3,), inverter="noise")
    tuned = run(caches=[noised], objective="sft", steps=2, learning_rate=1e-3, output=tmp_path / "sft") / "pipeline"
    inverted = type(world)(model=open_model(str(tuned))).cache(tmp_path / "inpo-cache", shards=(3,))
    output = run(model=str(tuned), caches=[inverted], steps=1, output=tmp_path / "inpo")
    assert losses(output)[0] == pytest.approx(math.log(2), abs=1e-3)
    assert str(tuned) in (output / "pipeline" / "README.md").read_text()
    with pytest.raises(CacheMismatch, match="another model"):  # the base model is not this cache's reference
        run(caches=[inverted], output=tmp_path / "base")


def test_a_compiled_network_trains_alike(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is captured as ever; PyTorch runs it instead of generated code, because no compiler may be here."""
    plain = run(steps=2, output=tmp_path / "plain")
    compiled: list[torch.nn.Module] = []
    compile_ = torch.compile

    def watched(network: torch.nn.Module) -> Any:
        compiled.append(network)
        return compile_(network, backend="eager")

    monkeypatch.setattr(torch, "compile", watched)
    again = run(steps=2, compile=True, output=tmp_path / "compiled")
    assert len(compiled) == 1
    np.testing.assert_allclose(losses(again), losses(plain), rtol=1e-4)
    for name, values in load_file(next((plain / "pipeline/unet").glob("*.safetensors"))).items():
        other = load_file(next((again / "pipeline/unet").glob("*.safetensors")))[name]
        np.testing.assert_allclose(other.numpy(), values.numpy(), rtol=1e-3, atol=1e-5)


def test_wandb_gets_the_numbers_and_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, dict[str, Any]]] = []
    ended = []

    class Run:
        def log(self, values: dict[str, Any], step: int) -> None:
            sent.append((step, values))

        def finish(self) -> None:
            ended.append(True)

    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda **options: Run(), Image=lambda pixels: pixels.shape)
    )
    metrics = MetricsWriter(tmp_path, tracker="wandb", resumed_step=0, config={})
    part = {
        "records": 3,
        "loss": 0.5,
        "implicit_accuracy": 0.6,
        "margin": 1.0,
        "win_advantage": 0.1,
        "lose_advantage": -0.1,
        "timesteps": [0, 200],
    }
    metrics.write({"step": 7, "loss": 0.7, "by_timestep": [part], "held_out_by_timestep": [part]})
    metrics.image("samples", np.zeros((4, 6, 3), np.uint8), 7)
    metrics.close()
    (first, values), (second, picture) = sent
    assert first == second == 7
    assert values["loss"] == 0.7
    assert values["by_timestep/lose_advantage_0-200"] == -0.1
    assert values["held_out_by_timestep/margin_0-200"] == 1.0
    assert picture == {"samples": (4, 6, 3)}
    assert ended == [True]
