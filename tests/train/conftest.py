"""Small worlds for training: a genuine tiny pipeline, and real caches whose numbers its UNet made."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from inpo.common.cache import CacheWriter, InverterIdentity, Manifest, ShardData, ShardSource, TextData
from inpo.common.cache.schema import LevelTables
from inpo.common.conditions import Condition
from inpo.common.denoiser import Denoiser
from inpo.common.inversion import Group, invert
from inpo.common.models import Model, open_model
from inpo.common.spread import measure_spread
from inpo.train import proof
from tests.light import LIGHT, save_light_pipeline

PROMPTS = 7
TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class World:
    """A model folder and a maker of caches that belong to it."""

    model: Model

    @cached_property
    def network(self) -> torch.nn.Module:
        """Not to be changed."""
        return self.model.load_network().eval()

    def cache(
        self,
        location: Path,
        *,
        shards: Sequence[int] = (5, 4),
        timesteps_per_pair: int = 2,
        profile: str = "full",
        extra: tuple[str, ...] = (),
        network_dtype: str = "float32",
        inverter: str = "ddim",
        guidance: float = 1.0,
        label: Callable[[int], float] = lambda pair: 1.0,
        drop_caption: Callable[[int], bool] = lambda pair: False,
        change: Callable[[int, dict[str, np.ndarray]], None] = lambda shard, arrays: None,
        side: int = 8,
        seed: int = 0,
        fingerprints: Mapping[str, str] = MappingProxyType({}),
        prompts: Sequence[str] = (),
        prepare: Callable[[torch.nn.Module], None] | None = None,
        images: int = 2,
        caption_dropout: float = 0.0,
    ) -> str:
        """Write a cache of small latents. `label` and `drop_caption` go by the pair's number over all shards; `change`
        may edit a shard's arrays before they are committed, `prepare` the network.

        Of more than two `images` a shard's numbers are groups, each of one list: its pairs are neighbours in it.
        """
        levels = self.model.levels
        identity = InverterIdentity(
            name=inverter,
            grid_points=4,
            timestep_range=(0, levels.num_train_timesteps),
            guidance=guidance,
            noised_start=1.0 if inverter == "noise" else 0.0,
            caption_dropout=caption_dropout,
        )
        manifest = Manifest(
            latent_shape=(4, side, side),
            family=self.model.family.name,
            levels=LevelTables.of(levels),
            conditions=dict(self.model.family.conditions),
            profile=profile,
            extra=extra,
            seed=seed,
            timesteps_per_pair=timesteps_per_pair,
            group="pair" if images == 2 else "prompt",
            max_tokens=TOKENS if self.model.family.max_tokens else None,
            resolution=(2 * side, 2 * side),
            crop="center",
            flip=False,
            vae_latent="mean",
            vae_dtype="float32",
            network_dtype=network_dtype,
            inverter=identity,
            fingerprints={**self.model.fingerprints, **fingerprints},
        )
        writer = CacheWriter.open(str(location), manifest)
        owned = self._write_texts(writer, prompts or [f"prompt {number}" for number in range(PROMPTS)])
        network = copy.deepcopy(self.network) if prepare else self.network
        if prepare:
            prepare(network)
        denoiser = self.model.denoiser(network, network_dtype=network_dtype)
        first = 0
        for number, num_pairs in enumerate(shards):
            arrays, spread = self._arrays(manifest, owned, denoiser, first, num_pairs, label, drop_caption, images)
            change(number, arrays)
            writer.write(
                f"shard-{number:03d}",
                ShardData(
                    arrays={path: arrays[path] for path in manifest.specs},
                    texts=("empty", "texts"),
                    spread=spread,
                    source=ShardSource(
                        location="test",
                        input_shard="0",
                        rows=(first, first + len(arrays["pair/id"])),
                        fingerprint="f" * 32,
                    ),
                ),
            )
            first += num_pairs
        return str(location)

    def _write_texts(self, writer: CacheWriter, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Two text shards; returns what the prompts own, the empty one's in row 0."""
        width = self.model.family.lengths(self.model.config)["embedding"][1]
        prompts = {"embedding": _noise((PROMPTS + 1, TOKENS, width), 1).half()}
        if "pooled" in writer.manifest.conditions:
            prompts["pooled"] = _noise((PROMPTS + 1, 48), 2).half()
        if "length" in writer.manifest.conditions:
            prompts["length"] = torch.arange(3, PROMPTS + 4, dtype=torch.int32)
        text = np.array(["", *texts], dtype=object)
        for name, rows in (("empty", slice(0, 1)), ("texts", slice(1, None))):
            arrays = {each: tensor[rows].numpy() for each, tensor in prompts.items()}
            assert writer.write_texts(name, TextData(arrays={"text": text[rows], **arrays})) is not None
        return prompts

    def _arrays(
        self,
        manifest: Manifest,
        prompts: dict[str, torch.Tensor],
        denoiser: Denoiser,
        first: int,
        num_pairs: int,
        label: Callable[[int], float],
        drop_caption: Callable[[int], bool],
        images_of_group: int,
    ) -> tuple[dict[str, np.ndarray], float | None]:
        """(arrays, spread) of a shard."""
        numbers = np.arange(first, first + num_pairs)
        dropped = np.array([drop_caption(int(number)) for number in numbers], dtype=bool)
        prompt = numbers % PROMPTS
        rows = torch.from_numpy(np.repeat(np.where(dropped, 0, prompt + 1).astype(np.int64), images_of_group))
        images = {}
        num_images = images_of_group * num_pairs
        if "time_ids" in manifest.conditions:
            images["time_ids"] = torch.tensor([16.0, 16, 0, 0, 16, 16]).expand(num_images, 6).contiguous()
        x0 = torch.cat(
            [_noise((images_of_group, *manifest.latent_shape), 100 + int(number)) for number in numbers]
        ).half()
        pair_ids = [f"pair-{number:04d}" for number in numbers]
        group_of = np.repeat(np.arange(num_pairs), images_of_group)
        wins = np.flatnonzero(np.arange(num_images) % images_of_group < images_of_group - 1)
        of_pairs = group_of[wins]
        caption = Condition.build(prompts, rows, images)
        found = invert(
            denoiser,
            x0,
            [Group(id=pair_id, num_images=images_of_group) for pair_id in pair_ids],
            identity=manifest.inverter,
            seed=manifest.seed,
            timesteps_per_pair=manifest.timesteps_per_pair,
            caption=caption,
            empty=Condition.build(prompts, torch.zeros_like(rows), images),
            extra=manifest.extra,
        )
        assert bool(found.finite.all())
        arrays: dict[str, Any] = {
            "x0": x0.numpy(),
            "image/id": np.array([f"{number:032x}" for number in range(num_images)], dtype=object),
            "image/group": group_of.astype(np.int32),
            "image/score": np.full(num_images, np.nan, np.float32),
            "group/id": np.array(pair_ids, dtype=object),
            "group/prompt": np.stack([np.ones(num_pairs), prompt], axis=1).astype(np.int32),
            "group/caption_dropped": dropped,
            "pair/id": np.array(
                [
                    f"{pair_ids[group]}{'' if images_of_group == 2 else f'-{win}'}"
                    for group, win in zip(of_pairs, wins, strict=True)
                ],
                dtype=object,
            ),
            "pair/win": wins.astype(np.int32),
            "pair/lose": (wins + 1).astype(np.int32),
            "pair/label": np.array([label(int(numbers[group])) for group in of_pairs], dtype=np.float32),
        }
        arrays |= {f"image/{name}": tensor.numpy() for name, tensor in images.items()}
        for name in manifest.specs.keys() - arrays.keys():
            arrays[name] = getattr(found, name).numpy()
        spread = measure_spread(
            denoiser, found, range(num_images), group_of=group_of.tolist(), caption=caption, images_per_batch=8
        )
        return arrays, spread


def _noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def short_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """The zero-step proof looks at a quarter of its records, where it is not what is tested: they are most of a small
    run's network calls."""
    monkeypatch.setattr(proof, "_RECORDS", 8)
    monkeypatch.setattr(proof, "_MOVES", 8)


@pytest.fixture(scope="session")
def make_world(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., World]:
    """make_world(kind="light", seed=0): a tiny pipeline in a folder, made once per kind and seed."""
    made: dict[tuple[str, int], World] = {}

    def make(kind: str = LIGHT, seed: int = 0) -> World:
        if (kind, seed) not in made:
            folder = save_light_pipeline(tmp_path_factory.mktemp("model") / kind, kind, seed=seed)
            made[kind, seed] = World(model=open_model(str(folder)))
        return made[kind, seed]

    return make


@pytest.fixture(scope="session")
def world(make_world: Callable[..., World]) -> World:
    return make_world()


@pytest.fixture(scope="session")
def cache(world: World, tmp_path_factory: pytest.TempPathFactory) -> str:
    """9 pairs in 2 shards, 2 timesteps each, full, float32: read only."""
    return world.cache(tmp_path_factory.mktemp("cache") / "c")


@pytest.fixture
def run(world: World, cache: str, tmp_path: Path) -> Callable[..., Path]:
    """run(steps=..., ...): train in this process and return the output folder."""
    from accelerate.state import AcceleratorState

    from inpo.train.run import run_train

    def call(
        *,
        resume: str = "auto",
        output: Path | None = None,
        caches: list[str] | None = None,
        model: str | None = None,
        code: int = 0,
        **flags: Any,
    ) -> Path:
        folder = output or tmp_path / "run"
        settings = {
            "output": folder,
            "steps": 4,
            "batch_size": 2,
            "log_every": 2,
            "held_out": 0.0,
            "tracker": "none",
            "learning_rate": 1e-4,
        } | flags
        AcceleratorState._reset_state(reset_partial_state=True)  # one process, runs of several dtypes
        assert (
            run_train(None, {"model": model or str(world.model.folder)}, caches or [cache], settings, resume=resume)
            == code
        )
        return folder

    return call
