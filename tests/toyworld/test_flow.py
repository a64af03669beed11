"""The training of the toy world's flow: one step lowers nothing yet, but what it leaves is a pipeline that draws."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusion3Pipeline
from safetensors.torch import load_file

from inpo.common.models import open_model
from inpo.toyworld import sampling
from inpo.toyworld.architecture import build_flow_pipeline, build_tokenizer
from inpo.toyworld.sampling import LATENT_SHAPE, MODELS
from inpo.toyworld.scenes import all_captions
from inpo.toyworld.stages import StageReport
from inpo.toyworld.train_base import FLOW, FlowTraining, save

LONGEST = max(all_captions(), key=lambda caption: len(caption.split()))
TEXTS = [all_captions()[0], LONGEST, ""]


def test_a_step_trains_every_weight_and_leaves_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = AutoencoderKL.from_pretrained(MODELS["base"], subfolder="vae", dtype=torch.float32)
    torch.manual_seed(0)
    training = FlowTraining(build_flow_pipeline(vae=vae, tokenizer=build_tokenizer(tmp_path / "tokenizer")), TEXTS)
    random = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(4, *LATENT_SHAPE, generator=random) for _ in range(2))
    times = training.times(random, 4)
    assert ((times > 0) & (times < 1)).all()
    loss = training(x0, noise, times, torch.tensor([0, 1, 0, 2]))
    assert 1 < loss.item() < 4  # noise - x0 has a mean square of 2
    # A network that starts at 0 passes nothing on; once it does not, all of it learns.
    torch.nn.init.normal_(training.pipeline.transformer.proj_out.weight, std=0.1)
    for block in training.pipeline.transformer.transformer_blocks:
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.1)
    training(x0, noise, times, torch.tensor([0, 1, 0, 1])).backward()
    assert [name for name, weight in training.named_parameters() if weight.grad is None] == []

    chosen = argparse.Namespace(model="flow", out=tmp_path / "flow", pictures=4)
    save(training.pipeline, chosen, {"transformer": FLOW}, {"transformer": StageReport(loss=[(1, 2.0)])})
    assert json.loads((chosen.out / "training.json").read_text())["settings"]["transformer"]["steps"] == FLOW.steps
    assert sum(file.stat().st_size for file in chosen.out.rglob("*.safetensors")) < 8_000_000
    (ours, theirs) = (
        load_file(next((folder / "vae").glob("*.safetensors"))) for folder in (chosen.out, MODELS["base"])
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for folder in (chosen.out, Path(__file__).parents[2] / "toyworld" / "flow"):
        assert [file.name for file in folder.rglob("*.json") if re.search(r'"/\w', file.read_text())] == []
    pipeline: Any = DiffusionPipeline.from_pretrained(chosen.out)
    assert type(pipeline) is StableDiffusion3Pipeline
    model = open_model(str(chosen.out))
    assert not model.family.is_cut(pipeline, LONGEST, sampling.MAX_TOKENS)
    assert len(pipeline.tokenizer_3(LONGEST)["input_ids"]) == len(LONGEST.split()) + 1

    monkeypatch.setitem(MODELS, "flow", chosen.out)
    sampling._load.cache_clear()
    images = sampling.generate([LONGEST, ""], torch.randn(2, *LATENT_SHAPE, generator=random), steps=2, model="flow")
    assert [image.size for image in images] == [(64, 64)] * 2
