"""A flow's cache against a float64 re-computation with diffusers' own transformer, VAE and text encoders.

Nothing of ours is used but the reader: v comes from the transformer, called as its pipeline calls it. Each record is
judged from the stored point before it, so that the tolerances are those of one step.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from inpo.common.cache import Cache

HALF_STEP = 2.0**-11


class Float64Flow:
    """diffusers' components in double precision, but for what the transformer makes of its time in float32."""

    guidance = 1.0

    def __init__(self, folder: Path) -> None:
        self.pipeline: Any = DiffusionPipeline.from_pretrained(folder)
        self.pipeline.to(torch.float64)
        self.kind = type(self.pipeline).__name__

    @torch.no_grad()
    def latent(self, pixels: np.ndarray) -> np.ndarray:
        vae = self.pipeline.vae
        image = torch.tensor(pixels).permute(2, 0, 1)[None].double() / 127.5 - 1
        if self.kind == "QwenImagePipeline":  # one frame, and a scale for each channel
            mean = vae.encode(image.unsqueeze(2)).latent_dist.mean[0, :, 0].numpy()
            shift, scale = (np.array(vae.config[f"latents_{name}"])[:, None, None] for name in ("mean", "std"))
            return (mean - shift) / scale
        mean = vae.encode(image).latent_dist.mean
        return ((mean - vae.config.shift_factor) * vae.config.scaling_factor)[0].numpy()

    @torch.no_grad()
    def text(self, prompt: str) -> dict[str, np.ndarray]:
        encode = self.pipeline.encode_prompt
        if self.kind == "FluxPipeline":
            embedding, pooled, _ = encode(prompt, None, device="cpu", max_sequence_length=512)
        elif self.kind == "StableDiffusion3Pipeline":
            embedding, _, pooled, _ = encode(
                prompt, None, None, do_classifier_free_guidance=False, device="cpu", max_sequence_length=256
            )
        else:
            first, _ = encode(prompt, device="cpu")
            embedding = first[0] if isinstance(first, list) else first
            return {"embedding": embedding.reshape(-1, embedding.shape[-1]).numpy()}
        return {"embedding": embedding[0].numpy(), "pooled": pooled[0].numpy()}

    @torch.no_grad()
    def velocity(self, x: np.ndarray, t: float, told: dict[str, np.ndarray]) -> np.ndarray:
        latent, pipeline = torch.from_numpy(x.astype(np.float64))[None], self.pipeline
        text = torch.from_numpy(told["embedding"].astype(np.float64))[None]
        pooled = torch.from_numpy(told["pooled"].astype(np.float64))[None] if "pooled" in told else None
        if self.kind == "ZImagePipeline":
            # The transformer takes its time to float32 and then to its weights' dtype.
            time = torch.tensor([1 - t], dtype=torch.float64).float()
            (output,) = pipeline.transformer([latent[0].unsqueeze(1)], time, [text[0]]).sample
            return -output.squeeze(1).numpy()
        if self.kind == "StableDiffusion3Pipeline":
            time = torch.tensor([1000 * t]).float()
            output = pipeline.transformer(latent, text, pooled, time)
            return output.sample[0].numpy()
        _, channels, height, width = latent.shape
        options: dict[str, Any] = {"img_shapes": [[(1, height // 2, width // 2)]]}
        if self.kind == "FluxPipeline":
            options = {
                "pooled_projections": pooled,
                "guidance": torch.tensor([self.guidance]) if pipeline.transformer.config.guidance_embeds else None,
                "txt_ids": torch.zeros(text.shape[1], 3),
                "img_ids": pipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32),
            }
        output = pipeline.transformer(
            hidden_states=pipeline._pack_latents(latent, 1, channels, height, width),
            timestep=torch.tensor([t], dtype=torch.float64),
            encoder_hidden_states=text,
            **options,
        ).sample
        scale = pipeline.vae_scale_factor
        return pipeline._unpack_latents(output, height * scale, width * scale, scale).reshape(latent.shape)[0].numpy()


@pytest.fixture(scope="module")
def float64(pipelines: Callable) -> Callable[[str], Float64Flow]:
    """float64(kind): the tiny pipeline, loaded once."""
    return cache(lambda kind: Float64Flow(pipelines(kind)))


@pytest.fixture
def made(
    pipelines: Callable, examples: Callable, write_tars: Callable, run: Callable, tmp_path: Path
) -> Callable[..., Cache]:
    source = write_tars(tmp_path / "pairs", examples(2), 2)

    def make(name: str = "cache", kind: str = "sd3", **settings: Any) -> Cache:
        settings = {"grid_points": 4, "timesteps_per_pair": 4} | settings
        cache: Cache = run.cache(source, pipelines(kind), tmp_path / name, **settings)
        return cache

    return make


def told_of(cache: Cache, shard: Any, group: int) -> dict[str, np.ndarray]:
    place, row = shard.read("group/prompt")[group]
    texts = cache.texts.need(shard.commit.texts[place])
    told = {name: texts.read_stored(name)[row] for name in cache.manifest.text_conditions}
    if "length" in told:  # what no mask lets through
        length = told.pop("length")
        assert not told["embedding"][length:].any()
        told["embedding"] = told["embedding"][:length]
    return told


@pytest.mark.parametrize(
    ("kind", "shift", "tokens", "static"),
    [
        ("sd3", 3.0, 256, {}),
        # 4 x 4 image tokens, where the scheduler's line goes through 0.5 at 256 and 1.15 at 4096.
        ("flux", np.exp(0.5 - 240 * 0.65 / 3840), 512, {"embedded_guidance": 3.5}),
        ("flux-schnell", 1.0, 512, {}),
        ("qwen-image", np.exp(0.5 - 240 * 0.4 / 7936), 512, {}),
        ("z-image", 3.0, 512, {}),
    ],
)
def test_every_stored_tensor(
    made: Callable,
    float64: Callable,
    examples: Callable,
    kind: str,
    shift: float,
    tokens: int,
    static: dict[str, float],
) -> None:
    cache, model = made(kind=kind, **static), float64(kind)
    model.guidance = static.get("embedded_guidance", 1.0)
    (shard,) = cache
    levels = cache.manifest.levels
    assert (levels.space, levels.density, levels.floor) == ("velocity", "logit-normal", 0.05)
    assert levels.shift == pytest.approx(shift)
    assert (cache.manifest.max_tokens, cache.manifest.static) == (tokens, static)
    read = {path: shard.read(path) for path in ("x0", "x_t", "delta", "x0_t", "target", "reference_error", "timestep")}

    def close(got: np.ndarray, want: np.ndarray, tolerance: float) -> None:
        scale = 1 + np.sqrt(np.mean(np.square(want)))
        assert np.abs(got.astype(np.float64) - want).max() / scale < tolerance

    for group, pair in enumerate(examples(2)):
        told, wanted = told_of(cache, shard, group), model.text(pair.prompt)
        for name, want in wanted.items():
            close(told[name], want, 4 * HALF_STEP)
        for image, pixels in ((2 * group, pair.win), (2 * group + 1, pair.lose)):
            close(read["x0"][image], model.latent(pixels), 4 * HALF_STEP)
            x0 = read["x0"][image].astype(np.float64)
            x, t_before = x0, 0.0
            for record, timestep in enumerate(read["timestep"][group].tolist()):
                t = levels.noise[timestep]
                v = model.velocity(x, t_before, told)
                x_t, target = read["x_t"][image, record], read["target"][image, record].astype(np.float64)
                # Euler in t, which is the ddim step; what is stored is the nearest float16 of target, then of x_t.
                euler = x + (t - t_before) * v
                assert np.abs((euler - x0) / t - target).max() < HALF_STEP * np.abs(target).max() + 1e-5 / t
                np.testing.assert_array_equal(x_t, (x0 + t * target).astype(np.float16))
                x, t_before = x_t.astype(np.float64), t
                v = model.velocity(x, t, told)
                close(read["delta"][image, record], x + (1 - t) * v, 2 * HALF_STEP)
                close(read["x0_t"][image, record], x - t * v, 2 * HALF_STEP)
                error = np.mean(np.square(target - v))
                assert float(read["reference_error"][image, record]) == pytest.approx(error, rel=2e-5, abs=1e-7)
                # E_ref^v = MSE(x0(t) - x0) / t^2, but for the rounding of x_t.
                also = np.sqrt(np.mean(np.square(x - t * v - x0))) / t
                assert abs(also - np.sqrt(error)) < HALF_STEP * np.abs(x).max() / t


def test_a_lean_cache_gives_the_same_points(made: Callable, run: Callable) -> None:
    (full,), (lean,) = made("full"), made("lean", profile="lean")
    assert "x_t" not in lean.stored
    np.testing.assert_array_equal(full.read("x_t").view(np.uint16), lean.read("x_t").view(np.uint16))
    images, records = np.array([3, 0]), np.array([1, 2])
    np.testing.assert_array_equal(full.read("x_t")[images, records], lean.read_records("x_t", images, records))


@pytest.mark.parametrize(
    "settings",
    [
        {"inverter": "ab2"},
        {"inverter": "fireflow"},
        {"inverter": "fixed_point", "iterations": 3},
        {"inverter": "noise"},
        {"noised_start": 0.3, "refine_start": 2},
        {"guidance": 0.0},
        {"guidance": 3.0, "levels": "uniform", "shift": "none"},
    ],
)
def test_errors_are_the_velocitys_whatever_inverts(made: Callable, float64: Callable, settings: dict) -> None:
    cache, model = made(extra=("eps_ref", "delta_prev"), **settings), float64("sd3")
    (shard,) = cache
    read = {path: shard.read(path) for path in ("x0", "x_t", "delta_prev", "eps_ref", "target", "reference_error")}
    times = np.array(cache.manifest.levels.noise)[shard.timesteps()]
    for image, record in np.ndindex(4, 4):
        t, x = times[image, record], read["x_t"][image, record].astype(np.float64)
        x0, target = (each.astype(np.float64) for each in (read["x0"][image], read["target"][image, record]))
        np.testing.assert_array_equal(read["x_t"][image, record], (x0 + t * target).astype(np.float16))
        v = model.velocity(x, t, told_of(cache, shard, image // 2))
        assert float(read["reference_error"][image, record]) == pytest.approx(np.mean((target - v) ** 2), rel=2e-5)
        assert np.abs(read["eps_ref"][image, record] - (x + (1 - t) * v)).max() < 4 * HALF_STEP * (1 + np.abs(x).max())
    if settings.get("inverter") == "noise":
        # The noise of a group is its images' own at a timestep; the target is noise - x0.
        noise = read["target"].astype(np.float64) + read["x0"][:, None].astype(np.float64)
        assert np.abs(noise[0] - noise[1]).max() < 4 * HALF_STEP * 6
        assert np.abs(noise - read["delta_prev"]).max() < 4 * HALF_STEP * 6
        assert abs(noise.std() - 1) < 0.1
