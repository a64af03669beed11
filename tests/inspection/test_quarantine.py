"""What `verify --quarantine` moved aside is made again by the next `inpo precompute`, and nothing else is."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inpo.common.cache import open_cache
from inpo.precompute.run import run_precompute
from inpo.precompute.settings import RayOptions
from tests.inspection.conftest import flip_byte

PROMPTS = ("a red cat", "a blue dog", "a red cat")


def precompute(folder: Path, model: Path) -> Path:
    """Of three pairs of two prompts."""
    pairs = folder / "pairs"
    if not pairs.exists():
        pairs.mkdir()
        lines = []
        for number, prompt in enumerate(PROMPTS):
            names = {side: f"{number}-{side}.png" for side in ("win", "lose")}
            for seed, name in enumerate(names.values()):
                pixels = np.random.default_rng(2 * number + seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(pairs / name)
            lines.append(json.dumps(names | {"prompt": prompt, "id": f"pair-{number}"}))
        (pairs / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    settings = {"resolution": 32, "grid_points": 3, "timesteps_per_pair": 2, "decode_workers": 0}
    data = {"pairs": str(pairs), "cache": str(folder / "cache")}
    code = run_precompute(None, {"model": str(model)}, data, settings, ray_options=RayOptions(), dry_run=False)
    assert code == 0
    return folder / "cache"


def contents(cache: Path, folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in (cache / folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("damage", ["bytes of the prompts", "bytes of the empty prompt", "commit"])
def test_a_bad_text_shard_is_encoded_again_under_its_name_and_no_image_is_inverted_again(
    tiny, inspect, tmp_path, damage
):
    cache = precompute(tmp_path, tiny())
    names = {file.stem for file in (cache / "text-commits").iterdir()}
    (prompts,) = names - {"empty"}
    before = open_cache(str(cache))
    embedding = {name: before.texts.need(name).read_stored("embedding") for name in names}
    images = contents(cache, "shards") | contents(cache, "commits")
    bad = "empty" if damage == "bytes of the empty prompt" else prompts
    if damage == "commit":
        (cache / "text-commits" / f"{bad}.json").write_text("{}")
    else:
        flip_byte(cache, bad, "embedding", of="texts")

    done = inspect("verify", cache, "--quarantine")
    assert done.code == 1
    assert f"1 bad: texts/{bad}" in done.out
    assert (cache / "quarantine" / "texts" / f"{bad}.json").is_file()

    precompute(tmp_path, tiny())
    done = inspect("verify", cache, "--model", tiny())
    assert done.code == 0, done.out
    assert "all sound" in done.out
    assert contents(cache, "shards") | contents(cache, "commits") == images
    after = open_cache(str(cache))
    assert {shard.name for shard in after.texts} == names
    for name in names:
        assert after.texts.need(name).text == before.texts.need(name).text
        assert np.array_equal(after.texts.need(name).read_stored("embedding"), embedding[name])
    # Of the shard that was set aside the attempt is left.
    orphan = before.texts.need(bad).folder if damage != "commit" else None
    assert orphan is None or orphan in inspect("clean", cache, "--yes", "--all").out


def test_a_bad_shard_of_images_is_inverted_again_and_no_text_is_encoded_again(tiny, inspect, tmp_path):
    cache = precompute(tmp_path, tiny())
    texts = contents(cache, "texts") | contents(cache, "text-commits")
    (name,) = open_cache(str(cache)).shards
    before = open_cache(str(cache)).shards[name].read("target")
    flip_byte(cache, name, "target")
    assert f"1 bad: {name}" in inspect("verify", cache, "--quarantine").out
    precompute(tmp_path, tiny())
    assert inspect("verify", cache, "--model", tiny()).code == 0
    assert contents(cache, "texts") | contents(cache, "text-commits") == texts
    assert np.allclose(open_cache(str(cache)).shards[name].read("target"), before, atol=1e-2)


@pytest.mark.parametrize("of", ["shards", "texts"])
@pytest.mark.parametrize("how", ["link", "empty", "marked"])
def test_nothing_is_moved_where_a_disk_is_not_mounted(fresh, inspect, tmp_path, of, how):
    cache = fresh("healthy")
    commits = contents(cache, "commits") | contents(cache, "text-commits")
    (cache / of).rename(tmp_path / "disk")
    if how == "link":
        (cache / of).symlink_to(tmp_path / "nowhere")
    else:
        (cache / of).mkdir()
    if how == "marked":  # as many leave it in the place of a disk
        (cache / of / "NOT_MOUNTED").touch()
    done = inspect("verify", cache, "--quarantine")
    assert done.code == 1
    assert ("leads nowhere" if how == "link" else "Not one file of any shard is there") in done.out
    assert contents(cache, "commits") | contents(cache, "text-commits") == commits
    (cache / of).unlink() if how == "link" else shutil.rmtree(cache / of)
    (tmp_path / "disk").rename(cache / of)
    assert "all sound" in inspect("verify", cache).out
