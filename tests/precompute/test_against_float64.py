"""A whole run's cache against a re-computation in float64 from diffusers' network, VAE, text encoders and scheduler.

Nothing of the inversion is used here: the network is called as diffusers calls it, x0(t) comes from
`DDIMScheduler.step`, the noise from it. Each record is judged from the stored point before it, so that roundings do not
add up and the tolerances can be those of one step.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from tests.precompute.conftest import png

HALF_STEP = 2.0**-11
"""Relative rounding error of float16."""


class Float64Model:
    """diffusers' components in double precision."""

    def __init__(self, folder: Path) -> None:
        pipeline: Any = DiffusionPipeline.from_pretrained(folder)
        self.pipeline = pipeline
        self.is_pixart = hasattr(pipeline, "transformer")
        network = pipeline.transformer if self.is_pixart else pipeline.unet
        self.network, self.vae = network.double().eval(), pipeline.vae.double().eval()
        # The multistep scheduler gives no x0(t) in one step; DDIM on the same table does.
        self.scheduler = (
            DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
            if self.is_pixart
            else pipeline.scheduler
        )
        self.scheduler.set_timesteps(self.scheduler.config.num_train_timesteps)
        self.is_sdxl = hasattr(pipeline, "text_encoder_2")

    def a_s(self, t: int) -> tuple[float, float]:
        abar = float(self.scheduler.alphas_cumprod[t])
        return abar**0.5, (1 - abar) ** 0.5

    @torch.no_grad()
    def latent(self, pixels: np.ndarray) -> np.ndarray:
        image = torch.tensor(pixels).permute(2, 0, 1)[None].double() / 127.5 - 1
        return (self.vae.encode(image).latent_dist.mean * self.vae.config.scaling_factor)[0].numpy()

    @torch.no_grad()
    def text(self, prompt: str) -> dict[str, np.ndarray]:
        """{condition: array} of one prompt."""

        def tokens(tokenizer: Any) -> torch.Tensor:
            return tokenizer(
                prompt,
                padding="max_length",
                truncation=True,
                max_length=tokenizer.model_max_length,
                return_tensors="pt",
            ).input_ids

        p = self.pipeline
        if self.is_pixart:
            told = p.tokenizer(
                prompt.lower(), padding="max_length", truncation=True, max_length=300, return_tensors="pt"
            )
            states = p.text_encoder.double()(told.input_ids, attention_mask=told.attention_mask)[0][0]
            length = int(told.attention_mask[0].sum())
            return {"embedding": states.numpy()[:length], "length": np.array(length)}
        if not self.is_sdxl:
            return {"embedding": p.text_encoder.double()(tokens(p.tokenizer))[0][0].numpy()}
        first = p.text_encoder.double()(tokens(p.tokenizer), output_hidden_states=True)
        second = p.text_encoder_2.double()(tokens(p.tokenizer_2), output_hidden_states=True)
        both = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return {"embedding": both[0].numpy(), "pooled": second.text_embeds[0].numpy()}

    @torch.no_grad()
    def predict(self, x: np.ndarray, t: int, told: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(noise, x0(t)) at one latent."""
        latent = torch.from_numpy(x.astype(np.float64))[None]
        given = {name: torch.tensor(values.astype(np.float64))[None] for name, values in told.items()}
        if self.is_pixart:
            output = self.network(
                latent,
                encoder_hidden_states=given["embedding"][:, : int(told["length"])],
                timestep=torch.tensor([t]),
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample.chunk(2, dim=1)[0]
        else:
            added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]} if self.is_sdxl else None
            output = self.network(latent, t, encoder_hidden_states=given["embedding"], added_cond_kwargs=added).sample
        clean = self.scheduler.step(output, t, latent).pred_original_sample[0].numpy()
        a, s = self.a_s(t)
        return (x - a * clean) / s, clean


@pytest.mark.parametrize("kind", ["sd15", "sd2-v", "sample", "sdxl", "pixart-sigma"])
def test_every_stored_tensor(
    kind: str, pipelines: Callable, examples: Callable, write_tars: Callable, run: Callable, tmp_path: Path
) -> None:
    pairs = examples(2)
    source = write_tars(tmp_path / "pairs", pairs, 2)
    cache = run.cache(source, pipelines(kind), tmp_path / "cache", grid_points=4, timesteps_per_pair=4)
    model = Float64Model(pipelines(kind))
    (shard,) = cache
    read = {path: shard.read(path) for path in (spec.path for spec in cache.manifest.arrays)}
    assert read["pair/id"].tolist() == [pair.pair_id for pair in pairs]
    assert read["group/id"].tolist() == [pair.pair_id for pair in pairs]
    assert shard.sides().tolist() == [[0, 1], [2, 3]]
    assert shard.prompts().tolist() == [pair.prompt for pair in pairs]
    worst: dict[str, float] = {}

    def close(name: str, got: np.ndarray, want: np.ndarray, tolerance: float) -> None:
        scale = np.sqrt(np.mean(np.square(want)))
        error = float(np.abs(got.astype(np.float64) - want).max() / scale)
        worst[name] = max(worst.get(name, 0.0), error)
        assert error < tolerance, (name, error)

    for row, pair in enumerate(pairs):
        wanted = model.text(pair.prompt)
        place, prompt = read["group/prompt"][row]
        texts = cache.texts.need(shard.commit.texts[place])
        assert texts.text[prompt] == pair.prompt
        told = {name: texts.read_stored(name)[prompt] for name in wanted}
        if kind == "pixart-sigma":
            assert int(told["length"]) == wanted["length"]
            told["embedding"] = told["embedding"][: int(told["length"])]
        close("embedding", told["embedding"], wanted["embedding"], 4 * HALF_STEP)
        if kind == "sdxl":
            close("pooled", told["pooled"], wanted["pooled"], 4 * HALF_STEP)
        for side, image in enumerate((pair.win, pair.lose)):
            at = 2 * row + side
            assert read["image/id"][at] == hashlib.blake2b(png(image), digest_size=16).hexdigest()
            if kind == "sdxl":
                told["time_ids"] = read["image/time_ids"][at]
                assert told["time_ids"].tolist() == [32, 32, 0, 0, 32, 32]
            x0 = read["x0"][at]
            close("x0", x0, model.latent(image), 4 * HALF_STEP)
            x0 = x0.astype(np.float64)
            # The trajectory leaves the clean latent with eps at (x0, label 0).
            delta, clean = model.predict(x0, 0, told)[0], x0
            for step, t in enumerate(read["timestep"][row].tolist()):
                a, s = model.a_s(t)
                x_t, target = read["x_t"][at, step], read["target"][at, step]
                close("step", x_t, a * clean + s * delta, 8 * HALF_STEP)
                # The stored-point rule, bit for bit.
                rounded = (a * x0 + s * target.astype(np.float64)).astype(np.float16)
                np.testing.assert_array_equal(x_t, rounded)
                delta, clean = model.predict(x_t.astype(np.float64), t, told)
                close("delta", read["delta"][at, step], delta, 4 * HALF_STEP)
                close("x0_t", read["x0_t"][at, step], clean, 4 * HALF_STEP)
                error = np.mean(np.square(target.astype(np.float64) - delta))
                got = float(read["reference_error"][at, step])
                worst["E_ref"] = max(worst.get("E_ref", 0.0), abs(got / error - 1))
                assert got == pytest.approx(error, rel=2e-4, abs=1e-9)
    print(kind, {name: f"{value:.1e}" for name, value in worst.items()})


def _uniform(*parts: object) -> float:
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 32) / 2**32


def test_the_grid_comes_from_the_hash_of_seed_and_group_id(
    pipelines: Callable, examples: Callable, write_tars: Callable, run: Callable, tmp_path: Path, by_id: Callable
) -> None:
    pairs = examples(6)
    source = write_tars(tmp_path / "pairs", pairs, 6)
    whole = by_id(
        run.cache(source, pipelines(), tmp_path / "all", grid_points=4, timesteps_per_pair=4, seed=3), "timestep"
    )
    some = by_id(
        run.cache(source, pipelines(), tmp_path / "some", grid_points=4, timesteps_per_pair=2, seed=3), "timestep"
    )
    for pair in pairs:
        u = _uniform(3, pair.pair_id, "offset")
        grid = [int((i + u) * 1000 // 4) for i in range(4)]
        assert whole[pair.pair_id].tolist() == grid
        kept = some[pair.pair_id].tolist()
        assert kept == sorted(set(kept))
        assert set(kept) < set(grid)
    assert len({tuple(row - row[0]) for row in some.values()}) > 1  # not the same positions for all


def test_sdxl_time_ids_tell_original_size_and_crop(
    pipelines: Callable, examples: Callable, write_tars: Callable, run: Callable, tmp_path: Path
) -> None:
    pair = examples(1, size=(64, 48))[0]  # width 64, height 48: resized to 43 x 32, cropped from left 5
    cache = run.cache(write_tars(tmp_path / "pairs", [pair], 1), pipelines("sdxl"), tmp_path / "cache")
    (shard,) = cache
    assert shard.read("image/time_ids").tolist() == [[48, 64, 0, 5, 32, 32]] * 2


def test_sdxl_empty_prompt_is_zero_as_its_pipeline_says(
    pipelines: Callable, examples: Callable, write_tars: Callable, run: Callable, tmp_path: Path
) -> None:
    cache = run.cache(write_tars(tmp_path / "p", examples(1), 1), pipelines("sdxl"), tmp_path / "cache")
    empty, other = cache.texts.need("empty"), next(each for each in cache.texts if each.name != "empty")
    assert empty.text == ("",)
    for name in ("embedding", "pooled"):
        assert not empty.read_stored(name).any()
        assert other.read_stored(name)[0].any()
