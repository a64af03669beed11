"""Every kind of damage to every file of a cache is found before a number is handed out, and is named."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from inpo.common.cache import ARRAYS, Cache, CacheWriter, Shard, TextShard, open_cache
from inpo.common.cache.committed import CommittedArrays
from inpo.common.conditions import Condition
from inpo.common.errors import CacheCorrupt, CacheIncomplete, CacheMissing, CacheSchemaError
from inpo.inspection.checks import check_shard, check_texts

PATHS = [
    *(spec.path for spec in ARRAYS),
    "image/time_ids",
    *(f"texts/{name}" for name in ("text", "embedding", "length", "pooled")),
]
"""Arrays of a shard of images, and of one of texts."""
ALIKE = ("image/group", "pair/win", "pair/lose")
"""Of plain pairs these are the same numbers in every shard of one size."""


def flip(file: Path, position: float) -> None:
    data = bytearray(file.read_bytes())
    data[int(position * (len(data) - 1))] ^= 0x10
    file.write_bytes(data)


def swap(left: Path, right: Path) -> None:
    first, second = left.read_bytes(), right.read_bytes()
    assert first != second
    left.write_bytes(second)
    right.write_bytes(first)


def edit(file: Path) -> None:
    text = file.read_text()
    changed = text.replace('"fill_value": ', '"fill_value":  ')
    assert changed != text
    file.write_text(changed)


DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    "missing": lambda file, other: file.unlink(),
    "empty": lambda file, other: file.write_bytes(b""),
    "cut by one byte": lambda file, other: file.write_bytes(file.read_bytes()[:-1]),
    "cut in half": lambda file, other: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "one byte longer": lambda file, other: file.write_bytes(file.read_bytes() + b"\0"),
    "first byte flipped": lambda file, other: flip(file, 0),
    "middle byte flipped": lambda file, other: flip(file, 0.5),
    "last byte flipped": lambda file, other: flip(file, 1),
    "zeroed": lambda file, other: file.write_bytes(bytes(file.stat().st_size)),
    "swapped with another shard's": swap,
}


@pytest.fixture(scope="module")
def compact(tmp_path_factory, build) -> Path:
    """The same, of the profile that has scales."""
    folder = tmp_path_factory.mktemp("compact") / "cache"
    build.cache(folder, pairs=(3, 3), profile="compact")
    return folder


@pytest.fixture
def home(whole, compact, path) -> Path:
    """A cache that has the array."""
    return compact if path.endswith("_scale") else whole


def shard_of(folder: Path, name: str = "s0") -> Shard:
    return open_cache(str(folder)).shards[name]


def owner(cache: Cache, path: str, number: int = 0) -> tuple[CommittedArrays, str]:
    """The shard of images, or of texts, that has one of PATHS, of which nothing has been read, and the array's path in
    there."""
    if path.startswith("texts/"):
        shard = cache.texts.need(f"t{number}")
        return TextShard(cache.store, cache.manifest, shard.name, shard.commit), path.removeprefix("texts/")
    name = f"s{number}"
    return Shard(cache, name, cache.commits[name]), path


def chunks_of(cache: Cache, path: str) -> tuple[list[Path], Path]:
    """The array's folders in the first and the second shard, and the one file with its numbers, below them."""
    roots = [Path(shard.location) / array for shard, array in (owner(cache, path, number) for number in (0, 1))]
    (chunk,) = [file.relative_to(roots[0]) for file in (roots[0] / "c").rglob("*") if file.is_file()]
    return roots, chunk


def name_of(path: str) -> str:
    """What a message calls one of PATHS of the first shard."""
    return f"rray {path.removeprefix('texts/')} of " + ("text shard t0" if path.startswith("texts/") else "shard s0")


def found(cache: Cache, path: str) -> str | None:
    """The reader's message, or None if it handed out the array."""
    try:
        shard, array = owner(cache, path)
        shard.read_stored(array)
    except (CacheCorrupt, CacheSchemaError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("path", PATHS)
def test_every_damage_to_an_arrays_files_is_detected_and_named(home, tmp_path, path):
    folder = tmp_path / "cache"
    shutil.copytree(home, folder)
    cache = open_cache(str(folder))
    shards, chunk = chunks_of(cache, path)
    row: dict[str, bool] = {}
    for part in (chunk, Path("zarr.json")):
        damages = dict(DAMAGES)
        if path in ALIKE:
            damages.pop("swapped with another shard's")
        if part.name == "zarr.json":
            damages |= {"edited": lambda file, other: edit(file)}
            damages.pop("swapped with another shard's", None)  # two shards of one shape have the same metadata
        for name, damage in damages.items():
            files = [shard / part for shard in shards]
            before = [file.read_bytes() for file in files]
            damage(files[0], files[1])
            message = found(cache, path)
            words = (str(folder), name_of(path), "--quarantine")
            row[f"{part.name}: {name}"] = message is not None and all(word in message for word in words)
            for file, data in zip(files, before, strict=True):
                file.write_bytes(data)
    missed = [name for name, detected in row.items() if not detected]
    print(f"{path}: {len(row) - len(missed)} of {len(row)} detected")
    assert not missed
    assert len(row) == 20 - (path in ALIKE)
    assert found(cache, path) is None


@pytest.mark.parametrize("path", PATHS)
def test_verify_finds_every_damage_and_names_shard_and_array(home, tmp_path, path):
    """The same damages as above, by `inpo inspect verify`, which must look at what no training run reads, too."""
    folder = tmp_path / "cache"
    shutil.copytree(home, folder)
    cache = open_cache(str(folder))
    shards, chunk = chunks_of(cache, path)
    files = [shard / chunk for shard in shards]
    before = [file.read_bytes() for file in files]
    for name in ("middle byte flipped", "cut in half", "missing", "empty", "swapped with another shard's"):
        if path in ALIKE and name.startswith("swapped"):
            continue
        DAMAGES[name](files[0], files[1])
        shard, _ = owner(cache, path)
        result = check_texts(shard, cache.manifest) if isinstance(shard, TextShard) else check_shard(shard)
        found_bytes = [finding for finding in result.findings if finding.check in ("bytes", "texts")]
        assert any(name_of(path) in finding.detail for finding in found_bytes), name
        for file, data in zip(files, before, strict=True):
            file.write_bytes(data)


@pytest.mark.parametrize("path", ["pair/zarr.json", "zarr.json", "texts/zarr.json"])
def test_verify_finds_damaged_metadata_of_a_group(whole, tmp_path, path):
    """Other programs read the arrays by them."""
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    cache = open_cache(str(folder))
    shard, file = owner(cache, path)
    place = Path(shard.location) / file
    place.write_text(place.read_text().replace('"group"', '"array"'))  # as long as before
    result = check_texts(shard, cache.manifest) if isinstance(shard, TextShard) else check_shard(shard)
    # The numbers of `whole` are drawn, so that its reference errors are a finding too.
    (finding,) = [each for each in result.findings if "a group's metadata of" in each.detail]
    assert finding.check == ("texts" if path.startswith("texts/") else "bytes")
    assert not result.is_whole


@pytest.mark.parametrize(("left", "right"), [("x_t", "delta"), ("delta", "eps_ref"), ("x0_t", "target")])
def test_two_arrays_of_one_shape_swapped(whole, tmp_path, left, right):
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    root = Path(shard_of(folder).location)
    chunk = "c/0/0/0/0/0"
    swap(root / left / chunk, root / right / chunk)
    for path in (left, right):
        assert f"array {path}" in (found(open_cache(str(folder)), path) or "")


def test_a_swap_is_found_where_both_files_begin_and_end_alike(tmp_path, build):
    """One image often opens two shards, and the chunk index at the end is equal in all arrays of one shape."""
    manifest = build.manifest(latent=(4, 32, 32), profile="lean")
    writer = build.writer(tmp_path, manifest, texts=(0, 1))
    shards = [build.shard(manifest, 4, seed=seed) for seed in (0, 1)]
    shards[1].arrays["x0"][0] = shards[0].arrays["x0"][0]
    for index, shard in enumerate(shards):
        writer.write(f"s{index}", shard)
    files = [Path(shard_of(tmp_path, name).location) / "x0/c/0/0/0/0" for name in ("s0", "s1")]
    assert files[0].read_bytes()[:8192] == files[1].read_bytes()[:8192]
    swap(*files)
    assert "A file is not the committed one: array x0 of shard s0" in (found(open_cache(str(tmp_path)), "x0") or "")


def damage_a_chunk(shard: CommittedArrays, path: str, row: int, *, behind: int) -> None:
    """Change a byte of a row's (first) chunk, where no digest of a sample would tell it."""
    (file,) = [file for file in (Path(shard.location) / path / "c").rglob("*") if file.is_file()]
    data = bytearray(file.read_bytes())
    array = zarr.open_array(f"{shard.location}/{path}", mode="r")
    grid = [size // inner for size, inner in zip(array.shape, array.chunks, strict=True)]
    index = np.frombuffer(data[-4 - 16 * math.prod(grid) : -4], "<u8").reshape(*grid, 2)
    position = int(index[row].reshape(-1, 2)[0, 0]) + behind
    assert behind < int(index[row].reshape(-1, 2)[0, 1])
    edges = [(start, start + 4096) for start in (0, len(data) // 2, len(data) - 4096)]
    assert not any(start <= position < end for start, end in edges)  # or the digest would tell, but not the row
    data[position] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("path", ["x_t", "x0"])
def test_the_pair_is_named_and_the_others_stay_readable(tmp_path, build, path):
    build.cache(tmp_path, pairs=(4,), latent=(4, 32, 32))
    damage_a_chunk(shard_of(tmp_path), path, 2, behind=5000)
    shard = shard_of(tmp_path)
    assert len(shard.read(path, np.array([0, 3, 1, 7]))) == 4
    for rows in (None, np.array([6, 2])):
        with pytest.raises(CacheCorrupt) as caught:
            shard.read(path, rows)
        message = str(caught.value)
        assert f"Array {path} of shard s0" in message
        assert "(pair pair-0-1 ä)" in message
        assert "checksum" in message.lower()


def test_every_pair_of_a_damaged_image_is_named(tmp_path, build):
    """The third image of a group of three is in two of its four pairs."""
    build.cache(tmp_path, pairs=(5,), latent=(4, 32, 32), grouped=True)
    damage_a_chunk(shard_of(tmp_path), "target", 2, behind=3000)
    with pytest.raises(CacheCorrupt, match=r"\(pair pair-0-1 ä, pair pair-0-2 ä\)"):
        shard_of(tmp_path).read("target")
    assert len(shard_of(tmp_path).read("target", np.array([0, 1, 3, 4]))) == 4


def test_a_damaged_prompt_is_named_and_the_others_stay_readable(tmp_path, build):
    manifest = build.cache(tmp_path, pairs=(1,))
    texts = build.texts(manifest, 5)
    texts.arrays["embedding"] = np.random.default_rng(0).standard_normal((4, 77, 128)).astype(np.float16)
    assert CacheWriter.open(str(tmp_path), manifest).write_texts("wide", texts) is not None
    damage_a_chunk(open_cache(str(tmp_path)).texts.need("wide"), "embedding", 2, behind=6000)
    shard = open_cache(str(tmp_path)).texts.need("wide")
    assert np.array_equal(shard.read_stored("embedding", np.array([3, 0, 1])), texts.arrays["embedding"][[3, 0, 1]])
    for rows in (None, np.array([0, 2])):
        with pytest.raises(CacheCorrupt, match=r"(?s)Array embedding of text shard wide.*\(prompt 2\).*checksum"):
            shard.read_stored("embedding", rows)


@pytest.mark.parametrize("path", ["x_t", "x0", "pair/label", "pair/id", "image/group", "texts/text", "texts/embedding"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut in half"])
def test_a_file_that_is_lost_after_the_first_read_is_no_zeros(whole, tmp_path, path, damage):
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    cache = open_cache(str(folder))
    shard, array = owner(cache, path)
    last = len(shard.read_stored(array)) - 1
    (root, _), chunk = chunks_of(cache, path)
    DAMAGES[damage](root / chunk, root / chunk)
    for rows in (None, np.array([last])):
        with pytest.raises(CacheCorrupt, match=f"A{name_of(path)}"):
            shard.read_stored(array, rows)


def test_a_text_shard_that_is_lost_after_the_cache_was_opened_is_named(whole, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    shards = [shard_of(folder) for _ in range(3)]
    images, places = np.arange(6), shards[0].read("group/prompt")
    assert (places[:, 0] == 1).all()
    assert not shards[0].dropped().all()
    Condition.of(shards[1], images)
    shutil.rmtree(folder / "texts" / "t0")
    for shard in shards[1:]:  # one that has read them before, and one that has not
        with pytest.raises(CacheCorrupt, match="of text shard t0"):
            Condition.of(shard, images)
    with pytest.raises(CacheCorrupt, match="of text shard t0"):
        shards[2].prompts()
    assert len(Condition.empty(shards[2], images)["embedding"]) == 6


def test_a_text_shard_whose_commit_is_gone_is_told_before_training(whole, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    (folder / "text-commits" / "t0.json").unlink()
    shard = shard_of(folder)
    with pytest.raises(CacheIncomplete, match=r"(?s)Text shard t0 is not there.*t0\.json.*inpo precompute") as caught:
        shard.read("group/prompt")
    assert shard_of(folder, "s1").prompts()[0].startswith("prompt 1")
    assert "no commit" in str(caught.value)


@settings(max_examples=20, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_anywhere_is_detected(whole, tmp_path, data):
    files = sorted(str(file.relative_to(whole)) for file in whole.rglob("*") if file.is_file() and file.stat().st_size)
    file = whole / data.draw(st.sampled_from(files))
    before = file.read_bytes()
    position = data.draw(st.integers(0, len(before) - 1))
    after = bytearray(before)
    after[position] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(after)
    try:
        _read_all(open_cache(str(whole)))
        # A flipped bit in white space leaves a commit's meaning, and so its numbers, as they were.
        assert file.parent.name in ("commits", "text-commits")
        assert json.loads(bytes(after)) == json.loads(before)
    except (CacheCorrupt, CacheSchemaError):
        pass
    finally:
        file.write_bytes(before)


def _read_all(cache: Cache) -> None:
    for shard in cache:
        shard.check_groups()
        for path in shard.stored & set(PATHS):
            shard.read(path)
    for texts in cache.texts:
        texts.check_groups()
        for path in texts.specs:
            texts.read_stored(path)


def test_a_lost_folder_and_a_lost_manifest(whole, tmp_path, build):
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "shards/s0")
    assert "no such file" in (found(open_cache(str(folder)), "pair/label") or "")
    (folder / "manifest.json").unlink()
    with pytest.raises(CacheMissing, match=r"(?s)lost its manifest.*manifest\.json.*2 commits.*restore it from a copy"):
        open_cache(str(folder))
    with pytest.raises(CacheCorrupt, match="committed shards but no manifest"):
        CacheWriter.open(str(folder), build.manifest())


def test_no_cache_here(tmp_path):
    for location in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CacheMissing, match="There is no cache here"):
            open_cache(str(location))
