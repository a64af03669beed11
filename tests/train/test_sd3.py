"""SD3 on the whole way: precompute, verify, drift, train, and what its pipeline's own loader makes of the result."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file

from inpo.common.cache import open_cache
from inpo.common.cache_settings import CacheSettings
from inpo.common.errors import CacheMismatch, ModelError, UsageError
from inpo.common.models import open_model
from inpo.common.testing import save_tiny_pipeline
from inpo.evaluation.generate import generate
from inpo.evaluation.settings import EvaluateSettings
from inpo.inspection.drift import measure_drift
from inpo.inspection.preview import linear_preview, vae_preview
from inpo.inspection.verify import verify
from inpo.precompute.run import run_precompute
from inpo.precompute.settings import RayOptions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("model") / "sd3", "sd3")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pairs of images that are not square, under prompts of two lengths."""
    place = tmp_path_factory.mktemp("pairs")
    rows = []
    for row in range(4):
        draw = np.random.default_rng(row)
        for side in ("win", "lose"):
            pixels = draw.integers(0, 256, (40 + row, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{row}-{side}.png")
        prompt = "a red cat" if row % 2 else f"the sky {row} " * 20
        rows.append({"win": f"{row}-win.png", "lose": f"{row}-lose.png", "prompt": prompt, "id": str(row)})
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(place)


@pytest.fixture(scope="module")
def precompute(folder: Path, pairs: str) -> Callable[..., str]:
    def make(location: Path, model: Path | None = None, **settings: Any) -> str:
        settings = {
            "resolution": 32,
            "grid_points": 3,
            "timesteps_per_pair": 3,
            "decode_workers": 0,
            "measure_inversion": 1.0,
            **settings,
        }
        sections = ({"model": str(model or folder)}, {"pairs": pairs, "cache": str(location)}, settings)
        assert run_precompute(None, *sections, ray_options=RayOptions(), dry_run=False) == 0
        return str(location)

    return make


@pytest.fixture(scope="module")
def made(precompute: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A full cache with everything that an objective may ask for; read only."""
    return precompute(tmp_path_factory.mktemp("cache") / "c", extra=("delta_prev", "eps_ref"))


def velocity(transformer: Any, embedding: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """As the pipeline asks for it, at two times."""
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return transformer(
            hidden_states=x,
            timestep=torch.tensor([120.0, 870.0]),
            encoder_hidden_states=embedding,
            pooled_projections=pooled,
        ).sample


def told(pipeline: Any) -> tuple[torch.Tensor, torch.Tensor]:
    embedding, _, pooled, _ = pipeline.encode_prompt(
        ["a red cat", "the sky"], None, None, do_classifier_free_guidance=False, device="cpu"
    )
    return embedding, pooled


def test_full_fine_tuning_is_read_back_by_the_pipeline(
    made: str, folder: Path, run: Callable[..., Path], tmp_path: Path
) -> None:
    output = run(model=str(folder), caches=[made], steps=2, learning_rate=1e-3, beta=100.0)
    trained: Any = DiffusionPipeline.from_pretrained(output / "pipeline")
    base: Any = DiffusionPipeline.from_pretrained(folder)
    assert type(trained) is StableDiffusion3Pipeline
    assert type(trained.scheduler) is FlowMatchEulerDiscreteScheduler
    assert dict(trained.scheduler.config) == dict(base.scheduler.config)
    ours = open_model(str(output / "pipeline")).load_network()
    condition = told(base)
    assert not torch.allclose(velocity(trained.transformer, *condition), velocity(base.transformer, *condition))
    assert torch.equal(velocity(trained.transformer, *condition), velocity(ours, *condition))
    start = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
    assert start["loss"] == pytest.approx(np.log(2), abs=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_is_read_back_by_the_pipelines_own_loader(
    made: str, folder: Path, run: Callable[..., Path], tmp_path: Path, checkpointing: bool
) -> None:
    output = run(
        model=str(folder),
        caches=[made],
        steps=3,
        learning_rate=1e-2,
        lora_rank=2,
        lora_alpha=4,
        beta=100.0,
        gradient_checkpointing=checkpointing,
        save_every=3,
    )
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    condition = told(pipeline)
    base = velocity(pipeline.transformer, *condition)
    pipeline.load_lora_weights(str(output / "lora"))
    reloaded = velocity(pipeline.transformer, *condition)
    assert not torch.allclose(reloaded, base, atol=1e-4)
    layers = {
        name.split(".lora_")[0].split(".")[-1] for name, _ in pipeline.transformer.named_parameters() if "lora" in name
    }
    assert {"to_q", "add_q_proj", "to_add_out"} <= layers  # the text stream too

    # What the trainer held when it ended, merged by hand.
    (file,) = (output / "lora").glob("*.safetensors")
    state = load_file(file)
    merged: Any = DiffusionPipeline.from_pretrained(folder).transformer
    for name in {name.split(".lora_")[0] for name in state}:
        change = state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
        merged.get_submodule(name.removeprefix("transformer.")).weight.data += change
    torch.testing.assert_close(velocity(merged, *condition), reloaded, rtol=0, atol=1e-5)

    settings = EvaluateSettings(inference_steps=2, guidance=2.0, seed=3, lora=str(output / "lora"), dtype="float32")
    assert generate(open_model(str(folder)), ["a red cat"], settings, tmp_path / "images").num_images == 1
    (row,) = [json.loads(line) for line in (tmp_path / "images" / "images.jsonl").read_text().splitlines()]
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(row["seed"])
    (expected,) = pipeline("a red cat", num_inference_steps=2, guidance_scale=2.0, generator=generator).images
    got = np.asarray(Image.open(tmp_path / "images" / row["file"]), np.int16)
    assert np.abs(got - np.asarray(expected, np.int16)).max() <= 1


@pytest.mark.parametrize("objective", ["inpo", "kto", "sft", "mapo", "inversion_dpo"])
def test_objectives_of_every_kind_start_at_the_reference(
    made: str, folder: Path, run: Callable[..., Path], objective: str
) -> None:
    output = run(model=str(folder), caches=[made], steps=1, objective=objective, lora_rank=2)
    start = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(start["margin"]) < (2e-2 if objective == "inversion_dpo" else 1e-3)
    if objective in ("inpo", "inversion_dpo"):
        assert start["loss"] == pytest.approx(np.log(2), abs=1e-2)


def test_dpo_trains_on_a_noise_cache(
    precompute: Callable[..., str], folder: Path, run: Callable[..., Path], tmp_path: Path
) -> None:
    cache = precompute(tmp_path / "noise", inverter="noise", profile="lean")
    output = run(model=str(folder), caches=[cache], steps=1, objective="dpo", lora_rank=2)
    assert (output / "lora").is_dir()


def test_the_cache_is_verified_and_inverted_again(
    made: str, folder: Path, precompute: Callable[..., str], tmp_path: Path
) -> None:
    model = open_model(str(folder))
    for location in (
        made,
        precompute(tmp_path / "empty", guidance=0.0, inverter="ab2", extra=("eps_ref",)),
        precompute(tmp_path / "lean", profile="lean", inverter="noise", levels="uniform", shift="1.5"),
    ):
        found = verify(location, model=model)
        assert found.findings == []
        assert max(found.reinverted.values()) < 1e-3
        assert found.num_checked["reference_error" if location != str(tmp_path / "lean") else "rows"] > 0
        drift = measure_drift(location, model)
        assert (drift.verdict, drift.num_not_finite) == ("keep", 0)
    other = save_tiny_pipeline(tmp_path / "other", "sd3", seed=1)
    assert measure_drift(made, open_model(str(other))).verdict != "keep"


def test_the_reference_error_is_of_the_velocity(made: str) -> None:
    (shard,) = open_cache(made)
    v = shard.read("delta").astype(np.float64) - shard.read("x0_t")
    expected = np.square(shard.read("target").astype(np.float64) - v).mean((-3, -2, -1))
    np.testing.assert_allclose(shard.read("reference_error"), expected, rtol=5e-3)
    of_noise = np.square(shard.read("target").astype(np.float64) - shard.read("delta")).mean((-3, -2, -1))
    assert (np.abs(of_noise / expected - 1) > 0.1).all()


def test_previews(made: str, folder: Path) -> None:
    cache = open_cache(made)
    (shard,) = cache
    x0 = shard.read("x0")
    preview = linear_preview(cache)
    assert "false colours" in preview.note
    assert preview(x0).shape == (8, 8, 8, 3)
    decoded = vae_preview(cache, open_model(str(folder)))(x0)
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    with torch.no_grad():
        scaled = torch.from_numpy(x0.astype(np.float32)) / 1.5305 + 0.0609
        expected = pipeline.image_processor.postprocess(pipeline.vae.decode(scaled).sample, output_type="np")
    assert np.abs(decoded / 255 - expected).max() < 0.01


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"shift": "2"}, "levels"),
        ({"levels": "uniform"}, "levels"),
        ({"max_tokens": 128}, "max_tokens"),
        ({"dtype": "bfloat16"}, "network_dtype"),
    ],
)
def test_other_settings_into_one_cache_are_refused(
    precompute: Callable[..., str], made: str, settings: dict[str, Any], name: str
) -> None:
    with pytest.raises(CacheMismatch, match=name):
        precompute(Path(made), extra=("delta_prev", "eps_ref"), **settings)


def test_caches_of_other_tokens_or_shift_are_not_trained_on_together(
    precompute: Callable[..., str], made: str, folder: Path, run: Callable[..., Path], tmp_path: Path
) -> None:
    for name, settings in (("max_tokens", {"max_tokens": 64}), ("levels", {"shift": "none"})):
        other = precompute(tmp_path / name, **settings)
        with pytest.raises(CacheMismatch, match=name):
            run(model=str(folder), caches=[made, other])


def test_a_model_of_another_family_is_refused(
    precompute: Callable[..., str], made: str, run: Callable[..., Path], tmp_path: Path
) -> None:
    for kind in ("pixart-sigma", "sd15"):
        other = save_tiny_pipeline(tmp_path / kind, kind)  # type: ignore[arg-type]
        with pytest.raises(CacheMismatch):
            run(model=str(other), caches=[made])
        with pytest.raises(CacheMismatch):
            precompute(Path(made), other)


@pytest.mark.parametrize(
    ("kind", "settings", "option"),
    [
        ("sd15", {"levels": "uniform"}, "--levels"),
        ("sd15", {"shift": "auto"}, "--shift"),
        ("pixart-sigma", {"shift": "3"}, "--shift"),
        ("sd15", {"max_tokens": 77}, "--max-tokens"),
        ("sd15", {"embedded_guidance": 1.0}, "--embedded-guidance"),
        ("sd3", {"embedded_guidance": 1.0}, "--embedded-guidance"),
        ("sd3", {"max_tokens": 1000}, "--max-tokens"),
    ],
)
def test_options_that_a_model_has_no_use_for_are_refused(
    precompute: Callable[..., str], tmp_path: Path, kind: Any, settings: dict[str, Any], option: str
) -> None:
    with pytest.raises(UsageError) as caught:
        precompute(tmp_path / "cache", save_tiny_pipeline(tmp_path / "model", kind), **settings)
    assert caught.value.where == option
    assert not (tmp_path / "cache").exists()


def test_the_released_loop_is_refused(precompute: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="released code does not invert"):
        precompute(tmp_path / "cache", faithful=True)


@pytest.mark.parametrize("wrong", ["0", "-1", "much", "nan"])
def test_a_shift_is_a_word_or_a_number(wrong: str) -> None:
    with pytest.raises(ValueError, match="auto, none, or a number"):
        CacheSettings(shift=wrong)
    assert CacheSettings(shift=3).shift == CacheSettings(shift="3.0").shift == "3.0"


def test_settings_come_back_from_the_manifest(made: str) -> None:
    found = CacheSettings.of(open_cache(made).manifest)
    assert (found.levels, found.shift, found.max_tokens, found.embedded_guidance) == ("logit-normal", "3.0", 256, None)


def test_a_compact_cache_loses_nothing_at_the_reference(
    precompute: Callable[..., str], folder: Path, run: Callable[..., Path], tmp_path: Path
) -> None:
    """Eight bits and a scale for each image's channel: x_t is of the rounded values, and so are the errors."""
    (lean,), (compact,) = caches = [
        open_cache(precompute(tmp_path / profile, profile=profile, noised_start=0.4)) for profile in ("lean", "compact")
    ]
    assert caches[1].manifest.arrays != caches[0].manifest.arrays
    raw = {path: zarr.open_group(compact.location)[path][...] for path in ("x0", "x0_scale", "target", "target_scale")}
    read = {path: compact.read(path) for path in ("x0", "target", "x_t", "timestep", "image/group", "reference_error")}
    for path in ("x0", "target"):
        assert raw[path].dtype == np.int8
        exact = raw[path].astype(np.float64) * raw[f"{path}_scale"].astype(np.float64)[..., None, None]
        assert read[path].dtype == np.float16
        np.testing.assert_array_equal(read[path].astype(np.float64), exact)
        # Half a step, of at most a 113th of the channel's largest, beside the images' own change by then.
        apart = np.abs(read[path].astype(np.float64) - lean.read(path))
        assert (apart[:, 0] if path == "target" else apart).mean() < np.abs(exact).max() / 113
    t = np.array(caches[1].manifest.levels.noise)[read["timestep"][read["image/group"]]][..., None, None, None]
    x0, target = read["x0"].astype(np.float64)[:, None], read["target"].astype(np.float64)
    np.testing.assert_array_equal(read["x_t"], (x0 + t * target).astype(np.float16))
    images, records = np.array([3, 0]), np.array([1, 2])
    for path in ("target", "x_t"):
        np.testing.assert_array_equal(compact.read_records(path, images, records), read[path][images, records])
    sizes = [
        sum(each.commit.files[f"{path}/c/" + "/".join("0" * rank)] for path, rank in (("x0", 4), ("target", 5)))
        for each in (lean, compact)
    ]
    assert sizes[1] < 0.6 * sizes[0]
    assert (np.abs(read["reference_error"] / lean.read("reference_error") - 1) < 0.02).all()
    found = verify(caches[1].location, model=open_model(str(folder)))
    assert found.findings == []
    assert max(found.reinverted.values()) < 1e-3
    output = run(model=str(folder), caches=[caches[1].location], steps=1, lora_rank=2, beta=2000.0)
    start = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(start["margin"]) < 1e-3
    assert start["loss"] == pytest.approx(np.log(2), abs=1e-4)


def test_the_tokens_are_those_asked_for(precompute: Callable[..., str], tmp_path: Path) -> None:
    cache = open_cache(precompute(tmp_path / "cache", max_tokens=8))
    (shard,) = cache
    text = cache.texts.need(next(name for name in shard.commit.texts if name != "empty"))
    assert text.read_stored("embedding").shape[1:] == (16 + 8, 96)
    assert [text.text[row][:3] for row in text.commit.cut] == ["the"] * 2  # a red cat fits


@pytest.mark.parametrize(
    ("component", "values", "words"),
    [("transformer", {"in_channels": 32}, "in_channels 32"), ("scheduler", {"invert_sigmas": True}, "rectified flow")],
)
def test_models_of_another_kind_are_refused(
    folder: Path, tmp_path: Path, component: str, values: dict[str, Any], words: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (file,) = (copy / component).glob("*config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(ModelError) as caught:
        open_model(str(copy))
    assert words in str(caught.value)
