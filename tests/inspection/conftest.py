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

from inpo.common.cache import CacheWriter, InverterIdentity, Manifest, ShardData, ShardSource, TextData
from inpo.common.cache.schema import LevelTables
from inpo.common.conditions import Condition
from inpo.common.denoiser import Denoiser
from inpo.common.errors import InpoError
from inpo.common.inversion import Group, invert
from inpo.common.models import open_model
from inpo.inspection.cli import app
from tests.light import LIGHT, save_light_pipeline

STATES = ("healthy", "empty", "texts", "taken back", "writing", "corrupt", "lean", "sdxl", "grouped")
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
    """tiny(kind, seed=0): a tiny pipeline's folder, made once; sd15 has half its layers. sd15-one: all that the
    released code's sampler takes from a scheduler's configuration is another than Stable Diffusion's.
    """
    made: dict[tuple[str, int], Path] = {}

    def folder(kind: str = "sd15", seed: int = 0) -> Path:
        if (kind, seed) not in made:
            path = tmp_path_factory.mktemp(f"{kind}-{seed}")
            of = kind.removesuffix("-one")
            made[kind, seed] = save_light_pipeline(path, LIGHT if of == "sd15" else of, seed=seed)
            if kind.endswith("-one"):
                file = path / "scheduler" / "scheduler_config.json"
                other = {"set_alpha_to_one": True, "steps_offset": 0, "clip_sample": True, "clip_sample_range": 2.0}
                file.write_text(json.dumps(json.loads(file.read_text()) | other))
        return made[kind, seed]

    return folder


@pytest.fixture(scope="session")
def write_cache(tiny) -> Callable[..., Path]:
    """write_cache(folder, kind=..., pairs=(3, 2), **manifest changes): invert random latents and commit them.

    `tamper` changes the last shard's arrays before they are written, `tamper_texts` those of text shard t0: whole bytes
    with wrong numbers. With group="prompt" pairs are a chain: see `_sides`. pairs=None: not even texts.
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
        pairs: tuple[int, ...] | None = (3, 2),
        tamper: Callable[[dict[str, np.ndarray]], None] = lambda arrays: None,
        tamper_texts: Callable[[dict[str, np.ndarray]], None] = lambda arrays: None,
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
            "group": "pair",
            "max_tokens": model.family.max_tokens,
            "resolution": (32, 32),
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
        if pairs is not None:
            config = json.loads((tiny(kind) / "unet" / "config.json").read_text())
            empty, others = _texts(manifest, config, slice(0, 1)), _texts(manifest, config, slice(1, None))
            tamper_texts(others)
            for name, arrays in (("empty", empty), ("t0", others)):
                assert writer.write_texts(name, TextData(arrays=arrays, seconds={"encode": 0.5})) is not None
        for index, num_pairs in enumerate(pairs or ()):
            data = data_of(kind, manifest, index, num_pairs)
            if index == len(pairs) - 1:
                tamper(data.arrays)
            assert writer.write(f"s{index}", data) is not None
        return folder

    return write


def _texts(manifest: Manifest, config: dict[str, Any], rows: slice) -> dict[str, np.ndarray]:
    """Some rows of PROMPTS with what the network is told of each; random, and the same in every cache."""
    noise = torch.Generator().manual_seed(99)
    told = {"embedding": torch.randn(len(PROMPTS), 5, config["cross_attention_dim"], generator=noise).half()}
    if "pooled" in manifest.conditions:
        width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        told["pooled"] = torch.randn(len(PROMPTS), width, generator=noise).half()
    text = np.array(PROMPTS[rows], dtype=object)
    return {"text": text} | {name: tensor[rows].numpy().copy() for name, tensor in told.items()}


def _sides(manifest: Manifest, num_pairs: int) -> tuple[list[int], list[tuple[int, int]]]:
    """(images of each group, (win, lose) of each pair). By prompt: 3 pairs are a chain of two over three images and a
    pair of its own, 2 pairs a chain."""
    if manifest.group == "pair":
        return [2] * num_pairs, [(2 * row, 2 * row + 1) for row in range(num_pairs)]
    chain = num_pairs - (num_pairs > 2)
    rest = [(chain + 1, chain + 2)] if num_pairs > 2 else []
    return [chain + 1, *(2 for _ in rest)], [*((row, row + 1) for row in range(chain)), *rest]


def _shard(manifest: Manifest, denoiser: Denoiser, index: int, num_pairs: int) -> ShardData:
    source = ShardSource(location="/pairs", input_shard=f"{index}.tar", rows=(0, num_pairs + 1), fingerprint="f" * 32)
    skipped = [{"pair_id": f"tie-{index}", "reason": "tie", "detail": "label 0.5", "row": num_pairs}]
    if not num_pairs:
        return ShardData(arrays={}, source=source, skipped=skipped)
    noise = torch.Generator().manual_seed(index)
    ids = [f"pair-{index}-{row}" for row in range(num_pairs)]
    sizes, sides = _sides(manifest, num_pairs)
    group_ids = ids if manifest.group == "pair" else [f"{index}{number}" * 16 for number in range(len(sizes))]
    group = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    # Smooth latents, so that the pictures have something to show.
    x0 = torch.nn.functional.interpolate(
        torch.randn(len(group), 4, 3, 3, generator=noise),
        size=manifest.latent_shape[1:],
        mode="bilinear",
        align_corners=True,
    ).half()
    config = denoiser.network.config
    told = {
        name: torch.from_numpy(each) for name, each in _texts(manifest, config, slice(None)).items() if each.ndim > 1
    }
    prompt = np.arange(len(sizes)) % (len(PROMPTS) - 1)
    dropped = np.arange(len(sizes)) == 1
    rows = torch.from_numpy(np.where(dropped, 0, prompt + 1))[torch.from_numpy(group).long()]
    images: dict[str, torch.Tensor] = {}
    if "time_ids" in manifest.conditions:
        images = {"time_ids": torch.tensor([32.0, 32.0, 0.0, 0.0, 32.0, 32.0]).expand(len(group), 6).contiguous()}
    inverted = invert(
        denoiser,
        x0,
        [Group(id=name, num_images=size) for name, size in zip(group_ids, sizes, strict=True)],
        identity=manifest.inverter,
        seed=manifest.seed,
        timesteps_per_pair=manifest.timesteps_per_pair,
        caption=Condition.build(told, rows, images),
        empty=Condition.build(told, torch.zeros_like(rows), images),
        measure_inversion=manifest.measure_inversion,
    )
    names = ("timestep", "x_t", "delta", "x0_t", "target", "reference_error", "inversion_error")
    arrays = {name: getattr(inverted, name).numpy() for name in names}
    if inverted.residual is not None:
        arrays["residual"] = inverted.residual.numpy()
    arrays |= {f"image/{name}": tensor.numpy() for name, tensor in images.items()}
    arrays |= {
        "x0": x0.numpy(),
        "image/id": np.array([f"{index:02x}{row:030x}" for row in range(len(group))], dtype=object),
        "image/group": group,
        "image/score": np.full(len(group), np.nan, np.float32),
        "group/id": np.array(group_ids, dtype=object),
        "group/prompt": np.stack([np.ones_like(prompt), prompt], axis=1).astype(np.int32),
        "group/caption_dropped": dropped,
        "pair/id": np.array(ids, dtype=object),
        "pair/win": np.array([win for win, _ in sides], dtype=np.int32),
        "pair/lose": np.array([lose for _, lose in sides], dtype=np.int32),
        "pair/label": np.where(np.arange(num_pairs) == 2, 0.75, 1.0).astype(np.float32),
    }
    return ShardData(
        arrays=arrays,
        source=source,
        texts=("empty", "t0"),
        skipped=skipped,
        counts={"cut_prompt": 1},
        seconds={"invert": 1.5},
    )


@pytest.fixture(scope="session")
def states(write_cache, tmp_path_factory) -> Callable[[str], Path]:
    """states(name): a cache in one of STATES, made once; read only. `fresh` gives a copy to change."""
    made: dict[str, Path] = {}

    def state(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "cache"
            if name == "empty":
                write_cache(folder, pairs=None)
            elif name == "texts":
                write_cache(folder, pairs=())  # as between precompute's two phases
            elif name == "grouped":
                write_cache(folder, group="prompt")
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


def flip_byte(folder: Path, shard: str, array: str, *, of: str = "shards") -> None:
    """One bit of the middle of an array's only chunk file."""
    (attempt,) = (folder / of / shard).iterdir()
    (chunk,) = [file for file in (attempt / array / "c").rglob("*") if file.is_file()]
    data = bytearray(chunk.read_bytes())
    data[len(data) // 3] ^= 1
    chunk.write_bytes(data)
