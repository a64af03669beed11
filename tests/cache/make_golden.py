"""Write the golden caches of the current schema version.

    python tests/cache/make_golden.py tests/cache/golden/v2

A version's folder is written once and never changed; the numbers follow from `number` and the contract alone. `full`,
`lean` and `compact` hold plain pairs, `grouped` a group of three images and four pairs beside a plain pair, and prompts
that have a length.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from inpo.common.cache import CacheWriter, InverterIdentity, Manifest, ShardData, ShardSource, TextData
from inpo.common.cache.schema import ConditionSpec, LevelTables
from inpo.common.levels import Levels

CACHES = ("full", "lean", "compact", "grouped")
RECORDS, LATENT = 2, (4, 4, 4)
TIMESTEPS = np.array([[0, 999], [37, 512], [500, 501]], dtype=np.int16)
SMALL = {
    "grouped": np.array([[0, 19], [7, 8]], dtype=np.int16),
    "compact": np.array([[0, 19], [1, 7], [8, 9]], dtype=np.int16),
}
"""Timesteps of a table with every 50th level: a small manifest."""
PROMPTS = ("a red cat", "ein blaues Haus 🏠")
PLAIN = [0, 0, 1, 1, 2, 2]
GROUP = {"full": PLAIN, "lean": PLAIN, "compact": PLAIN, "grouped": [0, 0, 0, 1, 1]}
"""Of each image."""
SIDES = {"full": [(0, 1), (2, 3), (4, 5)], "grouped": [(0, 1), (1, 2), (0, 2), (1, 0), (3, 4)]}
"""Images of each pair: win, lose."""
SIDES["lean"] = SIDES["compact"] = SIDES["full"]


def number(start: int, *shape: int) -> np.ndarray:
    """Multiples of 1/32 between -1.6 and 1.6, exact in float16: element i is ((start + 37 i) mod 101 - 50) / 32."""
    count = int(np.prod(shape))
    return (((start + 37 * np.arange(count)) % 101 - 50) / 32).reshape(shape)


def records(start: int, num_images: int, *rest: int) -> np.ndarray:
    """`number` for every image and record: counted record by record of every two images, the first of them first."""
    made = number(start, -(-num_images // 2), RECORDS, 2, *rest)
    return np.moveaxis(made, 2, 1).reshape(-1, RECORDS, *rest)[:num_images]


def arrays(name: str) -> dict[str, np.ndarray]:
    """Of the shard 0-00000 of a cache."""
    group, sides = GROUP[name], SIDES[name]
    images, groups, pairs = len(group), group[-1] + 1, len(sides)
    x0 = number(1, images, *LATENT).astype(np.float16)
    target = records(2, images, *LATENT).astype(np.float16)
    timestep = SMALL.get(name, TIMESTEPS)
    abar = np.array(alphas_cumprod(name))[timestep[group]][..., None, None, None]
    signal, noise = np.sqrt(abar) * x0[:, None].astype(np.float64), np.sqrt(1 - abar) * target.astype(np.float64)
    pair_ids = ["first", "second ö", 'third\n"3"', "fourth", "fifth"][:pairs]
    made = {
        "x0": x0,
        "target": target,
        "reference_error": (records(3, images) ** 2).astype(np.float32),
        "inversion_error": np.array([0.25, np.nan, 0.5, 0.75, np.nan, np.nan], dtype=np.float32)[:images],
        "timestep": timestep,
        "image/id": np.array([f"{image:032x}" for image in range(images)], dtype=object),
        "image/group": np.array(group, dtype=np.int32),
        "image/score": np.array([np.nan, 0.5, -3.0, np.nan, 1.0, 2.0], dtype=np.float32)[:images],
        "group/id": np.array(["5" * 32, "6" * 32] if name == "grouped" else pair_ids, dtype=object),
        "group/prompt": np.array([[1, 0], [1, 1], [1, 0]], dtype=np.int32)[:groups],
        "group/caption_dropped": np.array([False, True, False])[:groups],
        "pair/id": np.array(pair_ids, dtype=object),
        "pair/win": np.array([win for win, _ in sides], dtype=np.int32),
        "pair/lose": np.array([lose for _, lose in sides], dtype=np.int32),
        "pair/label": np.array([1.0, 0.75, 0.0, 0.625, 1.0], dtype=np.float32)[:pairs],
    }
    if name == "full":
        made |= {
            "x_t": (signal + noise).astype(np.float16),
            "delta": records(5, images, *LATENT).astype(np.float16),
            "x0_t": records(6, images, *LATENT).astype(np.float16),
        }
    return made


def stored(name: str) -> dict[str, np.ndarray]:
    """`arrays` as the cache holds them: of a compact one 32 times the latents, and the scale 1/32."""
    made = arrays(name)
    for path in ("x0", "target") if name == "compact" else ():
        made[f"{path}_scale"] = np.full(made[path].shape[:-2], 1 / 32, dtype=np.float16)
        made[path] = (32 * made[path]).astype(np.int8)
    return made


def texts(name: str) -> dict[str, dict[str, np.ndarray]]:
    """{text shard: its arrays}; the last prompt has no numbers. The longest one of the grouped cache has three of four
    tokens."""
    embedding = number(4, 3, 3, 5).astype(np.float16)
    made = {
        "empty": {"text": np.array([""], dtype=object), "embedding": embedding[:1]},
        "prompts": {"text": np.array([*PROMPTS, "?"], dtype=object), "embedding": embedding[[1, 2, 2]]},
    }
    if name == "grouped":
        made["empty"]["embedding"] = embedding[:1, :1]
        made["empty"]["length"] = np.array([1], dtype=np.int32)
        made["prompts"]["length"] = np.array([2, 3, 1], dtype=np.int32)
    made["prompts"]["embedding"][2] = 0
    return made


def alphas_cumprod(name: str) -> tuple[float, ...]:
    """Stable Diffusion's scaled-linear table, in float64."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return tuple(round(float(value), 9) for value in np.cumprod(1 - betas)[:: 50 if name in SMALL else 1])


def levels(name: str) -> LevelTables:
    return LevelTables.of(Levels.from_alphas_cumprod(torch.tensor(alphas_cumprod(name), dtype=torch.float64)))


def manifest_of(name: str) -> Manifest:
    conditions = {"embedding": ConditionSpec(dtype="float16", axes=("token", "width"), per="prompt")}
    if name == "grouped":
        conditions["length"] = ConditionSpec(dtype="int32", axes=(), per="prompt")
    return Manifest(
        family="pixart_sigma" if name == "grouped" else "sd",
        latent_shape=LATENT,
        levels=levels(name),
        conditions=conditions,
        profile="lean" if name == "grouped" else name,
        seed=42,
        timesteps_per_pair=RECORDS,
        group="prompt" if name == "grouped" else "pair",
        max_tokens=4 if name == "grouped" else None,
        resolution=(32, 32),
        crop="center",
        flip=False,
        vae_latent="mean",
        vae_dtype="float32",
        network_dtype="float32",
        inverter=InverterIdentity(name="ddim", grid_points=10, timestep_range=(0, len(alphas_cumprod(name)))),
        fingerprints={"network": "0" * 32, "vae": "1" * 32, "text_encoder": "2" * 32, "scheduler": "3" * 32},
        versions={"inpo-cache": "0.1.0"},
    )


def shard(name: str, *, row: int = 0) -> ShardData:
    """The pairs of a cache, from this row on, and a tie behind them."""
    num_pairs = len(SIDES[name])
    source = ShardSource(location="golden", input_shard="0", rows=(row, row + num_pairs + 1), fingerprint="4" * 32)
    skipped = [{"pair_id": "a tie", "reason": "tie", "detail": "label 0.5", "row": row + num_pairs}]
    return ShardData(arrays=stored(name), texts=("empty", "prompts"), source=source, skipped=skipped)


def write(folder: Path, name: str) -> None:
    writer = CacheWriter.open(str(folder), manifest_of(name))
    for text, made in texts(name).items():
        cut, not_finite = ([1], [2]) if text == "prompts" else ([], [])
        assert writer.write_texts(text, TextData(arrays=made, cut=cut, not_finite=not_finite))
    assert writer.write("0-00000", shard(name))
    if name == "full":
        source = ShardSource(location="golden", input_shard="0", rows=(4, 5), fingerprint="4" * 32)
        skipped = [{"pair_id": "fifth", "reason": "unlabelled", "detail": "", "row": 4}]
        assert writer.write("0-00004", ShardData(arrays={}, source=source, skipped=skipped))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for name in CACHES:
        if not (target / name).exists():  # a golden cache is written once
            write(target / name, name)
