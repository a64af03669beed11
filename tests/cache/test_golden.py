"""The golden caches are read by this version, and their bytes are what they always were."""

import hashlib
import importlib.util
import json
import shutil
import struct
from pathlib import Path

import numcodecs
import numpy as np
import pytest

from inpo.common.cache import SCHEMA_VERSION, CacheWriter, TextCommit, open_cache, to_xarray
from inpo.common.conditions import Condition
from inpo.common.errors import CacheSchemaError

GOLDEN = Path(__file__).parent / "golden" / "v2"
CACHES = ("full", "lean", "compact", "grouped")


@pytest.fixture(scope="module")
def made():
    """The script that wrote them, for its formulas."""
    spec = importlib.util.spec_from_file_location("make_golden", Path(__file__).parent / "make_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def raw(folder: Path) -> np.ndarray | list[str]:
    """An array from its files alone, with struct, numpy and numcodecs' zstd: no zarr, no code of ours."""
    meta = json.loads((folder / "zarr.json").read_text())
    data = folder.joinpath("c", *["0"] * len(meta["shape"])).read_bytes()
    codecs, shape = meta["codecs"], meta["shape"]
    is_sharded = codecs[0]["name"] == "sharding_indexed"
    inner = codecs[0]["configuration"]["chunk_shape"] if is_sharded else shape
    codecs = codecs[0]["configuration"]["codecs"] if is_sharded else codecs

    def chunk(part: bytes) -> bytes:
        part = part[:-4]  # crc32c
        return numcodecs.Zstd().decode(part) if codecs[1]["name"] == "zstd" else part

    if meta["data_type"] == "string":
        data = chunk(data)
        (count,) = struct.unpack_from("<I", data)
        texts, at = [], 4
        for _ in range(count):
            (length,) = struct.unpack_from("<I", data, at)
            texts.append(data[at + 4 : at + 4 + length].decode())
            at += 4 + length
        assert at == len(data)
        return texts
    dtype = np.dtype(meta["data_type"]).newbyteorder("<")
    if not is_sharded:
        return np.frombuffer(chunk(data), dtype).reshape(shape)
    grid = [size // step for size, step in zip(shape, inner, strict=True)]
    index = np.frombuffer(data[-4 - 16 * int(np.prod(grid)) : -4], "<u8").reshape(*grid, 2)
    out = np.empty(shape, dtype)
    for place in np.ndindex(*grid):
        offset, length = (int(value) for value in index[place])
        values = np.frombuffer(chunk(data[offset : offset + length]), dtype).reshape(inner)
        out[tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, inner, strict=True))] = values
    return out


def same(got: np.ndarray | list[str], expected: np.ndarray) -> bool:
    if expected.dtype == object:
        return list(got) == list(expected)
    return got.shape == expected.shape and got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", CACHES)
def test_the_golden_bytes_are_the_formulas_numbers(made, name):
    places = {"shards/0-00000": made.stored(name)} | {f"texts/{text}": each for text, each in made.texts(name).items()}
    for place, arrays in places.items():
        (attempt,) = (GOLDEN / name / place).iterdir()
        for path, expected in arrays.items():
            assert same(raw(attempt / path), expected), path


@pytest.mark.parametrize("name", CACHES)
def test_this_version_reads_the_golden_cache(made, name):
    cache = open_cache(str(GOLDEN / name))
    assert cache.num_pairs == len(made.SIDES[name])
    assert list(cache.shards) == ["0-00000"]
    shard = cache.shards["0-00000"]
    assert shard.commit.skipped == {"tie": 1}
    everything = made.arrays(name if name in made.SMALL else "full")
    for path, expected in everything.items():
        if path in made.arrays(name) or path == "x_t":  # every cache gives x_t
            assert same(shard.read(path), expected), path
    assert shard.sides().tolist() == [list(sides) for sides in made.SIDES[name]]
    assert shard.prompts().tolist() == [made.PROMPTS[row] for _, row in everything["group/prompt"]]
    for text, arrays in made.texts(name).items():
        for path, expected in arrays.items():
            assert same(cache.texts.need(text).read_stored(path), expected), path
    assert cache.texts.need("prompts").commit.cut == (1,)
    assert cache.texts.need("prompts").commit.not_finite == (2,)
    if name == "full":
        assert cache.commits["0-00004"].num_pairs == 0


def test_the_prompts_of_the_grouped_cache_are_padded_to_four_tokens(made):
    shard = open_cache(str(GOLDEN / "grouped")).shards["0-00000"]
    told = Condition.of(shard, np.array([4, 0]))  # the empty prompt, for a dropped caption, and the first one
    texts = made.texts("grouped")
    assert told["length"].tolist() == [1, 2]
    assert told["embedding"].shape == (2, 4, 5)
    for row, want in enumerate((texts["empty"]["embedding"][0], texts["prompts"]["embedding"][0])):
        assert np.array_equal(told["embedding"][row, : len(want)], want)
        assert not told["embedding"][row, len(want) :].any()


@pytest.mark.parametrize("name", CACHES)
def test_commits_describe_their_files_and_seal_themselves(name):
    """Sizes, digests and checksum by the rules that cache_schema.md gives, in a few lines."""

    def digest(data: bytes) -> str:
        return hashlib.blake2b(data, digest_size=16).hexdigest()

    root = GOLDEN / name
    for path, place in (
        ("commits/0-00000.json", "shards/0-00000"),
        ("text-commits/empty.json", "texts/empty"),
        ("text-commits/prompts.json", "texts/prompts"),
    ):
        commit = json.loads((root / path).read_text())
        attempt = root / place / commit["attempt"]
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


@pytest.mark.parametrize("name", CACHES)
def test_a_golden_cache_can_be_appended_to(tmp_path, made, name):
    shutil.copytree(GOLDEN / name, tmp_path / "cache")
    cache = open_cache(str(tmp_path / "cache"))
    writer = CacheWriter.open(cache.location, cache.manifest)
    assert writer.committed() == set(cache.commits)
    assert writer.committed(TextCommit) == {"empty", "prompts"}
    assert writer.write("1-00000", made.shard(name, row=10))
    assert open_cache(cache.location).num_pairs == 2 * cache.num_pairs


def test_golden_caches_stay_small():
    sizes = [file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file()]
    assert sum(sizes) < 230_000


@pytest.mark.parametrize("name", CACHES)
def test_the_dataset_has_the_numbers_that_a_shard_gives(name):
    """Of a compact cache too, which holds multiples of a scale."""
    (shard,) = open_cache(str(GOLDEN / name))
    found = to_xarray(str(GOLDEN / name))
    for path in ("x0", "target", "x_t"):
        np.testing.assert_array_equal(found[path].values, shard.read(path))
        assert found[path].dtype == np.float16
