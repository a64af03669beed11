"""Sizes that are not square, lists, and buckets: what reaches the cache, and where."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import inpo.precompute.run as run_module
import inpo.precompute.tasks as tasks_module
from inpo.common.cache import Cache, open_cache
from inpo.common.cache.buckets import open_caches
from inpo.common.cache.labels import read_shard_labels
from inpo.common.cache.store import CacheStore
from inpo.common.errors import CacheMismatch, CacheMissing, DataError, StorageError, UsageError
from inpo.common.pairs import open_source
from inpo.evaluation.relabel import relabel_cache
from inpo.inspection.verify import verify
from inpo.precompute.buckets import bucket_sizes
from inpo.train.configuration import resolve_run
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
    pipelines: Callable, shapes: Path, run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(str(shapes), pipelines("sdxl"), tmp_path / "cache", buckets="3") == 0
    assert json.loads((tmp_path / "cache" / "buckets.json").read_text()) == {"buckets": ["24x44", "32x32", "44x24"]}
    found = {cache.manifest.resolution: cache for cache in open_caches(str(tmp_path / "cache"))}
    assert list(found) == [(32, 32), (44, 24)]
    ids = {size: [str(each) for shard in cache for each in shard.read("pair/id")] for size, cache in found.items()}
    assert ids == {(32, 32): ["0", "3"], (44, 24): ["1"]}
    skipped = [commit.skipped for cache in found.values() for commit in cache.commits.values()]
    assert skipped == [{"mixed_sizes": 1, "missing_image": 1}, {}]
    # Row 4 of the file is the fourth and last of its bucket's.
    assert {size: cache.commits["pairs-00000000"].source.rows for size, cache in found.items()} == {
        (32, 32): (0, 4),
        (44, 24): (0, 1),
    }
    assert [verify(cache.location).findings for cache in found.values()] == [[], []]
    (shard,) = found[44, 24]
    assert shard.read("x0").shape == (2, *found[44, 24].manifest.latent_shape)
    assert shard.read("image/time_ids").tolist() == [[64, 32, 2, 0, 44, 24]] * 2
    prompts = {text for texts in found[44, 24].texts for text in texts.text}
    assert prompts == {"", "p1"}
    with pytest.raises(CacheMismatch, match=r"(?s)sorted by other buckets.*24x44, 32x32, 44x24"):
        run(str(shapes), pipelines("sdxl"), tmp_path / "cache", buckets="1")
    caches, high = str(tmp_path / "cache"), tmp_path / "cache" / "44x24"
    manifest = (high / "manifest.json").read_bytes()
    (high / "manifest.json").unlink()
    with pytest.raises(CacheMissing, match=r"(?s)lost its manifest.*44x24"):  # and is not taken for one not yet made
        open_caches(caches)
    # One whose precompute was cut short, or of which each image was bad, is named, and the others are opened.
    (high / "manifest.json").write_bytes(manifest)
    for commit in (high / "commits").iterdir():
        commit.unlink()
    named: list[str] = []
    assert [each.manifest.resolution for each in open_caches(caches, on_empty=named.append)] == [(32, 32)]
    assert named == [str(high)]
    resolve_run(None, {"model": str(pipelines("sdxl"))}, [caches], {"output": tmp_path / "run"})
    assert f"note: {high} has no committed pair and is left out" in capsys.readouterr().err
    for commit in (tmp_path / "cache" / "32x32" / "commits").iterdir():
        commit.unlink()
    with pytest.raises(CacheMissing, match=r"(?s)No bucket here has a committed pair yet.*run the same"):
        open_caches(caches)


def ids_of(folder: Path) -> dict[tuple[int, int], list[str]]:
    """{resolution: the pairs' ids, sorted} of every bucket in a folder."""
    return {
        cache.manifest.resolution: sorted(str(each) for shard in cache for each in shard.read("pair/id"))
        for cache in open_caches(str(folder))
    }


@pytest.fixture
def two_lists(shapes: Path, tmp_path: Path) -> str:
    """Two parquet files whose rows are high, square, or without images (-)."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name, kinds in (("a", "hs-shs"), ("b", "hhh")):
        rows = []
        for number, kind in enumerate(kinds):
            data = None if kind == "-" else (shapes / f"{'1' if kind == 'h' else '0'}-win.png").read_bytes()
            rows.append({"win": data, "lose": data, "prompt": f"p{number}", "id": f"{name}{number}"})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    return str(folder)


@pytest.mark.parametrize("first", ["limit", "one file"])
def test_what_comes_later_loses_no_row_of_a_bucket(
    pipelines: Callable, two_lists: str, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """A bucket's committed shard stays, so its rows must be the same with more rows beside it. With both files most
    pairs are high, with the first one alone most are square."""
    monkeypatch.setattr(tasks_module, "MAX_PAIRS_PER_SHARD", 2)
    model, cache, other = pipelines(), tmp_path / "cache", Path(two_lists) / "b.parquet"
    if first == "one file":
        other.rename(tmp_path / "b.parquet")
    assert run(two_lists, model, cache, buckets="3", limit=1 if first == "limit" else None) == 0
    if first == "one file":
        (tmp_path / "b.parquet").rename(other)
    before = ids_of(cache)
    assert run(two_lists, model, cache, buckets="3") == 0
    whole = {(32, 32): ["a1", "a3", "a5"], (44, 24): ["a0", "a4", "b0", "b1", "b2"]}
    assert before != whole
    assert ids_of(cache) == whole


@pytest.mark.parametrize("comes", ["before it is read", "for a second process", "for a second run"])
def test_an_image_that_comes_later_moves_no_row(
    pipelines: Callable, shapes: Path, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes: str
) -> None:
    """It is of another shape than most of its file: cropped for the bucket it stands in it would be another image."""
    monkeypatch.setattr(tasks_module, "MAX_PAIRS_PER_SHARD", 2)
    cache, missing = tmp_path / "cache", shapes / "gone.png"
    list_works = run_module.all_works

    def later(*arguments: Any, **options: Any) -> Any:
        works = list_works(*arguments, **options)
        missing.write_bytes(picture(1, 64, 32))
        return list_works(*arguments, **options) if comes == "for a second process" else works

    if comes != "for a second run":
        monkeypatch.setattr(run_module, "all_works", later)
    (shapes / "0-lose.png").write_bytes(picture(0, 64, 32))  # row 4's other image; row 0 has both shapes now
    assert run(str(shapes), pipelines(), cache, buckets="3") == 0
    missing.write_bytes(picture(1, 64, 32))
    if comes == "for a second run":
        for commit in (cache / "32x32" / "commits").iterdir():
            commit.unlink()  # what makes a shard anew
        assert run(str(shapes), pipelines(), cache, buckets="3") == 0
    assert ids_of(cache) == {(32, 32): ["3"], (44, 24): ["1"]}
    found = {each.manifest.resolution: each for each in open_caches(str(cache))}
    skipped = [commit.skipped for commit in found[32, 32].commits.values()]
    assert skipped == [{"mixed_sizes": 2}, {"mixed_sizes": 1}]
    assert "gone" in {text for texts in found[32, 32].texts for text in texts.text}


def test_a_damaged_list_of_rows_is_told(pipelines: Callable, two_lists: str, run: Callable, tmp_path: Path) -> None:
    assert run(two_lists, pipelines(), tmp_path / "cache", buckets="3") == 0
    kept = {file: file.read_bytes() for file in (tmp_path / "cache" / "buckets").iterdir()}
    assert len(kept) == 2
    for file, data in kept.items():
        file.write_bytes(data.replace(b"[", b"[7, ", 1))
    with pytest.raises(DataError, match=r"(?s)which bucket a row is in.*remove it"):
        run(two_lists, pipelines(), tmp_path / "cache", buckets="3")
    for file in kept:
        file.unlink()
    assert run(two_lists, pipelines(), tmp_path / "cache", buckets="3") == 0
    assert {file: file.read_bytes() for file in kept} == kept


def test_a_tie_of_two_buckets_goes_the_same_way_whatever_lies_beside_it(
    pipelines: Callable, shapes: Path, run: Callable, tmp_path: Path
) -> None:
    high, square = ((shapes / f"{number}-win.png").read_bytes() for number in (1, 0))
    folder = tmp_path / "ties"
    folder.mkdir()
    rows = [(high, high, "h"), (square, square, "s"), (high, None, "-")]
    table = [{"win": win, "lose": lose, "prompt": name, "id": name} for win, lose, name in rows]
    pq.write_table(pa.Table.from_pylist(table), folder / "a.parquet")
    assert run(str(folder), pipelines(), tmp_path / "alone", buckets="3") == 0
    pq.write_table(pa.Table.from_pylist([{**table[0], "id": "b"}]), folder / "b.parquet")
    assert run(str(folder), pipelines(), tmp_path / "both", buckets="3") == 0
    lists = [[each.read_bytes() for each in (tmp_path / name / "buckets").glob("a.*")] for name in ("alone", "both")]
    assert lists[0] == lists[1]


def test_more_prompts_than_a_document_holds_are_left_out_of_it(
    pipelines: Callable, two_lists: str, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then every bucket encodes the texts of all rows; the pairs are the same."""
    assert run(two_lists, pipelines(), tmp_path / "few", buckets="3") == 0
    monkeypatch.setattr("inpo.common.pairs.buckets._MOST_PROMPTS", 1)
    for _ in range(2):
        assert run(two_lists, pipelines(), tmp_path / "many", buckets="3") == 0
    assert ids_of(tmp_path / "many") == ids_of(tmp_path / "few")
    (document,) = (tmp_path / "many/buckets").glob("a.*")
    assert set(json.loads(document.read_text())["prompts"].values()) == {None}
    with pytest.raises(StorageError, match="too large for a cache"):
        CacheStore(str(tmp_path / "few")).put_new("buckets/huge.json", bytes(2**26 + 1))


def test_labels_of_a_bucket_come_from_the_source_of_all(
    pipelines: Callable, two_lists: str, run: Callable, tmp_path: Path
) -> None:
    """Rows of a bucket's shard are not the rows of the file with the same numbers."""

    class Height:
        name, preference_temperature = "height", 1.0

        def score(self, images: Any, prompts: Sequence[str]) -> np.ndarray:
            assert set(prompts) <= {f"p{number}" for number in range(6)}
            return np.array([float(image.height) for image in images])

    assert run(two_lists, pipelines(), tmp_path / "cache", buckets="3") == 0
    for cache in open_caches(str(tmp_path / "cache")):
        relabel_cache(cache, open_source(two_lists), Height(), set_name="height", temperature=1.0)
        found = read_label_set(cache)
        assert sorted(found) == ids_of(tmp_path / "cache")[cache.manifest.resolution]
        assert set(found.values()) == {(64.0, 64.0) if cache.manifest.resolution == (44, 24) else (40.0, 40.0)}


def read_label_set(cache: Cache) -> dict[str, tuple[float, float]]:
    sets = [read_shard_labels(cache.store, "height", shard.name) for shard in cache]
    return {pair_id: each.scores for one in sets if one for pair_id, each in one.pairs.items() if each.scores}


def test_buckets_of_a_source_that_fails(
    pipelines: Callable, two_lists: str, run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file whose rows cannot be read is left out whole and reported; if there is no other, that is the error."""
    for name in ("b", "a"):
        file = Path(two_lists) / f"{name}.parquet"
        data = bytearray(file.read_bytes())
        data[4:200] = bytes(196)  # the first pages; the footer stays
        file.write_bytes(data)
        if name == "b":
            assert run(two_lists, pipelines(), tmp_path / "cache", buckets="3") == 1
            assert ids_of(tmp_path / "cache") == {(32, 32): ["a1", "a3", "a5"], (44, 24): ["a0", "a4"]}
            assert "b.parquet" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"a\.parquet"):
        run(two_lists, pipelines(), tmp_path / "other", buckets="3")


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


def test_a_bucket_without_a_pair_is_told_and_the_others_are_made(
    pipelines: Callable, shapes: Path, run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 1 only where no bucket has a pair."""

    def cut(number: int) -> None:
        for side in ("win", "lose"):
            file, whole = shapes / f"{number}-{side}.png", io.BytesIO()
            Image.open(file).save(whole, format="JPEG")
            file.write_bytes(whole.getvalue()[:-200])  # its size can still be read

    cut(1)
    assert run(str(shapes), pipelines(), tmp_path / "cache", buckets="3") == 0
    said = capsys.readouterr().err
    assert "warning: no pair was kept, so no shard that this run made of this bucket stays committed" in said
    assert "1 x truncated" in said
    assert [each.num_pairs for each in open_caches(str(tmp_path / "cache"), on_empty=lambda _: None)] == [2]
    cut(0)
    cut(3)
    assert run(str(shapes), pipelines(), tmp_path / "none", buckets="3") == 1
