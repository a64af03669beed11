"""A recorded cache against float64: diffusers' own network, scheduler and VAE make the images again.

Nothing of the sampler is used. diffusers' multistep scheduler of order 1, and its Euler for flows, step on the
timesteps that the cache's group must have by cache_schema.md; each record is judged at its stored point.
"""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

from inpo.common.cache import Cache
from inpo.common.seeding import uniform
from tests.precompute.test_against_float64 import Float64Model
from tests.precompute.test_flow_against_float64 import Float64Flow, told_of
from tests.rounds.conftest import PROMPTS, Samples

HALF_STEP = 2.0**-11
STEPS, KEPT, GUIDANCE = 5, 3, 2.0


def pictures(cache: Path) -> dict[str, dict[str, Any]]:
    """{pair id: what the tars beside a cache hold of it}."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(Path(f"{cache}-images").glob("*.tar")):
        with tarfile.open(file) as tar:
            samples: dict[str, dict[str, bytes]] = {}
            for member in tar.getmembers():
                key, _, suffix = member.name.partition(".")
                stream = tar.extractfile(member)
                assert stream is not None
                samples.setdefault(key, {})[suffix] = stream.read()
        for each in samples.values():
            told = json.loads(each["json"])
            found[told["id"]] = told | {side: each[f"{side}.png"] for side in ("win", "lose")}
    return found


def grid_of(group: str, total: int) -> np.ndarray:
    return np.floor((np.arange(STEPS) + uniform(0, group, "offset")) * total / STEPS).astype(int)


class NoiseSampler:
    """A UNet under diffusers' DDIM: the multistep solver of order 1, which takes any timesteps."""

    def __init__(self, folder: Path) -> None:
        self.model = Float64Model(folder)

    def path(self, noise: np.ndarray, grid: np.ndarray, texts: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
        """x at the noisy end, at the grid downwards, and at the clean end."""
        config = dict(self.model.scheduler.config)
        solver = DPMSolverMultistepScheduler.from_config(
            config, solver_order=1, algorithm_type="dpmsolver++", final_sigmas_type="zero", prediction_type="epsilon"
        )
        solver.set_timesteps(timesteps=[999, *grid[::-1].tolist()])
        points = [noise]
        for t in solver.timesteps.tolist():
            empty, caption = (self.model.predict(points[-1], t, each)[0] for each in texts)
            guided = torch.from_numpy(empty + GUIDANCE * (caption - empty))[None]
            points.append(solver.step(guided, t, torch.from_numpy(points[-1])[None]).prev_sample[0].numpy())
        return points

    def record(self, x: np.ndarray, t: int, told: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(what the target is of, delta, x0(t))."""
        eps, clean = self.model.predict(x, t, told)
        return eps, eps, clean

    def mixture(self, cache: Cache, t: int) -> tuple[float, float]:
        return self.model.a_s(t)

    @torch.no_grad()
    def image(self, x0: np.ndarray) -> np.ndarray:
        vae = self.model.vae
        return vae.decode(torch.from_numpy(x0.astype(np.float64))[None] / vae.config.scaling_factor).sample[0].numpy()


class FlowSampler:
    """A transformer under diffusers' Euler."""

    def __init__(self, folder: Path) -> None:
        self.model = Float64Flow(folder)
        self.times: dict[int, float] = {}

    def path(self, noise: np.ndarray, grid: np.ndarray, texts: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
        euler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        times = [1.0, *(self.times[t] for t in grid[::-1].tolist())]
        euler.set_timesteps(sigmas=times)
        points = [noise]
        for t, step in zip(times, euler.timesteps, strict=True):
            empty, caption = (self.model.velocity(points[-1], t, each) for each in texts)
            guided = torch.from_numpy(empty + GUIDANCE * (caption - empty))[None]
            moved = euler.step(guided, step, torch.from_numpy(points[-1])[None]).prev_sample[0].numpy()
            points.append(moved.astype(np.float64))
        return points

    def record(self, x: np.ndarray, t: int, told: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        time = self.times[t]
        v = self.model.velocity(x, time, told)
        return v, x + (1 - time) * v, x - time * v

    def mixture(self, cache: Cache, t: int) -> tuple[float, float]:
        return 1.0, self.times[t]

    @torch.no_grad()
    def image(self, x0: np.ndarray) -> np.ndarray:
        vae = self.model.pipeline.vae
        latent = torch.from_numpy(x0.astype(np.float64))[None] / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(latent).sample[0].numpy()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers', of timesteps
@pytest.mark.parametrize("kind", ["sd15", "sd2-v", "sd3"])
def test_every_stored_tensor(kind: str, pipelines: Callable, sample: Samples, tmp_path: Path) -> None:
    model = pipelines(kind)
    sample.prompts.write_text("\n".join(PROMPTS[:2]) + "\n")
    cache = sample.cache(model, tmp_path / "cache", inference_steps=STEPS, timesteps_per_pair=KEPT, guidance=GUIDANCE)
    manifest = cache.manifest
    assert (manifest.inverter.name, manifest.inverter.grid_points, manifest.inverter.guidance) == ("recorded", 5, 2.0)
    (shard,) = cache
    oracle: NoiseSampler | FlowSampler = FlowSampler(model) if kind == "sd3" else NoiseSampler(model)
    if isinstance(oracle, FlowSampler):
        oracle.times = dict(enumerate(manifest.levels.noise))
    files = pictures(tmp_path / "cache")
    names = ("x0", "x_t", "delta", "x0_t", "target", "reference_error", "timestep", "image/group", "group/id")
    read = {name: shard.read(name) for name in names}
    empty = cache.texts.need("empty")
    nothing = {name: empty.read_stored(name)[0] for name in manifest.text_conditions}

    def close(name: str, got: np.ndarray, want: np.ndarray, tolerance: float) -> None:
        scale = np.sqrt(np.mean(np.square(want)))
        error = float(np.abs(got.astype(np.float64) - want).max() / scale)
        assert error < tolerance, (name, error)

    for pair, sides in enumerate(shard.sides()):
        told = files[str(shard.read("pair/id")[pair])]
        group = int(read["image/group"][sides[0]])
        grid = grid_of(str(read["group/id"][group]), manifest.num_train_timesteps)
        caption = told_of(cache, shard, group)
        for side, seed, score, image in zip(
            ("win", "lose"), told["seeds"], (told["score_win"], told["score_lose"]), sides, strict=True
        ):
            noise = torch.randn((1, *manifest.latent_shape), generator=torch.Generator().manual_seed(seed))[0]
            points = oracle.path(noise.double().numpy(), grid, [nothing, caption])
            x0 = read["x0"][image].astype(np.float64)
            close("x0", x0, points[-1], 4 * HALF_STEP)
            pixels = np.asarray(Image.open(io.BytesIO(told[side]))).astype(np.float64)
            drawn = np.clip((oracle.image(x0).transpose(1, 2, 0) / 2 + 0.5) * 255, 0, 255)
            assert np.abs(pixels - drawn).max() < 0.51
            assert score == pytest.approx(pixels[..., 0].mean())
            assert shard.read("image/score")[image] == np.float32(score)
            assert set(read["timestep"][group]) <= set(grid)
            for record, t in enumerate(read["timestep"][group].tolist()):
                x_t, target = (read[name][image, record].astype(np.float64) for name in ("x_t", "target"))
                a, b = oracle.mixture(cache, t)
                visited = points[1 + STEPS - 1 - grid.tolist().index(t)]
                close("x_t", x_t, visited, 8 * HALF_STEP)
                close("target", target, (visited - a * x0) / b, 4 * HALF_STEP / b)
                assert np.array_equal(x_t, (a * x0 + b * target).astype(np.float16)), "the stored-point rule"
                predicted, delta, clean = oracle.record(x_t, t, caption)
                close("delta", read["delta"][image, record], delta, 4 * HALF_STEP)
                close("x0_t", read["x0_t"][image, record], clean, 4 * HALF_STEP)
                error = np.mean((target - predicted) ** 2)
                assert read["reference_error"][image, record] == pytest.approx(error, rel=1e-4)
