"""A source whose images have one colour, and a cache of it, for label sets."""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from inpo.common.cache import CacheWriter, InverterIdentity, Manifest, ShardData, ShardSource, TextData
from inpo.common.cache.schema import ConditionSpec, LevelTables
from inpo.common.levels import Levels
from inpo.common.pairs import Pair, open_source

REDS = {"first": (200, 100), "second": (50, 150), "third": (80, 80), "fourth": (255, 0), "fifth": (10, 20)}
"""Red values of (win, lose) by pair id."""


def png(red: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (red, 0, 0)).save(stream, format="PNG")
    return stream.getvalue()


def write_source(folder: Path, reds: dict[str, tuple[int, int]] = REDS) -> Path:
    folder.mkdir()
    lines = []
    for name, sides in reds.items():
        for side, red in zip(("win", "lose"), sides, strict=True):
            (folder / f"{name}-{side}.png").write_bytes(png(red))
        row = {"prompt": f"a {name}", "win": f"{name}-win.png", "lose": f"{name}-lose.png", "id": name}
        lines.append(json.dumps(row) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))
    return folder


def write_cache(location: Path, source: Path, *, rows: Sequence[tuple[int, int]] = ((0, 2), (2, 5))) -> Path:
    """A cache with the contract's arrays, as precompute would commit it for these rows, one pair of them left out."""
    manifest = Manifest(
        latent_shape=(1, 2, 2),
        family="sd",
        levels=LevelTables.of(Levels.from_alphas_cumprod(torch.tensor([0.9 - 0.05 * i for i in range(10)]))),
        conditions={"embedding": ConditionSpec(dtype="float16", axes=("token", "width"), per="prompt")},
        profile="lean",
        seed=0,
        timesteps_per_pair=1,
        group="pair",
        resolution=(8, 8),
        crop="center",
        flip=False,
        vae_latent="mean",
        vae_dtype="float32",
        network_dtype="float32",
        inverter=InverterIdentity(name="ddim", grid_points=5, timestep_range=(0, 10)),
        fingerprints={"network": "0" * 32},
    )
    writer = CacheWriter.open(str(location), manifest)
    (input_shard,) = open_source(str(source)).shards
    texts = {"text": np.array([""], dtype=object), "embedding": np.zeros((1, 2, 2), np.float16)}
    assert writer.write_texts("empty", TextData(arrays=texts)) is not None
    for start, stop in rows:
        pairs = [item for item in input_shard.rows(start, stop) if "fourth" not in item.pair_id]
        assert all(isinstance(pair, Pair) for pair in pairs)
        ids, count = [pair.pair_id for pair in pairs], len(pairs)
        files = [hashlib.blake2b(data, digest_size=16).hexdigest() for pair in pairs for data in (pair.win, pair.lose)]
        images = np.arange(2 * count, dtype=np.int32)
        arrays = {
            "x0": np.zeros((2 * count, 1, 2, 2), np.float16),
            "target": np.zeros((2 * count, 1, 1, 2, 2), np.float16),
            "reference_error": np.zeros((2 * count, 1), np.float32),
            "inversion_error": np.zeros(2 * count, np.float32),
            "timestep": np.zeros((count, 1), np.int16),
            "image/id": np.array(files, dtype=object),
            "image/group": images // 2,
            "image/score": np.full(2 * count, np.nan, np.float32),
            "group/id": np.array(ids, dtype=object),
            "group/prompt": np.zeros((count, 2), np.int32),
            "group/caption_dropped": np.zeros(count, bool),
            "pair/id": np.array(ids, dtype=object),
            "pair/win": images[0::2],
            "pair/lose": images[1::2],
            "pair/label": np.ones(count, np.float32),
        }
        made_from = ShardSource(
            location=str(source),
            input_shard=input_shard.name,
            rows=(start, stop),
            fingerprint=input_shard.fingerprint(),
        )
        assert (
            writer.write(
                f"{input_shard.name}-{start:08d}", ShardData(arrays=arrays, source=made_from, texts=("empty",))
            )
            is not None
        )
    return location


def by_name(labels: dict[str, dict[str, float]]) -> dict[str, float]:
    """Labels by the name in the pair id, whatever a source makes ids of."""
    flat = {pair_id: value for shard in labels.values() for pair_id, value in shard.items()}
    return {name: value for name in REDS for pair_id, value in flat.items() if name in pair_id}
