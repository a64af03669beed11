"""One cache, tensor for tensor, whoever makes it: two runs at once, two processes of one run, an object store."""

import re
import shutil
import signal
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.engines.runs import NUM_SHARDS, Tensors, World, assert_same, attempts, tensors, until
from tests.launching import Zygote, ranks


def test_two_independent_runs_at_once(zygote: Zygote, world: World, uninterrupted: Tensors, tmp_path: Path) -> None:
    """Both end well, and little is done twice: a run that notices the other goes another way."""
    cache = tmp_path / "cache"
    runs = [zygote.start(world.arguments(cache)) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0], runs[0].text() + runs[1].text()
    assert_same(tensors(cache), uninterrupted)
    assert len(attempts(cache)) == NUM_SHARDS


def test_object_store(
    zygote: Zygote, world: World, uninterrupted: Tensors, s3: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One shard, then one more by a second run, which makes nothing twice."""
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    cache = "s3://bucket/cache"
    zygote.run(world.arguments(cache, "--limit", "4"), s3)
    before = attempts(cache)
    assert len(before) == 1
    zygote.run(world.arguments(cache, "--limit", "8"), s3)
    assert before.items() < attempts(cache).items()
    assert len(attempts(cache)) == 2
    found = tensors(cache)
    assert_same(found, {name: uninterrupted[name] for name in found})


def test_two_processes_of_one_run(zygote: Zygote, world: World, uninterrupted: Tensors, tmp_path: Path) -> None:
    """A static split, a shard in one hand only, and one summary of both, by rank 0, when both are done."""
    cache = tmp_path / "cache"
    both = [zygote.start(world.arguments(cache, "--decode-workers", "1"), environment) for environment in ranks(2)]
    assert [rank.wait() for rank in both] == [0, 0], both[0].text() + both[1].text()
    assert_same(tensors(cache), uninterrupted)
    assert len(list((cache / "shards").glob("*/*"))) == NUM_SHARDS, "no shard was made twice"
    assert f"committed: {NUM_SHARDS} of {NUM_SHARDS} shards" in both[0].text()
    assert re.search(r"^time: network and VAE \d+%.*, over 2 processes$", both[0].text(), re.MULTILINE)
    assert "committed:" not in both[1].text()


def test_processes_that_found_different_pairs_make_nothing(zygote: Zygote, world: World, tmp_path: Path) -> None:
    """A file came between the two looks: each would leave shards to the other that it does not know of."""
    folders = [tmp_path / "before", tmp_path / "after"]
    for folder in folders:
        shutil.copytree(world.pairs, folder)
    (folders[0] / "0000.tar").unlink()
    cache = tmp_path / "cache"
    both = [
        zygote.start(World(model=world.model, pairs=folder).arguments(cache), environment)
        for folder, environment in zip(folders, ranks(2), strict=True)
    ]
    assert [rank.wait() for rank in both] == [1, 1], both[0].text() + both[1].text()
    for rank in both:
        for words in ("have found different pairs", "process 0: 11 shards of 44 rows; process 1: 12 shards of 48 rows"):
            assert words in rank.text()
        assert "Traceback" not in rank.text()
    assert not (cache / "commits").exists()


def test_what_one_of_two_processes_could_not_read_is_told_by_the_first(
    zygote: Zygote, world: World, tmp_path: Path
) -> None:
    """Its footer and its prompts are whole, its images are not: that is found by whose turn it is."""
    pairs, cache = tmp_path / "pairs", tmp_path / "cache"
    pairs.mkdir()
    with tarfile.open(world.pairs / "0000.tar") as tar:
        images = [tar.extractfile(f"0000-000.{side}.png").read() for side in ("win", "lose")]  # type: ignore[union-attr]
    for name in ("a", "b"):
        table = pa.table({"win": images[:1], "lose": images[1:], "prompt": ["a cat"]})
        pq.write_table(table, pairs / f"{name}.parquet", use_dictionary=False, compression="none")
    start = pq.ParquetFile(pairs / "b.parquet").metadata.row_group(0).column(0).data_page_offset
    data = bytearray((pairs / "b.parquet").read_bytes())
    data[start : start + 8] = b"\xff" * 8
    (pairs / "b.parquet").write_bytes(data)
    arguments = World(model=world.model, pairs=pairs).arguments(cache)
    both = [zygote.start(arguments, environment) for environment in ranks(2)]
    assert [rank.wait() for rank in both] == [1, 1], both[0].text() + both[1].text()
    for words in ("cannot be read", "b.parquet", "committed: 1 of 2 shards, 1 pairs", "input shards left out: 1"):
        assert words in (cache / "log.txt").read_text()
    assert "committed:" not in both[1].text()


def test_when_one_of_two_processes_dies_the_other_says_so_and_keeps_its_shards(
    zygote: Zygote, world: World, uninterrupted: Tensors, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    both = [zygote.start(world.arguments(cache), environment) for environment in ranks(2)]
    until(lambda: (cache / "commits").is_dir() and attempts(cache))
    both[1].kill()
    assert both[1].wait() == -signal.SIGKILL
    assert both[0].wait() == 1
    assert "Another process of this run has ended" in both[0].text()
    assert "Traceback" not in both[0].text()
    before = attempts(cache)
    assert len(before) >= NUM_SHARDS // 2
    zygote.run(world.arguments(cache))
    assert before.items() <= attempts(cache).items()
    assert_same(tensors(cache), uninterrupted)


def test_sigterm_ends_in_order(zygote: Zygote, world: World, uninterrupted: Tensors, tmp_path: Path) -> None:
    """Exit code 1, one sentence, no half-written attempt; what is committed can be read, and the rest is made later."""
    cache = tmp_path / "cache"
    run = zygote.start(world.arguments(cache, "--decode-workers", "1"))
    until(lambda: (cache / "commits").is_dir() and attempts(cache))
    run.terminate()
    assert run.wait() == 1
    assert "stopped: committed shards stay" in run.text()
    assert "run the same command again" in run.text()
    assert "Traceback" not in run.text()
    before = attempts(cache)
    assert tensors(cache)
    assert len(before) < NUM_SHARDS
    assert {path.name for path in (cache / "shards").glob("*/*")} == set(before.values())
    zygote.run(world.arguments(cache))
    assert before.items() <= attempts(cache).items()
    assert_same(tensors(cache), uninterrupted)
