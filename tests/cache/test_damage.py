"""Every kind of damage to every file of a cache is found before a number is handed out, and is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from inpo.common.cache import ARRAYS, Cache, CacheWriter, Shard, open_cache
from inpo.common.errors import CacheCorrupt, CacheError, CacheMissing, CacheSchemaError
from inpo.inspection.checks import check_shard

PATHS = [spec.path for spec in ARRAYS] + [f"prompt/{name}" for name in ("embedding", "mask", "pooled")] + ["time_ids"]


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
def whole(tmp_path_factory, build) -> Path:
    """Every array there is, two shards of one size."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    build.cache(folder, pairs=(3, 3), **build.everything)
    return folder


def shard_of(folder: Path, name: str = "s0") -> Shard:
    return open_cache(str(folder)).shards[name]


def found(folder: Path, path: str) -> str | None:
    """The reader's message, or None if it handed out the array."""
    try:
        shard_of(folder).read(path)
    except (CacheCorrupt, CacheSchemaError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("path", PATHS)
def test_every_damage_to_an_arrays_files_is_detected_and_named(whole, tmp_path, path):
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    shards = [Path(shard_of(folder, name).location) / path for name in ("s0", "s1")]
    (chunk,) = [file.relative_to(shards[0]) for file in (shards[0] / "c").rglob("*") if file.is_file()] or [Path("c")]
    row: dict[str, bool] = {}
    for part in (chunk, Path("zarr.json")):
        damages = dict(DAMAGES)
        if part.name == "zarr.json":
            damages |= {"edited": lambda file, other: edit(file)}
            del damages["swapped with another shard's"]  # two shards of one shape have the same metadata
        for name, damage in damages.items():
            files = [shard / part for shard in shards]
            before = [file.read_bytes() for file in files]
            damage(files[0], files[1])
            message = found(folder, path)
            words = (str(folder), f"rray {path} of shard s0", "--quarantine")
            row[f"{part.name}: {name}"] = message is not None and all(word in message for word in words)
            for file, data in zip(files, before, strict=True):
                file.write_bytes(data)
    missed = [name for name, detected in row.items() if not detected]
    print(f"{path}: {len(row) - len(missed)} of {len(row)} detected")
    assert not missed
    assert len(row) == 20
    assert found(folder, path) is None


@pytest.mark.parametrize("path", PATHS)
def test_verify_finds_every_damage_and_names_shard_and_array(whole, tmp_path, path):
    """The same damages as above, by `inpo inspect verify`, which must look at arrays that no training run reads,
    too.
    """
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    shards = [Path(shard_of(folder, name).location) / path for name in ("s0", "s1")]
    (chunk,) = [file.relative_to(shards[0]) for file in (shards[0] / "c").rglob("*") if file.is_file()] or [Path("c")]
    files = [shard / chunk for shard in shards]
    before = [file.read_bytes() for file in files]
    for name in ("middle byte flipped", "cut in half", "missing", "empty", "swapped with another shard's"):
        DAMAGES[name](files[0], files[1])
        found_bytes = [finding for finding in check_shard(shard_of(folder)).findings if finding.check == "bytes"]
        assert any(f"rray {path} of shard s0" in finding.detail for finding in found_bytes), name
        for file, data in zip(files, before, strict=True):
            file.write_bytes(data)


@pytest.mark.parametrize(("left", "right"), [("x_t", "delta"), ("delta", "eps_ref"), ("x0_t", "target")])
def test_two_arrays_of_one_shape_swapped(whole, tmp_path, left, right):
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    root = Path(shard_of(folder).location)
    chunk = "c/0/0/0/0/0/0"
    swap(root / left / chunk, root / right / chunk)
    for path in (left, right):
        assert f"array {path}" in (found(folder, path) or "")


def test_a_swap_is_found_where_both_files_begin_and_end_alike(tmp_path, build):
    """One image often opens two shards, and the chunk index at the end is equal in all arrays of one shape."""
    manifest = build.manifest(latent=(4, 32, 32), profile="lean")
    writer = CacheWriter.open(str(tmp_path), manifest)
    shards = [build.shard(manifest, 4, seed=seed) for seed in (0, 1)]
    shards[1].arrays["x0"][0] = shards[0].arrays["x0"][0]
    for index, shard in enumerate(shards):
        writer.write(f"s{index}", shard)
    files = [Path(shard_of(tmp_path, name).location) / "x0/c/0/0/0/0/0" for name in ("s0", "s1")]
    assert files[0].read_bytes()[:8192] == files[1].read_bytes()[:8192]
    swap(*files)
    assert "A file is not the committed one: array x0 of shard s0" in (found(tmp_path, "x0") or "")


def test_the_pair_is_named_and_the_others_stay_readable(tmp_path, build):
    build.cache(tmp_path, pairs=(4,), latent=(4, 32, 32))
    shard = shard_of(tmp_path)
    for path in ("x_t", "x0"):
        (chunk,) = [file for file in (Path(shard.location) / path / "c").rglob("*") if file.is_file()]
        inner = 2 * 4 * 32 * 32 * 2 + 4
        data = bytearray(chunk.read_bytes())
        steps = 2 if path == "x_t" else 1
        index = np.frombuffer(data[-4 - 16 * 4 * steps : -4], "<u8").reshape(4, steps, 2)
        assert (index[..., 1] == inner).all()
        position = int(index[1, 0, 0]) + 5000
        edges = [(start, start + 4096) for start in (0, len(data) // 2, len(data) - 4096)]
        assert not any(start <= position < end for start, end in edges)  # or the digest would tell, but not the pair
        data[position] ^= 1
        chunk.write_bytes(data)
        shard = shard_of(tmp_path)
        assert len(shard.read(path, np.array([0, 2, 3]))) == 3
        for rows in (None, np.array([3, 1])):
            with pytest.raises(CacheCorrupt) as caught:
                shard.read(path, rows)
            message = str(caught.value)
            assert f"Array {path} of shard s0" in message
            assert "(pair pair-0-1 ä)" in message
            assert "checksum" in message.lower()


@pytest.mark.parametrize("path", ["x_t", "x0", "label", "pair_id", "prompt/embedding"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut in half"])
def test_a_file_that_is_lost_after_the_first_read_is_no_zeros(whole, tmp_path, path, damage):
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    shard = shard_of(folder)
    shard.read(path)
    (chunk,) = [file for file in (Path(shard.location) / path / "c").rglob("*") if file.is_file()]
    DAMAGES[damage](chunk, chunk)
    for rows in (None, np.array([1])):
        with pytest.raises(CacheCorrupt, match=f"Array {path} of shard s0"):
            shard.read(path, rows)


@settings(
    max_examples=20, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture]
)
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
        assert file.parent.name == "commits"
        assert json.loads(bytes(after)) == json.loads(before)
    except (CacheCorrupt, CacheSchemaError):
        pass
    finally:
        file.write_bytes(before)


def _read_all(cache: Cache) -> None:
    for shard in cache:
        for path in shard.stored & set(PATHS):
            shard.read(path)


DOCUMENT_DAMAGES = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "no object": lambda text: "[]",
    "no text": lambda text: "\0" * len(text),
    "unknown field": lambda text: text.replace("{", '{"surprise": 1,', 1),
}
EDITS = {
    "manifest.json": {
        "version": ('"schema_version": 2', '"schema_version": 3'),
        "no version": ('"schema_version": 2,', ""),
        "seed": ('"seed": 0', '"seed": 1'),
        "resolution": ('"resolution": 64', '"resolution": 65'),
        "fingerprint": ("aaaaaaaa", "baaaaaaa"),
        "white space": ('"seed": 0', '"seed":  0'),
        "type": ('"seed": 0', '"seed": "zero"'),
    },
    "commits/s0.json": {
        "pairs": ('"num_pairs": 3', '"num_pairs": 2'),
        "manifest": ('"manifest": "', '"manifest": "0'),
        "attempt": ('"attempt": "', '"attempt": "0'),
        "a size": ('"x0/zarr.json": ', '"x0/zarr.json": 1'),
        "source": ("0.tar", "1.tar"),
        "skipped": ('"skipped": {}', '"skipped": {"tie": 1}'),
        "checksum": ('"checksum": "', '"checksum": "0'),
    },
}
CASES = [(file, name, None) for file in EDITS for name in DOCUMENT_DAMAGES] + [
    (file, name, change) for file, changes in EDITS.items() for name, change in changes.items()
]


@pytest.mark.parametrize(("file", "name", "change"), CASES, ids=[f"{file}: {name}" for file, name, _ in CASES])
def test_every_damage_to_a_document_is_detected_and_named(whole, tmp_path, file, name, change):
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    text = (folder / file).read_text()
    changed = DOCUMENT_DAMAGES[name](text) if change is None else text.replace(change[0], change[1], 1)
    assert changed != text
    (folder / file).write_text(changed)
    with pytest.raises((CacheCorrupt, CacheSchemaError)) as caught:
        open_cache(str(folder))
    assert str(folder / file) in str(caught.value)
    assert "to do:" in str(caught.value)

    if file.startswith("commits"):  # the rest can be opened all the same, to look at it or to repair it
        damaged: dict[str, CacheError] = {}
        cache = open_cache(str(folder), damaged=damaged)
        assert list(damaged) == ["s0"]
        assert list(cache.shards) == ["s1"]


def test_a_commit_of_another_cache_is_refused(whole, tmp_path, build):
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    build.cache(tmp_path / "other", pairs=(2,), seed=3)
    shutil.copy(tmp_path / "other/commits/s0.json", folder / "commits/foreign.json")
    with pytest.raises(CacheCorrupt, match="shard foreign was made under"):
        open_cache(str(folder))


def test_a_lost_folder_and_a_lost_manifest(whole, tmp_path, build):
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "shards/s0")
    assert "no such file" in (found(folder, "label") or "")
    (folder / "manifest.json").unlink()
    with pytest.raises(CacheMissing, match=r"(?s)lost its manifest.*manifest\.json.*2 commits.*restore it from a copy"):
        open_cache(str(folder))
    with pytest.raises(CacheCorrupt, match="committed shards but no manifest"):
        CacheWriter.open(str(folder), build.manifest())


def test_no_cache_here(tmp_path):
    for location in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CacheMissing, match="There is no cache here"):
            open_cache(str(location))
