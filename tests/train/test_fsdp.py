"""Weights split with the shipped files: those of one process with twice the accumulation, through a checkpoint too."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from inpo.common.state_files import read_state
from inpo.common.testing import save_tiny_pipeline
from inpo.precompute.run import run_precompute
from inpo.precompute.settings import RayOptions
from tests.engines.runs import write_pairs

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"steps": 4, "save_every": 2, "keep_last": 3, "adam_eps": 1e-2, "held_out": 0.4, "evaluate_every": 2}
CHECKPOINT = "checkpoints/step-00000002"
WEIGHTS = "pipeline/unet/diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Sharded:
    """Trainings in two processes: to the end, from its checkpoint to the end, a flow's, and one that the guard ends."""

    done: "subprocess.CompletedProcess[str]"
    two: Path
    resumed: Path
    flow: Path
    ended: Path


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A tiny SD3 pipeline and its cache in bfloat16: 7 pairs."""
    folder = tmp_path_factory.mktemp("flow")
    model = save_tiny_pipeline(folder / "model", "sd3")
    pairs = write_pairs(folder / "pairs", num_shards=1, pairs_per_shard=7)
    settings = {"resolution": 32, "grid_points": 3, "timesteps_per_pair": 2, "decode_workers": 0, "dtype": "bfloat16"}
    sections = ({"model": str(model)}, {"pairs": str(pairs), "cache": str(folder / "cache")}, settings)
    assert run_precompute(None, *sections, ray_options=RayOptions(), dry_run=False) == 0
    return str(model), str(folder / "cache")


@pytest.fixture(scope="module")
def sharded(world: Any, cache: str, flow: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Sharded:
    folder = tmp_path_factory.mktemp("sharded")
    outputs = [folder / name for name in ("two", "resumed", "flow", "ended")]
    two, resumed, of_flow, ended = outputs
    files = {name: yaml.safe_load((ROOT / f"recipes/{name}_fsdp.yaml").read_text()) for name in ("sdxl", "flow")}
    blocks = {name: each["fsdp_config"].pop("fsdp_transformer_layer_cls_to_wrap", None) for name, each in files.items()}
    assert files["sdxl"] == files["flow"], "one launch stands for both"

    def train(output: Path, *options: str, of: tuple[str, str] = (str(world.model.folder), cache)) -> list[str]:
        arguments = ["train", f"--model={of[0]}", f"--cache={of[1]}", f"--output={output}"]
        arguments += [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
        return [*arguments, "--batch-size=2", "--learning-rate=1e-4", "--log-every=2", "--tracker=none", *options]

    commands = [
        (blocks["sdxl"], train(two)),
        (blocks["sdxl"], train(resumed, f"--resume={two / CHECKPOINT}")),
        (blocks["flow"], train(of_flow, of=flow)),
        (blocks["sdxl"], train(ended, "--no-check-finite", "--learning-rate=1e38", "--weight-decay=10")),
    ]
    (folder / "commands.json").write_text(json.dumps(commands))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    command += ["--config_file", str(ROOT / "recipes/sdxl_fsdp.yaml"), "--main_process_port", "0"]
    command += [str(Path(__file__).with_name("sharded.py")), str(folder / "commands.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, env=environment)
    return Sharded(done, *outputs)


def test_split_weights_equal_whole_ones(sharded: Sharded, run: Callable[..., Path], tmp_path: Path) -> None:
    """Three held-out batches: one process has none in the last round, and must call the network all the same."""
    one = run(output=tmp_path / "one", accumulate=2, **SETTINGS)
    two, resumed = sharded.two, sharded.resumed
    for process in (0, 1):  # of three trainings, and of whatever the last made of it
        assert sharded.done.stdout.count(f"process {process} ended with 0") == 3, sharded.done.stderr[-3000:]
    assert sharded.done.stderr.count("2 x 1 accumulated x 2 processes") == 4
    for name in (WEIGHTS, f"{CHECKPOINT}/model.safetensors"):
        left, right = load_file(one / name), load_file(two / name)
        assert left.keys() == right.keys()
        assert max(float((left[key] - right[key]).abs().max()) for key in left) < 1e-6, name
    moments, theirs = (read_state(output / CHECKPOINT, "optimizer")["state"].values() for output in (one, two))
    for mine, other in zip(moments, theirs, strict=True):
        assert mine.keys() == other.keys()
        for key, value in mine.items():
            torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-6)
    lines = [[json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()] for each in (one, two)]
    assert [line["step"] for line in lines[1]] == [0, 2, 4]
    for here, there in zip(*lines, strict=True):
        for name in ("loss", "margin", "gradient_norm", *(["held_out_loss"] if here["step"] else [])):
            assert there[name] == pytest.approx(here[name], rel=1e-3, abs=1e-4), name
    left, right = load_file(two / WEIGHTS), load_file(resumed / WEIGHTS)
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


def test_a_flow_is_split_by_its_own_blocks(
    sharded: Sharded, flow: tuple[str, str], run: Callable[..., Path], tmp_path: Path
) -> None:
    """In bfloat16, where the calls of both round alike: FSDP casts nothing by itself, times least of all."""
    model, cache = flow
    one = run(output=tmp_path / "one", model=model, caches=[cache], accumulate=2, **SETTINGS)
    starts = [json.loads((output / "metrics.jsonl").read_text().splitlines()[0]) for output in (one, sharded.flow)]
    assert starts[1]["loss"] == pytest.approx(starts[0]["loss"], abs=1e-6)
    name = WEIGHTS.replace("unet", "transformer")
    begun = load_file(Path(model) / name.removeprefix("pipeline/"))
    for file in (name, f"{CHECKPOINT}/model.safetensors"):
        left, right = load_file(one / file), load_file(sharded.flow / file)
        assert left.keys() == right.keys() == begun.keys()
        moved = sum(float((left[key] - begun[key]).square().sum()) for key in begun)
        apart = sum(float((left[key] - right[key]).square().sum()) for key in begun)
        assert apart < 0.02**2 * moved, file  # bfloat16 rounds to 0.004, and gradients are added up in another order


def test_split_weights_that_are_not_finite_are_not_written(sharded: Sharded) -> None:
    """The guard looks at the weights that are trained, not at those that FSDP took them from."""
    assert sharded.done.returncode != 0
    assert "The trained weights are not finite, and were not written" in sharded.done.stderr
    assert (sharded.ended / "metrics.jsonl").exists()
    assert not (sharded.ended / "checkpoints").exists()
