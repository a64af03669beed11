"""The golden caches are read by this version, and their bytes are what they always were."""

import hashlib
import importlib.util
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from inpo.common.cache import SCHEMA_VERSION, CacheWriter, open_cache
from inpo.common.cache.derive import point_from_target
from inpo.common.errors import CacheSchemaError

GOLDEN = Path(__file__).parent / "golden" / "v2"
FIRST = GOLDEN.parent / "v1"
PROFILES = ("full", "lean")


@pytest.fixture(scope="module")
def made():
    """The script that wrote them, for its formulas."""
    spec = importlib.util.spec_from_file_location("make_golden", Path(__file__).parent / "make_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def raw(folder: Path) -> np.ndarray | list[str]:
    """An array from its files alone, with struct and numpy: no zarr, no code of ours."""
    meta = json.loads((folder / "zarr.json").read_text())
    chunk = folder.joinpath("c", *["0"] * len(meta["shape"]))
    data = chunk.read_bytes()
    if meta["data_type"] == "string":
        (count,) = struct.unpack_from("<I", data)
        texts, at = [], 4
        for _ in range(count):
            (length,) = struct.unpack_from("<I", data, at)
            texts.append(data[at + 4 : at + 4 + length].decode())
            at += 4 + length
        assert at == len(data) - 4  # crc32c
        return texts
    dtype = np.dtype(meta["data_type"]).newbyteorder("<")
    if meta["codecs"][0]["name"] != "sharding_indexed":
        return np.frombuffer(data[:-4], dtype).reshape(meta["shape"])
    inner = meta["codecs"][0]["configuration"]["chunk_shape"]
    grid = [size // step for size, step in zip(meta["shape"], inner, strict=True)]
    index = np.frombuffer(data[-4 - 16 * int(np.prod(grid)) : -4], "<u8").reshape(*grid, 2)
    out = np.empty(meta["shape"], dtype)
    for place in np.ndindex(*grid):
        offset, length = (int(value) for value in index[place])
        values = np.frombuffer(data[offset : offset + length - 4], dtype).reshape(inner)
        out[tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, inner, strict=True))] = values
    return out


@pytest.mark.parametrize("profile", PROFILES)
def test_the_golden_bytes_are_the_formulas_numbers(made, profile):
    (attempt,) = (GOLDEN / profile / "shards" / "0-00000").iterdir()
    for path, expected in made.arrays(profile).items():
        got = raw(attempt / path)
        assert got == list(expected) if isinstance(got, list) else got.tobytes() == expected.tobytes(), path


@pytest.mark.parametrize("profile", PROFILES)
def test_this_version_reads_the_golden_cache(made, profile):
    cache = open_cache(str(GOLDEN / profile))
    assert cache.num_pairs == 3
    assert cache.num_records == 6
    assert list(cache.shards) == ["0-00000"]
    shard = cache.shards["0-00000"]
    assert shard.commit.skipped == {"tie": 1}
    for path, expected in made.arrays("full").items():
        if path in made.arrays(profile) or path == "x_t":  # a lean cache gives x_t as well
            got = shard.read(path)
            same = list(got) == list(expected) if expected.dtype == object else got.tobytes() == expected.tobytes()
            assert same, path
    if profile == "full":
        assert cache.commits["0-00004"].num_pairs == 0


@pytest.mark.parametrize("profile", PROFILES)
def test_commits_describe_their_files_and_seal_themselves(profile):
    """Sizes, digests and checksum by the rules that cache_schema.md gives, in a few lines."""

    def digest(data: bytes) -> str:
        return hashlib.blake2b(data, digest_size=16).hexdigest()

    root = GOLDEN / profile
    commit = json.loads((root / "commits" / "0-00000.json").read_text())
    attempt = root / "shards" / "0-00000" / commit["attempt"]
    files = {str(file.relative_to(attempt)): file.read_bytes() for file in attempt.rglob("*") if file.is_file()}
    assert commit["files"] == {name: len(data) for name, data in files.items()}
    assert all(len(data) <= 3 * 4096 for data in files.values())  # so the sample is the file
    assert commit["digests"] == {name: digest(data) for name, data in files.items()}
    assert commit["manifest"] == digest((root / "manifest.json").read_bytes())
    checksum = commit.pop("checksum")
    assert checksum == digest(json.dumps(commit, sort_keys=True, separators=(",", ":")).encode())


@pytest.mark.parametrize("version", [0, 1, 3, "2", None])
def test_another_version_is_refused_by_number(tmp_path, version):
    shutil.copytree(GOLDEN / "lean", tmp_path / "cache")
    file = tmp_path / "cache" / "manifest.json"
    manifest = json.loads(file.read_text()) | {"schema_version": version, "a_field_of_that_version": 1}
    file.write_text(json.dumps(manifest))
    with pytest.raises(CacheSchemaError, match="another schema version") as caught:
        open_cache(str(tmp_path / "cache"))
    assert f"expected: {SCHEMA_VERSION}" in str(caught.value)
    assert f"got:      {version}".replace("None", "none") in str(caught.value)


def test_a_golden_cache_can_be_appended_to(tmp_path, made):
    shutil.copytree(GOLDEN / "full", tmp_path / "cache")
    cache = open_cache(str(tmp_path / "cache"))
    writer = CacheWriter.open(cache.location, cache.manifest)
    assert writer.committed() == {"0-00000", "0-00004"}
    source = cache.commits["0-00000"].source
    from inpo.common.cache import ShardData

    assert writer.write("1-00000", ShardData(arrays=made.arrays("full"), source=source))
    assert open_cache(cache.location).num_pairs == 6


@pytest.mark.parametrize("profile", PROFILES)
def test_every_number_of_version_1_is_made_again_to_the_last_bit(tmp_path, made, profile):
    """Version 1's arrays, read with zarr alone: what this code writes for the same pairs has the same bytes, and from
    x0, target and the levels it makes the same x_t.
    """
    (attempt,) = (FIRST / profile / "shards" / "0-00000").iterdir()
    old = {path: zarr.open_array(str(attempt / path), mode="r")[...] for path in made.arrays(profile)}
    made.write(tmp_path / "again", profile)
    (again,) = (tmp_path / "again" / "shards" / "0-00000").iterdir()
    for path in old:
        (one,), (other,) = (
            [f for f in (root / path / "c").rglob("*") if f.is_file()] or [root / path / "c"]
            for root in (attempt, again)
        )
        assert one.read_bytes() == other.read_bytes(), path
    (full,) = (FIRST / "full" / "shards" / "0-00000").iterdir()
    x_t = zarr.open_array(str(full / "x_t"), mode="r")[...]
    tables = made.levels().levels().at(old["timestep"])
    a, s = (torch.from_numpy(table)[..., None, None, None, None].expand(-1, -1, 2, 1, 1, 1) for table in tables)
    target = torch.from_numpy(old["target"])
    x0 = torch.from_numpy(old["x0"])[:, None].expand_as(target)
    assert point_from_target(x0, target, a, s).numpy().tobytes() == x_t.tobytes()
    assert open_cache(str(tmp_path / "again")).shards["0-00000"].read("x_t").tobytes() == x_t.tobytes()


def test_version_1_is_refused_by_its_number():
    with pytest.raises(CacheSchemaError, match="another schema version") as caught:
        open_cache(str(FIRST / "full"))
    assert "got:      1" in str(caught.value)


def test_golden_caches_stay_small():
    sizes = [file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file()]
    assert sum(sizes) < 200_000
