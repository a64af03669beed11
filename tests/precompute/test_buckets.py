"""Sizes that are not square, lists, and buckets: what reaches the cache, and where."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from inpo.common.cache import open_cache
from inpo.common.cache.buckets import open_caches
from inpo.common.errors import CacheMismatch, CacheMissing, UsageError
from inpo.precompute.buckets import bucket_sizes
from tests.precompute.conftest import png


def picture(seed: int, height: int, width: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return png(np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)))


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """Two square pairs, one high, one of both kinds, one row without an image."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    rows = []
    for number, (win, lose) in enumerate([("s", "s"), ("h", "h"), ("s", "h"), ("s", "s")]):
        sizes = {"s": (40, 44), "h": (64, 32)}
        for side, shape in (("win", win), ("lose", lose)):
            (folder / f"{number}-{side}.png").write_bytes(picture(2 * number + (side == "win"), *sizes[shape]))
        rows.append(
            {"win": f"{number}-win.png", "lose": f"{number}-lose.png", "prompt": f"p{number}", "id": str(number)}
        )
    rows.append({"win": "gone.png", "lose": "0-lose.png", "prompt": "gone", "id": "gone"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_pairs_go_to_the_bucket_of_both_their_images(
    pipelines: Callable, shapes: Path, run: Callable, tmp_path: Path
) -> None:
    assert run(str(shapes), pipelines("sdxl"), tmp_path / "cache", buckets="3") == 0
    assert json.loads((tmp_path / "cache" / "buckets.json").read_text()) == {"buckets": ["24x44", "32x32", "44x24"]}
    found = {cache.manifest.resolution: cache for cache in open_caches(str(tmp_path / "cache"))}
    assert list(found) == [(32, 32), (44, 24)]
    ids = {size: [str(each) for shard in cache for each in shard.read("pair/id")] for size, cache in found.items()}
    assert ids == {(32, 32): ["0", "3"], (44, 24): ["1"]}
    skipped = [commit.skipped for cache in found.values() for commit in cache.commits.values()]
    assert skipped == [{"mixed_sizes": 1, "missing_image": 1}, {}]
    (shard,) = found[44, 24]
    assert shard.read("x0").shape == (2, *found[44, 24].manifest.latent_shape)
    assert shard.read("image/time_ids").tolist() == [[64, 32, 2, 0, 44, 24]] * 2
    prompts = {text for texts in found[44, 24].texts for text in texts.text}
    assert prompts == {"", "p1"}
    with pytest.raises(CacheMismatch, match=r"(?s)sorted by other buckets.*24x44, 32x32, 44x24"):
        run(str(shapes), pipelines("sdxl"), tmp_path / "cache", buckets="1")
    (tmp_path / "cache" / "44x24" / "manifest.json").unlink()
    with pytest.raises(CacheMissing, match=r"(?s)lost its manifest.*44x24"):  # and is not taken for one not yet made
        open_caches(str(tmp_path / "cache"))


def test_an_image_is_cut_to_a_size_that_is_no_square(
    pipelines: Callable, shapes: Path, run: Callable, tmp_path: Path
) -> None:
    cache = run.cache(str(shapes), pipelines("sdxl"), tmp_path / "cache", resolution="32x48", limit=1)
    assert cache.manifest.resolution == (32, 48)
    assert cache.manifest.latent_shape[1:] == tuple(side // (32 // cache.manifest.latent_shape[1]) for side in (32, 48))
    (shard,) = cache
    # 40 x 44 covers 32 x 48 as 44 x 48: six rows are cut off above and below.
    assert shard.read("image/time_ids")[0].tolist() == [40, 44, 6, 0, 32, 48]


def test_sdxl_buckets_are_its_own_sizes_and_scale() -> None:
    sizes = bucket_sizes("sdxl", (1024, 1024), 8)
    assert {(1024, 1024), (1152, 896), (832, 1216), (1536, 640)} < set(sizes)
    assert len(sizes) == 9
    assert (608, 416) in bucket_sizes("sdxl", (512, 512), 8)
    for count in (1, 2, 5):
        made = bucket_sizes(str(count), (1024, 1024), 16)
        assert len(made) == count
        assert all(h % 64 == w % 64 == 0 and abs(h * w / 1024**2 - 1) < 0.07 for h, w in made)
    with pytest.raises(UsageError, match="around a square"):
        bucket_sizes("3", (512, 768), 8)


def test_a_ranking_is_one_group_with_its_scores(pipelines: Callable, run: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "lists"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.png").write_bytes(picture(number, 32, 32))
    rows: list[dict[str, Any]] = [
        {"id": "r", "prompt": "p", "images": ["0.png", "1.png", "2.png"], "ranks": [2, 1, 3]},
        {"id": "v", "prompt": "p", "images": ["3.png", "4.png"], "scores": [0.5, 0.25]},
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache = run.cache(str(folder), pipelines(), tmp_path / "cache")
    assert cache.manifest.group == "list"
    (shard,) = cache
    assert (shard.num_pairs, shard.num_images, shard.commit.num_groups) == (4, 5, 2)
    assert shard.read("image/group").tolist() == [0, 0, 0, 1, 1]
    assert shard.read("pair/id").tolist() == ["r.0-1", "r.0-2", "r.1-2", "v.0-1"]
    assert shard.sides().tolist() == [[0, 1], [1, 2], [0, 2], [3, 4]]
    assert shard.read("image/score").tolist() == [-1, -2, -3, 0.5, 0.25]
    plain = open_cache(str(tmp_path / "cache")).manifest
    assert plain.group == "list"
