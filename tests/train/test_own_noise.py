"""Images noised with what they were made from: a flow's cache without an inversion, by seeds or by files."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inpo.common.cache import open_cache
from inpo.common.cache_settings import CacheSettings
from inpo.common.errors import UsageError
from inpo.common.models import open_model
from inpo.common.testing import save_tiny_pipeline
from inpo.inspection.verify import verify
from inpo.precompute.run import run_precompute
from inpo.precompute.settings import RayOptions


def test_an_image_is_noised_with_what_it_was_made_from(run: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_tiny_pipeline(tmp_path / "sd3", "sd3")
    sizes = {"a": 32, "b": 32, "resized": 48, "without": 32}
    rows = []
    for number, (name, size) in enumerate(sizes.items()):
        for side in ("0", "1"):
            pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels if side == "0" else pixels[::-1]).save(tmp_path / f"{name}{side}.png")
        row = {"jpg_0": f"{name}0.png", "jpg_1": f"{name}1.png", "prompt": "a red cat", "id": name}
        seeds = {} if name == "without" else {"seeds": [10 * number, 10 * number + 1]}
        rows.append(row | seeds | {"label_0": 1 - number % 2, "label_1": number % 2})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sections = ({"model": str(folder)}, {"pairs": str(tmp_path), "cache": str(tmp_path / "c")})
    settings = {"resolution": 32, "grid_points": 3, "timesteps_per_pair": 3, "decode_workers": 0, "inverter": "tracked"}
    assert run_precompute(None, *sections, settings, ray_options=RayOptions(), dry_run=False) == 0
    cache = open_cache(str(tmp_path / "c"))
    (shard,) = cache
    assert shard.commit.skipped == {"missing_noise": 2}
    x0, target = shard.read("x0").astype(np.float32), shard.read("target")
    for pair, seeds in (("a", (0, 1)), ("b", (11, 10))):  # win first, whatever the order in the row
        (row,) = np.flatnonzero(shard.read("pair/id") == pair)
        for image, seed in zip(shard.sides()[row], seeds, strict=True):
            noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(seed))[0].numpy()
            for record in range(3):
                np.testing.assert_array_equal(target[image, record], (noise - x0[image]).astype(np.float16))
    found = verify(cache.location, model=open_model(str(folder)))
    assert found.findings == []
    assert max(found.reinverted.values()) < 1e-3
    assert CacheSettings.of(cache.manifest).inverter == "tracked"

    # The same noise as files, in place of the seeds: the same cache. One of another shape is none.
    for number, row in enumerate(rows):
        for side, seed in enumerate(row.pop("seeds", ())):
            shape = (1, 16, 8, 8) if number < 2 else (16, 4, 4)
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            np.save(tmp_path / f"{number}-{side}.npy", noise.numpy())
        row["noises"] = [f"{number}-0.npy", f"{number}-1.npy"] if number < 3 else None
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sections[1]["cache"] = str(tmp_path / "files")
    assert run_precompute(None, *sections, settings, ray_options=RayOptions(), dry_run=False) == 0
    (other,) = open_cache(str(tmp_path / "files"))
    assert other.commit.skipped == {"missing_noise": 2}
    for name in ("x_t", "target", "reference_error"):
        np.testing.assert_array_equal(other.read(name), shard.read(name))
    output = run(model=str(folder), caches=[cache.location], steps=1, objective="dpo", lora_rank=2)
    assert json.loads((output / "metrics.jsonl").read_text().splitlines()[0])["loss"] == pytest.approx(
        np.log(2), abs=1e-3
    )

    for model, more, words in (
        (folder, {"flip": True}, "mirrored"),
        (save_tiny_pipeline(tmp_path / "sd15", "sd15"), {}, "own noise is for flow models"),
    ):
        sections = ({"model": str(model)}, {"pairs": str(tmp_path), "cache": str(tmp_path / "refused")})
        with pytest.raises(UsageError, match=words):
            run_precompute(None, *sections, settings | more, ray_options=RayOptions(), dry_run=False)
