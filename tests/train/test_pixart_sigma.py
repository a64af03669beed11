"""PixArt-Sigma on the whole way: a transformer, T5's mask, LoRA layers that peft reads back, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

from inpo.common.conditions import Condition
from inpo.common.errors import ModelError, UsageError
from inpo.common.models import open_model
from inpo.evaluation.generate import generate
from inpo.evaluation.lora import load_lora
from inpo.evaluation.settings import EvaluateSettings
from inpo.precompute.configuration import build_manifest
from inpo.precompute.settings import PrecomputeSettings
from inpo.train.export import export_single_file

KIND = "pixart-sigma"


@pytest.fixture(scope="module")
def pixart(make_world: Callable[..., Any]) -> Any:
    return make_world(KIND)


@pytest.fixture
def changed(pixart: Any, tmp_path: Path) -> Callable[..., Path]:
    """changed(component, name=value): a copy of the pipeline with another configuration."""

    def change(component: str, **values: Any) -> Path:
        folder = shutil.copytree(pixart.model.folder, tmp_path / "changed")
        file = folder / component / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
        return folder

    return change


def noise(transformer: Any, x: torch.Tensor, timestep: torch.Tensor, told: dict[str, torch.Tensor]) -> torch.Tensor:
    """As the pipeline asks for it."""
    with torch.no_grad():
        both = transformer(
            x,
            encoder_hidden_states=told["embedding"],
            encoder_attention_mask=torch.arange(told["embedding"].shape[1]) < told["length"][:, None],
            timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
    return both.chunk(2, dim=1)[0]


def asked(pixart: Any, *, prompts: int = 2) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    encoded = pixart.model.family.encode(
        pixart.model.load_text_pipeline(), ["a red cat", "the sky"][:prompts], torch.device("cpu")
    )
    x = torch.randn(prompts, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([30, 900][:prompts]), encoded


def test_the_call_is_the_pipelines_noise_and_the_mask_counts(pixart: Any) -> None:
    x, timestep, told = asked(pixart)
    network = pixart.model.load_network()
    with torch.no_grad():
        got = pixart.model.denoiser(network)(x, timestep, Condition(**told))
        everything = told | {"length": torch.full_like(told["length"], told["embedding"].shape[1])}
        unmasked = pixart.model.denoiser(network)(x, timestep, Condition(**everything))
    assert torch.equal(got, noise(network, x, timestep, told))
    assert not torch.allclose(got, unmasked, atol=1e-4)


def test_padding_behind_the_mask_changes_nothing(pixart: Any) -> None:
    x, timestep, told = asked(pixart)
    longest = int(told["length"].max())
    short = Condition(embedding=told["embedding"][:, :longest], length=told["length"])
    zeros = torch.zeros_like(told["embedding"])
    zeros[:, :longest] = short["embedding"]
    denoiser = pixart.model.denoiser(pixart.model.load_network())
    with torch.no_grad():
        expected = denoiser(x, timestep, Condition(**told))
        for other in (short, Condition(embedding=zeros, length=told["length"])):
            torch.testing.assert_close(denoiser(x, timestep, other), expected, rtol=1e-5, atol=1e-6)


def test_lora_layers_are_read_back_by_peft_and_by_generate(
    pixart: Any, run: Callable[..., Path], tmp_path: Path
) -> None:
    """The written layers, laid over the base by peft, give the noise of the trained network; our own images follow."""
    model = str(pixart.model.folder)
    cache = pixart.cache(tmp_path / "cache")
    output = run(model=model, caches=[cache], lora_rank=2, lora_alpha=4, steps=3, learning_rate=1e-2)
    pipeline: Any = DiffusionPipeline.from_pretrained(model)
    x, timestep, told = asked(pixart)
    base = noise(pipeline.transformer, x, timestep, told)
    ours: Any = DiffusionPipeline.from_pretrained(model)
    pixart.model.family.load_lora(ours, output / "lora" / "adapter_model.safetensors")
    pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, output / "lora")
    reloaded = noise(pipeline.transformer, x, timestep, told)
    assert not torch.allclose(reloaded, base, atol=1e-4)
    torch.testing.assert_close(noise(ours.transformer, x, timestep, told), reloaded, rtol=0, atol=1e-6)

    settings = EvaluateSettings(inference_steps=2, guidance=2.0, seed=3, lora=str(output / "lora"), dtype="float32")
    report = generate(open_model(model), ["a red cat"], settings, tmp_path / "images")
    assert report.num_images == 1
    (row,) = [json.loads(line) for line in (tmp_path / "images" / "images.jsonl").read_text().splitlines()]
    pipeline.transformer = pipeline.transformer.merge_and_unload()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    (expected,) = pipeline(
        "a red cat",
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(row["seed"]),
        use_resolution_binning=False,
        clean_caption=False,
    ).images
    got = np.asarray(Image.open(tmp_path / "images" / row["file"]), np.int16)
    assert np.abs(got - np.asarray(expected, np.int16)).max() <= 1
    # With another alpha the same tensors are another LoRA.
    said = output / "lora" / "adapter_config.json"
    said.write_text(json.dumps(json.loads(said.read_text()) | {"lora_alpha": 40}))
    with pytest.raises(UsageError, match="lora = "):
        generate(open_model(model), ["a red cat"], settings, tmp_path / "images")


@pytest.mark.parametrize(
    "told",
    [
        {"alpha_pattern": {"to_q": 40}, "rank_pattern": {"to_v": 3}},
        {"use_rslora": True, "r": 3, "lora_dropout": 0.5},
        {"use_dora": True},
    ],
    ids=["patterns", "rslora", "dora"],
)
def test_what_peft_obeys_of_an_adapter_is_obeyed(pixart: Any, tmp_path: Path, told: dict[str, Any]) -> None:
    """peft writes the adapter and reads it; ours gives the same noise, and the images are told to be another LoRA's."""
    config = LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["to_q", "to_v"]} | told, init_lora_weights=False)
    family, asked_for = pixart.model.family, asked(pixart)
    torch.manual_seed(0)
    get_peft_model(pixart.model.load_network(), config).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    theirs = PeftModel.from_pretrained(pixart.model.load_network(), tmp_path)
    ours: Any = DiffusionPipeline.from_pretrained(str(pixart.model.folder))
    load_lora(ours, file, pixart.model)
    torch.testing.assert_close(noise(ours.transformer, *asked_for), noise(theirs, *asked_for), rtol=0, atol=1e-6)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    obeyed = family.lora_settings(file)
    (tmp_path / "adapter_config.json").write_text(json.dumps({name: said[name] for name in said.keys() - told}))
    assert family.lora_settings(file) != obeyed
    (tmp_path / "adapter_config.json").write_text(json.dumps(said | {"use_newest": True}))
    with pytest.raises(ModelError, match="use_newest"):
        load_lora(ours, file, pixart.model)


def test_lora_layers_of_another_transformer_are_refused(pixart: Any, run: Callable[..., Path], tmp_path: Path) -> None:
    cache = pixart.cache(tmp_path / "cache")
    output = run(model=str(pixart.model.folder), caches=[cache], lora_rank=2, steps=1)
    file = output / "lora" / "adapter_model.safetensors"

    weights = {
        name.replace("transformer_blocks.0", "transformer_blocks.7"): each for name, each in load_file(file).items()
    }
    save_file(weights, file)
    settings = EvaluateSettings(inference_steps=1, lora=str(output / "lora"))
    with pytest.raises(ModelError, match="do not fit"):
        generate(pixart.model, ["a red cat"], settings, tmp_path / "images")


def test_what_this_family_does_not_have_is_refused(pixart: Any, changed: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="single-file"):
        export_single_file(pixart.model.folder, tmp_path / "model.safetensors", dtype="float32")
    single = tmp_path / "model.safetensors"
    single.write_bytes(b"")
    with pytest.raises(ModelError, match="not read from a single file"):
        open_model(str(single), model_config=str(pixart.model.folder))
    with pytest.raises(UsageError, match="resolution") as caught:
        build_manifest(PrecomputeSettings(resolution=36), pixart.model, device_type="cpu")
    assert "multiples of 8" in str(caught.value)  # of the VAE's 4, in patches of 2
    with pytest.raises(ModelError, match="other conditions than text"):
        open_model(str(changed("transformer", use_additional_conditions=True)))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"use_additional_conditions": None, "sample_size": 128}, "true at sample_size 128"),
        ({"out_channels": 6}, "4 or 8"),
        ({"in_channels": 9}, "in_channels 9"),
    ],
)
def test_a_transformer_of_another_kind_is_refused_by_name(
    changed: Callable[..., Path], values: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModelError) as caught:
        open_model(str(changed("transformer", **values)))
    assert words in str(caught.value)
    assert "PixArt-Sigma" in str(caught.value)


def test_a_long_prompt_is_known_to_be_cut(pixart: Any) -> None:
    family, pipeline = pixart.model.family, pixart.model.load_text_pipeline()
    assert not family.is_cut(pipeline, "blue " * 299)
    assert family.is_cut(pipeline, "blue " * 300)
