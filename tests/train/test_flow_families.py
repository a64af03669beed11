"""Every flow family on the whole way, against what its own pipeline gives its scheduler: sign, time, packing, text."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from inpo.common.cache import open_cache
from inpo.common.conditions import Condition
from inpo.common.errors import CacheMismatch, ModelError
from inpo.common.families import BY_PIPELINE
from inpo.common.models import open_model
from inpo.common.testing import save_tiny_pipeline
from inpo.evaluation.generate import generate
from inpo.evaluation.settings import EvaluateSettings
from inpo.inspection.drift import measure_drift
from inpo.inspection.preview import vae_preview
from inpo.inspection.verify import verify
from inpo.precompute.run import run_precompute
from inpo.precompute.settings import RayOptions

KINDS = ("sd3", "flux", "qwen-image", "z-image")
HERE = ("qwen-image", "z-image")
"""Those without a file of their own."""
PROMPTS = ["a red cat", "the sky of the blue house"]
TEXT_STREAM = {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}


@pytest.fixture(scope="module", params=KINDS)
def any_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("model") / request.param, request.param)


@pytest.fixture(scope="module", params=HERE)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("model") / request.param, request.param)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Images that are not square, under prompts of two lengths."""
    place = tmp_path_factory.mktemp("pairs")
    rows = []
    for row in range(3):
        for side in ("win", "lose"):
            pixels = np.random.default_rng(row).integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels if side == "win" else pixels[::-1]).save(place / f"{row}-{side}.png")
        rows.append({"win": f"{row}-win.png", "lose": f"{row}-lose.png", "prompt": PROMPTS[row % 2]})
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(place)


def precompute(folder: Path, pairs: str, cache: str, **settings: Any) -> str:
    settings = {"resolution": 48, "grid_points": 4, "timesteps_per_pair": 4, "decode_workers": 0, **settings}
    sections = ({"model": str(folder)}, {"pairs": pairs, "cache": cache}, settings)
    assert run_precompute(None, *sections, ray_options=RayOptions(), dry_run=False) == 0
    return cache


@pytest.fixture(scope="module")
def made(folder: Path, pairs: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return precompute(folder, pairs, str(tmp_path_factory.mktemp("cache") / "c"))


Step = tuple[torch.Tensor, float, torch.Tensor]


def drawn(pipeline: Any, **arguments: Any) -> list[Step]:
    """(velocity, time, latents) of each step that a pipeline takes under PROMPTS, without guidance."""
    steps: list[Step] = []
    step = type(pipeline.scheduler).step

    def watched(velocity: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, **options: Any) -> Any:
        steps.append((velocity.clone(), float(timestep) / 1000, sample.clone()))
        return step(pipeline.scheduler, velocity, timestep, sample, **options)

    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler.step = watched
    generator = torch.Generator().manual_seed(0)
    guidance = {"true_cfg_scale": 1.0} if "Qwen" in type(pipeline).__name__ else {"guidance_scale": 0.0}
    pipeline(
        list(PROMPTS),  # a pipeline may write into it
        num_inference_steps=2,
        height=48,
        width=48,
        generator=generator,
        output_type="latent",
        **guidance,
        **arguments,
    )
    del pipeline.scheduler.step
    return steps


def test_a_call_is_the_pipelines_own(any_folder: Path) -> None:
    pipeline: Any = DiffusionPipeline.from_pretrained(any_folder)
    family = BY_PIPELINE[type(pipeline).__name__]
    call = family.bound({"embedded_guidance": 0.0})
    told = family.encode(pipeline, PROMPTS, torch.device("cpu"))

    def plain(tensor: torch.Tensor) -> torch.Tensor:
        """From tokens, where the pipeline has packed the latents."""
        if tensor.ndim == 4:
            return tensor
        return pipeline._unpack_latents(tensor, 48, 48, pipeline.vae_scale_factor).reshape(2, 16, 12, 12)

    for velocity, time, latents in drawn(pipeline):
        label = family.told(torch.full((2,), time, dtype=torch.float64)).float()
        with torch.no_grad():
            ours = call(pipeline.transformer, plain(latents), label, Condition(**told))
        torch.testing.assert_close(ours, plain(velocity), rtol=0, atol=2e-5)


@pytest.mark.parametrize("lora", [0, 2])
def test_what_is_trained_is_read_back_by_the_pipelines_own_loader(
    made: str, folder: Path, run: Callable[..., Path], tmp_path: Path, lora: int
) -> None:
    """By velocities: names that a loader does not know leave the model as it was, without an error."""
    output = run(model=str(folder), caches=[made], steps=2, learning_rate=1e-2, lora_rank=lora, beta=100.0)
    start = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
    assert start["loss"] == pytest.approx(np.log(2), abs=1e-5)
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    before = drawn(pipeline)
    expected: Any = DiffusionPipeline.from_pretrained(folder)
    if lora:
        (file,) = (output / "lora").glob("*.safetensors")
        state = load_file(file)
        layers = {name.split(".lora_")[0].removeprefix("transformer.") for name in state}
        has_text_stream = any(name.endswith("add_q_proj") for name, _ in pipeline.transformer.named_modules())
        assert has_text_stream == bool(TEXT_STREAM & {name.split(".")[-1] for name in layers})
        for name in layers:  # what the file holds, merged by hand
            up, down = (state[f"transformer.{name}.lora_{which}.weight"] for which in "BA")
            expected.transformer.get_submodule(name).weight.data += up @ down
        pipeline.load_lora_weights(str(output / "lora"))
    else:
        pipeline = DiffusionPipeline.from_pretrained(output / "pipeline")
        (file,) = (output / "pipeline" / "transformer").glob("*.safetensors")
        expected.transformer.load_state_dict(load_file(file))
    after = drawn(pipeline)
    for (plain, *_), (got, *_), (wanted, *_) in zip(before, after, drawn(expected), strict=True):
        assert not torch.allclose(got, plain, atol=1e-3)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
    if not lora:
        return
    settings = EvaluateSettings(inference_steps=2, guidance=2.0, lora=str(output / "lora"), resolution=48)
    report = generate(open_model(str(folder)), PROMPTS[:1], settings, tmp_path / "images")
    assert report.num_images == 1
    generate(open_model(str(folder)), PROMPTS[:1], settings.model_copy(update={"lora": None}), tmp_path / "plain")
    images = [Image.open(tmp_path / name / "images" / "00000-0.png") for name in ("images", "plain")]
    assert [image.size for image in images] == [(48, 48)] * 2
    assert images[0].tobytes() != images[1].tobytes()
    save_file(state | {f"transformer.{layers.pop()}.dora_scale": torch.ones(8)}, tmp_path / "dora.safetensors")
    dora = settings.model_copy(update={"lora": str(tmp_path / "dora.safetensors")})
    with pytest.raises(ModelError, match=r"leaves 1 of its tensors out, the first: \S*\.dora_scale"):
        generate(open_model(str(folder)), PROMPTS[:1], dora, tmp_path / "dora")


def test_the_cache_is_verified_inverted_again_and_shown(made: str, folder: Path) -> None:
    model = open_model(str(folder))
    found = verify(made, model=model)
    assert found.findings == []
    assert max(found.reinverted.values()) < 1e-3
    assert measure_drift(made, model).verdict == "keep"
    cache = open_cache(made)
    assert cache.manifest.latent_shape == (16, 12, 12)
    (shard,) = cache
    x0 = shard.read("x0", slice(0, 2))
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    vae, latents = pipeline.vae, torch.from_numpy(x0.astype(np.float32))
    with torch.no_grad():
        if hasattr(vae.config, "latents_mean") and vae.config.get("z_dim"):
            mean, std = (torch.tensor(vae.config[f"latents_{name}"]).reshape(-1, 1, 1) for name in ("mean", "std"))
            decoded = vae.decode((latents * std + mean).unsqueeze(2)).sample.squeeze(2)
        else:
            decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    expected = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(vae_preview(cache, model)(x0) / 255 - expected).max() < 0.01


def test_prompts_are_stored_by_their_length_and_cut_where_the_cache_says(
    folder: Path, pairs: str, made: str, tmp_path: Path
) -> None:
    with pytest.raises(CacheMismatch, match="max_tokens"):
        precompute(folder, pairs, made, max_tokens=64)
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    encoded = [pipeline.encode_prompt(prompt, device="cpu")[0][0] for prompt in PROMPTS]
    wanted = [len(each.reshape(-1, each.shape[-1])) for each in encoded]
    for location, most in ((made, 512), (precompute(folder, pairs, str(tmp_path / "short"), max_tokens=9), 9)):
        cache = open_cache(location)
        (shard,) = cache
        text = cache.texts.need(next(name for name in shard.commit.texts if name != "empty"))
        lengths = dict(zip(text.text, text.read_stored("length").tolist(), strict=True))
        assert lengths == {prompt: min(most, tokens) for prompt, tokens in zip(PROMPTS, wanted, strict=True)}
        assert text.read_stored("embedding").shape[1] == min(most, max(wanted))
        assert [text.text[row] for row in text.commit.cut] == [
            prompt for prompt in text.text if wanted[PROMPTS.index(prompt)] > most
        ]


def test_the_network_alone_from_a_single_file(any_folder: Path, tmp_path: Path) -> None:
    (file,) = (any_folder / "transformer").glob("*.safetensors")
    single = Path(shutil.copy(file, tmp_path / "transformer.safetensors"))
    model = open_model(str(single), model_config=str(any_folder))
    assert model.fingerprints == open_model(str(any_folder)).fingerprints
    weights = load_file(single)
    for name, value in model.load_network().state_dict().items():
        assert torch.equal(value, weights[name])
    lost = next(name for name in weights if name.endswith("to_q.weight"))
    save_file({name: value for name, value in weights.items() if name != lost}, single)
    with pytest.raises(ModelError, match=lost):
        open_model(str(single), model_config=str(any_folder)).load_network()
    save_file(weights | {lost.replace("weight", "scale_weight"): torch.ones(1)}, single)
    with pytest.raises(ModelError, match="quantised"):
        open_model(str(single), model_config=str(any_folder))
