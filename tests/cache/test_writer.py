"""What a writer takes into a cache that exists, and what it refuses."""

import json
import shutil

import numpy as np
import pytest
import torch

from inpo.common.cache import CacheWriter, InverterIdentity, open_cache
from inpo.common.cache.store import CacheStore
from inpo.common.errors import CacheCorrupt, CacheMismatch


def test_another_identity_is_refused_with_both_values(tmp_path, build):
    build.cache(tmp_path, pairs=(1,))
    other = build.manifest(seed=7, network_dtype="bfloat16")
    with pytest.raises(CacheMismatch) as caught:
        CacheWriter.open(str(tmp_path), other)
    for part in ("seed = 0", "seed = 7", "network_dtype = 'float32'", "network_dtype = 'bfloat16'", str(tmp_path)):
        assert part in str(caught.value)


def test_another_noise_table_under_one_fingerprint_is_refused(tmp_path, build):
    """The scheduler's settings may be read otherwise by another version of its library."""
    signal = build.cache(tmp_path, pairs=(1,)).levels.signal
    table = np.array(signal) ** 2
    for other in (table * (1 + 1e-4), table[:-1], np.concatenate([table[:500], table[500:] * 0.999])):
        manifest = build.manifest(
            levels=build.levels(other),
            inverter=InverterIdentity(name="ddim", grid_points=10, timestep_range=(0, len(other))),
        )
        with pytest.raises(CacheMismatch, match="levels") as caught:
            CacheWriter.open(str(tmp_path), manifest)
        for words in (f"signal {signal[0]:.9g} to {signal[-1]:.9g}, 1000 values", f"{len(other)} values"):
            assert words in str(caught.value)


def test_a_table_that_differs_in_the_last_bit_gives_way_to_the_caches_own(tmp_path, build):
    levels = build.cache(tmp_path, pairs=(1,)).levels
    rounded = build.levels((np.array(levels.signal) ** 2).astype(np.float32).astype(np.float64))
    assert rounded.signal != levels.signal
    assert rounded.noise != levels.noise
    writer = CacheWriter.open(str(tmp_path), build.manifest(levels=rounded))
    assert writer.manifest.levels == levels
    assert torch.equal(writer.manifest.levels.levels().signal, torch.tensor(levels.signal, dtype=torch.float64))


@pytest.mark.parametrize("committed", ["commits", "text-commits"])
def test_nothing_is_written_under_a_manifest_that_was_edited(tmp_path, build, committed):
    """Also where its identity is the same: what is committed names its bytes, and no manifest would fit old and new."""
    manifest = build.cache(tmp_path, pairs=(1,))
    shutil.rmtree(tmp_path / ({"commits", "text-commits"} - {committed}).pop())
    file = tmp_path / "manifest.json"
    whole = file.read_bytes()
    file.write_text(json.dumps(json.loads(whole), indent=2))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(CacheCorrupt, match="was edited or replaced: restore it") as caught:
        CacheWriter.open(str(tmp_path), manifest)
    assert str(file) in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    file.write_bytes(whole)
    assert CacheWriter.open(str(tmp_path), manifest).write("later", build.shard(manifest, 2)) is not None


def test_a_cache_of_many_shards_is_opened_by_few_of_its_commits(tmp_path, build, monkeypatch):
    """A process of hundreds asks this of a bucket. What of them it reads was there before: an edit is seen."""
    manifest = build.cache(tmp_path, pairs=(1,) * 40)
    read = []
    get_many = CacheStore.get_many
    monkeypatch.setattr(CacheStore, "get_many", lambda store, names: read.extend(names) or get_many(store, names))
    CacheWriter.open(str(tmp_path), manifest)
    assert {name.split("/")[0] for name in read} == {"commits", "text-commits"}
    assert len(read) < 20
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()), indent=2))
    with pytest.raises(CacheCorrupt, match="edited or replaced"):
        CacheWriter.open(str(tmp_path), manifest)


@pytest.mark.parametrize(
    "change", [{"space": "velocity"}, {"floor": 0.05}, {"label": tuple(map(float, range(1, 1001)))}]
)
def test_levels_that_mean_something_else_are_refused(tmp_path, build, change):
    levels = build.cache(tmp_path, pairs=(1,)).levels
    with pytest.raises(CacheMismatch, match="levels"):
        CacheWriter.open(str(tmp_path), build.manifest(levels=levels.model_copy(update=change)))


def test_what_changes_no_number_is_no_identity(tmp_path, build):
    build.cache(tmp_path, pairs=(1,))
    writer = CacheWriter.open(str(tmp_path), build.manifest(versions={"inpo-cache": "9", "torch": "3"}))
    writer.write("later", build.shard(writer.manifest, 2))
    assert open_cache(str(tmp_path)).num_pairs == 3


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("x0", lambda v: v.astype(np.float32), "float32"),
        ("x0", lambda v: v[:, :, :3], "instead of float16"),
        ("delta", lambda v: np.where(v == v.max(), np.float16(np.inf), v), "NaN or infinity"),
        ("pair/label", lambda v: np.full_like(v, np.nan), "NaN or infinity"),
        ("image/group", lambda v: v[::-1], "image/group"),
        ("image/group", lambda v: v * 2, "image/group"),
        ("pair/win", lambda v: v + 1, "of no pair"),
        ("pair/win", lambda v: v + 99, "of no pair"),
        ("pair/lose", lambda v: v[::-1].copy(), "two groups"),
        ("pair/id", lambda v: v[:-1], "instead of"),
        ("group/prompt", lambda v: v + 1, "beyond its 2 texts"),
        ("group/prompt", lambda v: v - 2, "beyond its 2 texts"),
    ],
)
def test_the_writer_refuses_what_breaks_the_contract(tmp_path, build, path, change, message):
    manifest = build.manifest()
    shard = build.shard(manifest, 2)
    shard.arrays[path] = change(shard.arrays[path])
    with pytest.raises(AssertionError, match=message):
        CacheWriter.open(str(tmp_path), manifest).write("s", shard)
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("embedding", lambda v: v[:-1], "instead of"),
        ("embedding", lambda v: v.astype(np.float32), "float32"),
        ("embedding", lambda v: np.full_like(v, np.nan), "NaN or infinity"),
        ("length", lambda v: v[:, None], "instead of"),
        ("pooled", lambda v: np.where(v == v.max(), np.float16(np.inf), v), "NaN or infinity"),
        ("text", lambda v: np.arange(len(v)), "instead of text"),
    ],
)
def test_the_writer_refuses_texts_that_break_the_contract(tmp_path, build, path, change, message):
    manifest = build.manifest(**build.everything)
    texts = build.texts(manifest)
    texts.arrays[path] = change(texts.arrays[path])
    with pytest.raises(AssertionError, match=message):
        CacheWriter.open(str(tmp_path), manifest).write_texts("t", texts)
    assert not (tmp_path / "texts").exists()
