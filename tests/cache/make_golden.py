"""Write the golden caches of the current schema version.

    python tests/cache/make_golden.py tests/cache/golden/v2

A version's folder is written once and never changed; the numbers follow from `number` and the contract alone.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from inpo.common.cache import CacheWriter, InverterIdentity, Manifest, ShardData, ShardSource
from inpo.common.cache.schema import ConditionSpec, LevelTables
from inpo.common.levels import Levels

NUM_PAIRS, STEPS, LATENT = 3, 2, (4, 4, 4)
TIMESTEPS = np.array([[0, 999], [37, 512], [500, 501]], dtype=np.int16)


def number(start: int, *shape: int) -> np.ndarray:
    """Multiples of 1/32 between -1.6 and 1.6, exact in float16: element i is ((start + 37 i) mod 101 - 50) / 32."""
    count = int(np.prod(shape))
    return (((start + 37 * np.arange(count)) % 101 - 50) / 32).reshape(shape)


def arrays(profile: str) -> dict[str, np.ndarray]:
    record = (NUM_PAIRS, STEPS, 2)
    x0 = number(1, NUM_PAIRS, 2, *LATENT).astype(np.float16)
    target = number(2, *record, *LATENT).astype(np.float16)
    abar = np.array(alphas_cumprod())[TIMESTEPS][..., None, None, None, None]
    signal, noise = np.sqrt(abar) * x0[:, None].astype(np.float64), np.sqrt(1 - abar) * target.astype(np.float64)
    x_t = (signal + noise).astype(np.float16)
    made = {
        "x0": x0,
        "target": target,
        "reference_error": (number(3, *record) ** 2).astype(np.float32),
        "inversion_error": np.array([[0.25, np.nan], [0.5, 0.75], [np.nan, np.nan]], dtype=np.float32),
        "timestep": TIMESTEPS,
        "pair_id": np.array(["first", "second ö", 'third\n"3"'], dtype=object),
        "prompt_index": np.array([1, 2, 1], dtype=np.int32),
        "caption_dropped": np.array([False, True, False]),
        "label": np.array([1.0, 0.75, 0.0], dtype=np.float32),
        "prompt/text": np.array(["", "a red cat", "ein blaues Haus 🏠"], dtype=object),
        "prompt/embedding": number(4, 3, 3, 5).astype(np.float16),
    }
    if profile == "full":
        made |= {
            "x_t": x_t,
            "delta": number(5, *record, *LATENT).astype(np.float16),
            "x0_t": number(6, *record, *LATENT).astype(np.float16),
        }
    return made


def alphas_cumprod() -> tuple[float, ...]:
    """Stable Diffusion's scaled-linear table, in float64."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return tuple(round(float(value), 9) for value in np.cumprod(1 - betas))


def levels() -> LevelTables:
    return LevelTables.of(Levels.from_alphas_cumprod(torch.tensor(alphas_cumprod(), dtype=torch.float64)))


def write(folder: Path, profile: str) -> None:
    manifest = Manifest(
        family="sd",
        latent_shape=LATENT,
        levels=levels(),
        conditions={"embedding": ConditionSpec(dtype="float16", axes=("token", "width"), per="prompt")},
        profile=profile,
        seed=42,
        timesteps_per_pair=STEPS,
        resolution=32,
        crop="center",
        flip=False,
        vae_latent="mean",
        vae_dtype="float32",
        network_dtype="float32",
        inverter=InverterIdentity(name="ddim", grid_points=10, timestep_range=(0, 1000)),
        fingerprints={"network": "0" * 32, "vae": "1" * 32, "text_encoder": "2" * 32, "scheduler": "3" * 32},
        versions={"inpo-cache": "0.1.0"},
    )
    writer = CacheWriter.open(str(folder), manifest)
    source = ShardSource(location="golden", input_shard="0", rows=(0, 4), fingerprint="4" * 32)
    skipped = [{"pair_id": "fourth", "reason": "tie", "detail": "label 0.5", "row": 3}]
    assert writer.write("0-00000", ShardData(arrays=arrays(profile), source=source, skipped=skipped))
    if profile == "full":
        source = ShardSource(location="golden", input_shard="0", rows=(4, 5), fingerprint="4" * 32)
        skipped = [{"pair_id": "fifth", "reason": "unlabelled", "detail": "", "row": 4}]
        assert writer.write("0-00004", ShardData(arrays={}, source=source, skipped=skipped))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if target.exists():
        sys.exit(f"{target} exists; a golden cache is written once")
    for name in ("full", "lean"):
        write(target / name, name)
