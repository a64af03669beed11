"""The demo's recipe from pairs to a comparison; memory against what was predicted; FSDP with one process."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from inpo.common.cache import Cache
from inpo.common.models import Model, open_model
from inpo.common.testing import save_tiny_pipeline
from inpo.precompute.configuration import build_manifest
from inpo.precompute.settings import PrecomputeSettings
from inpo.train.memory import train_peak
from inpo.train.settings import TrainSettings
from tests.steps import step_peak

ROOT = Path(__file__).resolve().parents[2]

UNET = {"block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": 8, "layers_per_block": 2}
UNET |= {"down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "norm_num_groups": 32}
UNET |= {"up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, "sample_size": 64, "cross_attention_dim": 768}
"""Stable Diffusion 1.5's."""


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_demo(tmp_path: Path) -> None:
    """`make demo`, whole: precompute in bfloat16 on the GPU, a proof that holds, and a model that is preferred. In a
    copy: what an earlier demo has made here would be gone on with."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(".venv", ".git", "runs"))
    (tree / ".venv").symlink_to(ROOT / ".venv")
    done = subprocess.run(["make", "demo"], capture_output=True, text=True, cwd=tree)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "zero-step proof holds" in done.stderr
    assert "bfloat16" in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_demos_recipe_end_to_end(tmp_path: Path) -> None:
    """Some pairs and steps of it, by the command line, as `make demo` calls it."""
    recipe = (ROOT / "recipes/demo.toml").read_text().replace("runs/demo", str(tmp_path))
    (tmp_path / "demo.toml").write_text(recipe)

    def inpo(*arguments: str) -> str:
        command = [sys.executable, "-m", "inpo", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr

    told = ("--recipe", str(tmp_path / "demo.toml"))
    inpo("toyworld", "pairs", "--out", str(tmp_path / "pairs"), "--pairs", "128")
    inpo("precompute", *told)
    said = inpo("train", *told, "--steps", "20")
    assert "zero-step proof holds" in said
    lines = (tmp_path / "train" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["loss"] == pytest.approx(0.693147, abs=0.01)
    assert (tmp_path / "train" / "pipeline" / "unet").is_dir()


def _counted(model: Model, settings: TrainSettings, device: torch.device, images: int) -> int:
    told = PrecomputeSettings(resolution=512 if device.type == "cuda" else 32, dtype="bfloat16")
    manifest = build_manifest(told, model, device_type=device.type)
    return train_peak(model, manifest, settings, device_type=device.type).at(images)


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointed"])
def test_peak_memory_is_the_predicted_one(
    settings: dict[str, bool], device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU of Stable Diffusion 1.5's UNet, whose weights nobody needs: they are drawn there."""
    folder, told = save_tiny_pipeline(tmp_path / "sd15", "sd15"), TrainSettings(**settings)
    if device.type == "cuda":
        file = folder / "unet" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | UNET))
        for part in ("text_encoder", "vae"):
            config = folder / part / "config.json"
            known = json.loads(config.read_text())
            wide = {"hidden_size": 768} if part == "text_encoder" else {"block_out_channels": [8, 16, 16, 16]}
            config.write_text(json.dumps(known | wide))
        monkeypatch.setattr(Model, "fingerprints", {"network": "0" * 32})
    model = open_model(str(folder))
    if device.type == "cuda":
        with torch.device("cuda"):
            network: torch.nn.Module = UNet2DConditionModel.from_config(model.config("unet"))
    else:
        network = model.load_network()
    latent = 64 if device.type == "cuda" else 8
    real = step_peak(network, model, told, device=device, dtype="bfloat16", images=4, side=latent)
    assert _counted(model, told, device, 4) == pytest.approx(real, rel=0.12 if device.type == "cuda" else 0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fsdp_of_one_process(model: Path, tmp_path: Path, pairs: str) -> None:
    """The shipped file with one process: NCCL, bfloat16, a checkpoint, and the pipeline at the end."""
    cache, output = tmp_path / "cache", tmp_path / "run"

    def launched(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", *arguments]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path}
        return subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT, env=environment)

    made = subprocess.run(
        [
            *(sys.executable, "-m", "inpo", "precompute", "--model", str(model), "--pairs", pairs),
            *("--cache", str(cache), "--resolution=32", "--grid-points=4", "--timesteps-per-pair=2", "--compile=off"),
        ],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=ROOT,
    )
    assert made.returncode == 0, made.stderr[-3000:]
    done = launched(
        "--config_file",
        str(ROOT / "recipes/sdxl_fsdp.yaml"),
        "--main_process_port",
        "0",
        "-m",
        "inpo",
        "train",
        f"--model={model}",
        f"--cache={cache}",
        f"--output={output}",
        "--batch-size=2",
        "--steps=2",
        "--held-out=0",
        "--tracker=none",
        "--compile=off",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "zero-step proof holds" in done.stderr
    assert (output / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert (output / "checkpoints").is_dir()


def test_a_run_says_its_peak(
    device: torch.device, precompute: Callable[..., Cache], train: Callable[..., Path]
) -> None:
    """Where there is one: torch counts on GPUs alone."""
    lines = (train("run", precompute("cache"), steps=2) / "metrics.jsonl").read_text().splitlines()
    assert ("peak_memory_bytes" in json.loads(lines[-1])) == (device.type == "cuda")
