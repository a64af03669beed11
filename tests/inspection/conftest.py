"""Small real caches in every state: inverted by tiny pipelines, written as precompute writes them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from inpo.common.cache import CacheWriter, InverterIdentity, Manifest, ShardData, ShardSource
from inpo.common.cache.schema import LevelTables
from inpo.common.conditions import Condition
from inpo.common.denoiser import Denoiser
from inpo.common.errors import InpoError
from inpo.common.inversion import invert
from inpo.common.models import open_model
from inpo.common.testing import save_tiny_pipeline
from inpo.inspection.cli import app

STATES = ("healthy", "empty", "taken back", "writing", "corrupt", "lean", "sdxl")
PROMPTS = ("", "a red cat", "a blue house on the sky", 'the dog & <b>a</b> "cat"')
STEPS, KEPT = 4, 2


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    stdout: str = ""
    """Without what went to stderr."""


@pytest.fixture
def inspect() -> Callable[..., Done]:
    """inspect("summary", folder, ...): run a command as the front door does, errors printed and turned into codes."""

    def run(*words: object, answer: str | None = None) -> Done:
        done = CliRunner().invoke(app, [str(word) for word in words], input=answer)
        if isinstance(done.exception, InpoError):
            return Done(done.exception.exit_code, f"{done.output}error: {done.exception}")
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Done(done.exit_code, done.output, done.stdout)

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Callable[..., Path]:
    """tiny(kind, seed=0): a tiny pipeline's folder, made once. sd15-one: all that the released code's sampler takes
    from a scheduler's configuration is another than Stable Diffusion's.
    """
    made: dict[tuple[str, int], Path] = {}

    def folder(kind: str = "sd15", seed: int = 0) -> Path:
        if (kind, seed) not in made:
            path = tmp_path_factory.mktemp(f"{kind}-{seed}")
            made[kind, seed] = save_tiny_pipeline(path, kind.removesuffix("-one"), seed=seed)
            if kind.endswith("-one"):
                file = path / "scheduler" / "scheduler_config.json"
                other = {"set_alpha_to_one": True, "steps_offset": 0, "clip_sample": True, "clip_sample_range": 2.0}
                file.write_text(json.dumps(json.loads(file.read_text()) | other))
        return made[kind, seed]

    return folder


@pytest.fixture(scope="session")
def write_cache(tiny) -> Callable[..., Path]:
    """write_cache(folder, kind=..., pairs=(3, 2), **manifest changes): invert random latents and commit them.

    `tamper` changes the last shard's arrays before they are written: whole bytes with wrong numbers.
    """

    inverted: dict[tuple[str, str, int, int], ShardData] = {}
    denoisers: dict[str, Denoiser] = {}

    def data_of(kind: str, manifest: Manifest, index: int, num_pairs: int) -> ShardData:
        """Each inversion is made once; what a test may change is a copy."""
        settings = manifest.model_copy(update={"profile": "full"}).to_json().decode()
        if (kind, settings, index, num_pairs) not in inverted:
            if kind not in denoisers:
                model = open_model(str(tiny(kind)))
                denoisers[kind] = model.denoiser(model.load_network().requires_grad_(False).eval())
            inverted[kind, settings, index, num_pairs] = _shard(manifest, denoisers[kind], index, num_pairs)
        data = inverted[kind, settings, index, num_pairs]
        wanted = {spec.path for spec in manifest.arrays} if data.num_pairs else set()
        return replace(data, arrays={path: data.arrays[path].copy() for path in wanted})

    def write(
        folder: Path,
        *,
        kind: str = "sd15",
        pairs: tuple[int, ...] = (3, 2),
        tamper: Callable[[dict[str, np.ndarray]], None] = lambda arrays: None,
        **changes: Any,
    ) -> Path:
        model = open_model(str(tiny(kind)))
        inverter = {"name": "ddim", "grid_points": STEPS, "timestep_range": (0, 1000)} | changes.pop("inverter", {})
        values = {
            "latent_shape": (4, 8, 8),
            "family": model.family.name,
            "levels": LevelTables.of(model.levels),
            "conditions": dict(model.family.conditions),
            "profile": "full",
            "seed": 0,
            "timesteps_per_pair": KEPT,
            "resolution": 32,
            "crop": "center",
            "flip": False,
            "vae_latent": "mean",
            "vae_dtype": "float32",
            "network_dtype": "float32",
            "measure_inversion": 0.6,
            "inverter": InverterIdentity(**inverter),
            "fingerprints": model.fingerprints,
            "versions": {"inpo-cache": "0"},
        }
        manifest = Manifest(**values | changes)
        writer = CacheWriter.open(str(folder), manifest)
        for index, num_pairs in enumerate(pairs):
            data = data_of(kind, manifest, index, num_pairs)
            if index == len(pairs) - 1:
                tamper(data.arrays)
            assert writer.write(f"s{index}", data) is not None
        return folder

    return write


def _shard(manifest: Manifest, denoiser: Denoiser, index: int, num_pairs: int) -> ShardData:
    source = ShardSource(location="/pairs", input_shard=f"{index}.tar", rows=(0, num_pairs + 1), fingerprint="f" * 32)
    skipped = [{"pair_id": f"tie-{index}", "reason": "tie", "detail": "label 0.5", "row": num_pairs}]
    if not num_pairs:
        return ShardData(arrays={}, source=source, skipped=skipped)
    noise = torch.Generator().manual_seed(index)
    ids = [f"pair-{index}-{row}" for row in range(num_pairs)]
    # Smooth latents, so that the pictures have something to show.
    x0 = (
        torch.nn.functional.interpolate(
            torch.randn(2 * num_pairs, 4, 3, 3, generator=noise), size=8, mode="bilinear", align_corners=True
        )
        .unflatten(0, (num_pairs, 2))
        .half()
    )
    config = denoiser.network.config
    embedding = torch.randn(len(PROMPTS), 5, config.cross_attention_dim, generator=noise).half()
    prompt_index = np.arange(num_pairs, dtype=np.int32) % (len(PROMPTS) - 1) + 1
    dropped = np.arange(num_pairs) == 1
    rows = torch.from_numpy(np.where(dropped, 0, prompt_index).astype(np.int64)).repeat_interleave(2)
    extra: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    if "pooled" in manifest.conditions:
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        pooled = torch.randn(len(PROMPTS), width, generator=noise).half()
        time_ids = torch.tensor([32.0, 32.0, 0.0, 0.0, 32.0, 32.0]).expand(num_pairs, 2, 6).contiguous()
        extra = {"pooled": pooled[rows].float(), "time_ids": time_ids.reshape(-1, 6)}
        arrays = {"prompt/pooled": pooled.numpy(), "time_ids": time_ids.numpy()}
    inverted = invert(
        denoiser,
        x0,
        ids,
        identity=manifest.inverter,
        seed=manifest.seed,
        timesteps_per_pair=manifest.timesteps_per_pair,
        caption=Condition(embedding=embedding[rows].float(), **extra),
        empty=Condition(embedding=embedding[torch.zeros_like(rows)].float(), **extra),
        measure_inversion=manifest.measure_inversion,
    )
    for name in ("timestep", "x_t", "delta", "x0_t", "target", "reference_error", "inversion_error"):
        arrays[name] = getattr(inverted, name).numpy()
    arrays |= {
        "x0": x0.numpy(),
        "pair_id": np.array(ids, dtype=object),
        "prompt_index": prompt_index,
        "caption_dropped": dropped,
        "label": np.where(np.arange(num_pairs) == 2, 0.75, 1.0).astype(np.float32),
        "prompt/text": np.array(PROMPTS, dtype=object),
        "prompt/embedding": embedding.numpy(),
    }
    return ShardData(arrays=arrays, source=source, skipped=skipped, counts={"cut_prompt": 1}, seconds={"invert": 1.5})


@pytest.fixture(scope="session")
def states(write_cache, tmp_path_factory) -> Callable[[str], Path]:
    """states(name): a cache in one of STATES, made once; read only. `fresh` gives a copy to change."""
    made: dict[str, Path] = {}

    def state(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "cache"
            if name == "empty":
                write_cache(folder, pairs=())
            elif name == "taken back":
                write_cache(folder, pairs=(0,))
                (folder / "commits" / "s0.json").unlink()  # as precompute does for a source without pairs
            elif name == "writing":
                write_cache(folder)
                (folder / "commits" / "s1.json").unlink()  # its attempt is there, its commit is still to come
            elif name == "corrupt":
                write_cache(folder)
                flip_byte(folder, "s1", "target")
            elif name in ("lean", "sdxl"):
                write_cache(folder, **({"profile": "lean"} if name == "lean" else {"kind": "sdxl"}))
            else:
                write_cache(folder)
            made[name] = folder
        return made[name]

    return state


@pytest.fixture
def fresh(states, tmp_path) -> Callable[[str], Path]:
    """fresh(name): a copy of states(name) that a test may change."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(states(name), tmp_path / f"{name}-copy"))

    return copy


def flip_byte(folder: Path, shard: str, array: str) -> None:
    """One bit of the middle of an array's only chunk file."""
    (attempt,) = (folder / "shards" / shard).iterdir()
    (chunk,) = [file for file in (attempt / array / "c").rglob("*") if file.is_file()]
    data = bytearray(chunk.read_bytes())
    data[len(data) // 3] ^= 1
    chunk.write_bytes(data)
