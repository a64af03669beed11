"""Options that change how a run is made: several caches, a compiled network, the paper's two steps, trackers."""

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import inpo.train.loop
from inpo.common.compiled import compile_network
from inpo.common.errors import CacheMismatch, UsageError
from inpo.common.models import open_model
from inpo.common.recipe import read_recipe, resolve
from inpo.train.metrics import MetricsWriter
from inpo.train.settings import TrainSettings
from inpo.train.tracker import Tracker


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_several_caches_make_one_run(world: Any, cache: str, run: Callable[..., Path], tmp_path: Path) -> None:
    other = world.cache(tmp_path / "other", shards=(3,), timesteps_per_pair=3, seed=1)
    output = run(caches=[cache, other], steps=2)
    card = (output / "pipeline" / "README.md").read_text()
    assert f"`{Path(cache).name}`: 9 pairs, 18 records" in card
    assert f"`{Path(other).name}`: 3 pairs, 9 records" in card
    saved = resolve(TrainSettings, "train", read_recipe(output / "recipe.toml"), {})
    assert saved.caches == (cache, other)


def test_the_two_steps_of_the_paper(world: Any, run: Callable[..., Path], tmp_path: Path) -> None:
    """docs/training.md: fine-tune on the preferred sides, invert with the result, train it; it is the reference too."""
    noised = world.cache(tmp_path / "sft-cache", shards=(3,), inverter="noise")
    tuned = run(caches=[noised], objective="sft", steps=2, learning_rate=1e-3, output=tmp_path / "sft") / "pipeline"
    inverted = type(world)(model=open_model(str(tuned))).cache(tmp_path / "inpo-cache", shards=(3,))
    output = run(model=str(tuned), caches=[inverted], steps=1, output=tmp_path / "inpo")
    assert losses(output)[0] == pytest.approx(math.log(2), abs=1e-3)
    assert "the reference is `sft`" in (output / "pipeline" / "README.md").read_text()
    with pytest.raises(CacheMismatch, match="another model"):  # the base model is not this cache's reference
        run(caches=[inverted], output=tmp_path / "base")


@pytest.mark.parametrize(
    ("how", "flags"),
    [
        ("whole", {"ema": 0.9}),
        ("blocks", {"gradient_checkpointing": True, "sample_every": 1, "sample_steps": 1, "lora_rank": 2}),
    ],
    ids=["whole", "blocks-lora"],
)
def test_a_compiled_network_trains_alike(
    world: Any,
    cache: str,
    run: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    flags: dict[str, Any],
) -> None:
    """Graphs are captured as ever, forward and backward; PyTorch runs them, because generating code takes minutes.

    All are captured before the first step, for latents of both shapes: not one for a sample, nor for the proof's and
    the held-out batches' sizes.
    """
    small = world.cache(tmp_path / "small", shards=(6,), side=4)
    settings = {"caches": [cache, small], "steps": 3, "save_every": 2, "held_out": 0.4, "evaluate_every": 1, **flags}
    plain = run(output=tmp_path / "plain", compile="off", **settings)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    captured: list[int] = []

    def watched(*arguments: Any, **options: Any) -> bool:
        done = compile_network(*arguments, **options)
        captured.extend([counters["stats"]["unique_graphs"]] if done else [])
        return done

    monkeypatch.setattr(inpo.train.loop, "compile_network", watched)
    again = run(output=tmp_path / "compiled", compile=how, **settings)
    assert captured == [counters["stats"]["unique_graphs"]] != [0]
    np.testing.assert_allclose(losses(again), losses(plain), rtol=1e-4)
    files = sorted(file.relative_to(plain) for file in plain.rglob("*.safetensors"))
    assert files == sorted(file.relative_to(again) for file in again.rglob("*.safetensors"))
    for file in files:
        mine, theirs = load_file(again / file), load_file(plain / file)
        assert mine.keys() == theirs.keys()
        for name, values in theirs.items():
            torch.testing.assert_close(mine[name], values, rtol=1e-3, atol=1e-4, msg=f"{file}: {name}")
    # A checkpoint of the one is one of the other: the option is how a run is made, not what it is.
    run(output=again, compile="off", **settings | {"steps": 4})


def test_training_goes_on_where_compiling_fails(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    plain = run(output=tmp_path / "plain", steps=2)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    torch.compiler.reset()
    again = run(output=tmp_path / "compiled", steps=2, compile="blocks")
    assert losses(again) == losses(plain)
    said = capsys.readouterr().err
    assert "note: the network runs as it is, because compiling it failed: " in said
    assert "no compiler here" in said


def test_a_resumed_run_goes_on_in_its_own_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    settings: list[dict[str, Any]] = []
    monkeypatch.setitem(
        sys.modules,
        "wandb",
        SimpleNamespace(
            init=lambda **options: asked.append(options),
            config=SimpleNamespace(update=lambda values, **options: settings.append(values)),
        ),
    )
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    output = tmp_path / "my-run"
    config = {"steps": 3, "adam_betas": [0.9, 0.999], "labels": None}
    for step, named in ((0, {}), (5, {}), (9, {"project": "p", "run_name": "n"}), (0, {})):
        Tracker("wandb", output, resumed_step=step, config=config, **named)
    first, second, third, anew = asked
    assert (first["project"], first["name"]) == ("inpo", "my-run")
    assert (third["project"], third["name"]) == ("p", "n")
    assert first["id"] == second["id"] == third["id"] != anew["id"]
    assert settings[0] == {"steps": 3, "adam_betas": "[0.9, 0.999]"}
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    Tracker("wandb", output, resumed_step=9, config={})
    assert asked[-1]["project"] == "theirs"


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**32 - 1, 2**63 - 1])
def test_a_seed_that_a_cache_takes_is_one_of_a_run(run: Callable[..., Path], seed: int) -> None:
    output = run(steps=1, held_out=0.5, lora_rank=2, seed=seed, sample_every=1, sample_steps=1)
    assert (output / "lora/pytorch_lora_weights.safetensors").is_file()


def test_trackers_are_those_of_accelerate() -> None:
    named = get_args(TrainSettings.model_fields["tracker"].annotation)
    assert {*named} - {"none"} == {*LOGGER_TYPE_TO_CLASS}


def test_a_tracker_that_does_not_start_ends_the_run_before_it_begins(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**options: Any) -> None:
        raise RuntimeError("no key: log in first")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__="there"))
    with pytest.raises(UsageError, match="wandb does not start") as caught:
        run(tracker="wandb")
    assert "log in first" in str(caught.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_tracker_that_fails_on_the_way_is_said_once_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def log(values: dict[str, Any], **options: Any) -> None:
        raise ConnectionError("the service is gone")

    own = SimpleNamespace(init=lambda **options: SimpleNamespace(log=log, finish=lambda: None))
    own.config = SimpleNamespace(update=lambda values, **options: None)
    monkeypatch.setitem(sys.modules, "wandb", own)
    metrics = MetricsWriter(tmp_path, tracker=Tracker("wandb", tmp_path, resumed_step=0, config={}), resumed_step=0)
    for step in (1, 2):
        metrics.write({"step": step, "loss": 0.5})
    metrics.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert capsys.readouterr().err.count("the service is gone") == 1


def test_wandb_gets_the_numbers_and_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, dict[str, Any]]] = []
    ended = []

    class Run:
        def log(self, values: dict[str, Any], step: int, **options: Any) -> None:
            sent.append((step, values))

        def finish(self) -> None:
            ended.append(True)

    monkeypatch.setitem(
        sys.modules,
        "wandb",
        SimpleNamespace(
            init=lambda **options: Run(),
            Image=lambda pixels, **options: pixels.shape,
            config=SimpleNamespace(update=lambda values, **options: None),
        ),
    )
    tracker = Tracker("wandb", tmp_path, resumed_step=0, config={})
    metrics = MetricsWriter(tmp_path, tracker=tracker, resumed_step=0)
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
    metrics.image("samples", np.zeros((4, 6, 3), np.uint8), 7, png=b"")
    metrics.close()
    (first, values), (second, picture) = sent
    assert first == second == 7
    assert values["loss"] == 0.7
    assert values["by_timestep/lose_advantage_0-200"] == -0.1
    assert values["held_out_by_timestep/margin_0-200"] == 1.0
    assert picture == {"samples": [(4, 6, 3)]}
    assert ended == [True]
