"""`inpo data pack --group prompt`: the same pairs, each prompt's together, in memory that does not grow with them."""

import hashlib
import json
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import chain, groupby, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import inpo.data.group as group_module
from inpo.common.errors import StorageError, UsageError
from inpo.common.pairs import Pair, open_source
from inpo.data.cli import app
from inpo.data.pack import pack
from inpo.precompute.tasks import list_tasks

# What differs is another prompt, however little: a blank, a case, a Unicode form; the empty prompt is one.
PROMPTS = ["a red cube", "a red cube ", "A red cube", "", "caf\u00e9", "cafe\u0301", "\U0001f408", "x" * 5000, "d", "e"]
NUM_ROWS = 90


def run(*arguments: object) -> tuple[int, str]:
    """(exit code, stdout); errors that the front door would print are raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def prompt_of(i: int) -> str:
    """Groups of 1 to 30 rows, which lie scattered over the source."""
    return PROMPTS[0] if i % 3 == 0 else PROMPTS[min(9, i * 7 % 23 % 11)]


def pair_of(i: int, *, num_bytes: int = 40) -> Pair:
    win, lose = (i.to_bytes(4, "big") + side * num_bytes for side in (b"w", b"l"))
    return Pair(pair_id=f"id-{i}", prompt=prompt_of(i), win=win, lose=lose, label=1.0 - i / 200, row=i)


def packed(folder: Path) -> list[list[Pair]]:
    """The pairs of each tar, read with tarfile and json alone."""
    tars = []
    for path in sorted(folder.glob("*.tar")):
        pairs = []
        with tarfile.open(path) as tar:
            members = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
        for _, names in groupby(members, key=lambda name: name.split(".")[0]):
            parts = {name.split(".")[1]: members[name] for name in names}
            says = json.loads(parts["json"])
            pairs.append(
                Pair(
                    pair_id=says["id"],
                    prompt=says["prompt"],
                    label=says["label"],
                    win=parts["win"],
                    lose=parts["lose"],
                    row=int(says["id"].removeprefix("id-")),
                )
            )
        tars.append(pairs)
    return tars


def by_hash(pairs: list[Pair]) -> list[Pair]:
    return sorted(pairs, key=lambda pair: hashlib.blake2b(pair.prompt.encode(), digest_size=16).digest())


@pytest.fixture
def rows() -> Iterator[tuple[str, Pair]]:
    return (("shard", pair_of(i)) for i in range(NUM_ROWS))


@pytest.mark.parametrize("pairs_per_tar", [1, 2, 7, 30, 31, 256])
@pytest.mark.parametrize(("keys_per_run", "max_runs"), [(1 << 18, 64), (4, 3), (1, 2), (NUM_ROWS, 1)])
def test_the_same_pairs_each_prompts_together(
    rows: Iterator[tuple[str, Pair]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pairs_per_tar: int,
    keys_per_run: int,
    max_runs: int,
) -> None:
    monkeypatch.setattr(group_module, "KEYS_PER_RUN", keys_per_run)
    monkeypatch.setattr(group_module, "MAX_RUNS", max_runs)
    report = pack(rows, output=tmp_path / "out", pairs_per_tar=pairs_per_tar, by_prompt=True)
    tars = packed(tmp_path / "out")
    assert list(chain(*tars)) == by_hash([pair_of(i) for i in range(NUM_ROWS)])
    assert (report.num_pairs, report.num_tars) == (NUM_ROWS, len(tars))
    for prompt in {prompt_of(i) for i in range(NUM_ROWS)}:
        size = sum(prompt_of(i) == prompt for i in range(NUM_ROWS))
        assert sum(any(pair.prompt == prompt for pair in tar) for tar in tars) == -(-size // pairs_per_tar)
    # A tar is closed early only where the next prompt's pairs do not fit in.
    for tar, following in pairwise(tars):
        first = [pair for pair in chain(*tars) if pair.prompt == following[0].prompt]
        assert len(tar) <= pairs_per_tar
        assert len(tar) == pairs_per_tar or len(tar) + len(first) > pairs_per_tar


def test_the_order_of_groups_does_not_hang_on_the_sources_order(
    tmp_path: Path, pick_row: Callable[..., dict[str, object]], write_parquet: Callable[..., Path]
) -> None:
    rows = [pick_row(i, caption=prompt_of(i)) for i in range(24)]
    (tmp_path / "two").mkdir()
    write_parquet(tmp_path / "one.parquet", rows)
    write_parquet(tmp_path / "two" / "a.parquet", rows[:5:-1])
    write_parquet(tmp_path / "two" / "b.parquet", rows[5::-1])
    found = {}
    for name in ("one.parquet", "two"):
        assert run("pack", tmp_path / name, tmp_path / f"{name}-out", "--group", "prompt")[0] == 0
        (shard,) = open_source(str(tmp_path / f"{name}-out")).shards
        items = [item for item in shard.rows(0, shard.num_rows) if isinstance(item, Pair)]
        found[name] = [
            (prompt, sorted((i.pair_id, i.win, i.lose) for i in group))
            for prompt, group in groupby(items, key=lambda item: item.prompt)
        ]
    assert found["one.parquet"] == found["two"]
    assert [prompt for prompt, _ in found["two"]] == list(
        dict.fromkeys(pair.prompt for pair in by_hash([pair_of(i) for i in range(24)]))
    )


def test_one_cache_shard_holds_a_prompt(tmp_path: Path, encoded: Callable[..., bytes]) -> None:
    """Shards are cut out of each tar; groups of 200, 150 and 100 rows would be cut in larger tars."""
    (tmp_path / "a.png").write_bytes(encoded(0))
    sizes = {"p": 200, "q": 150, "r": 100, "s": 300}
    prompts = [prompt for i in range(300) for prompt, size in sizes.items() if i < size]
    lines = [{"win": "a.png", "lose": "a.png", "prompt": p, "id": str(i)} for i, p in enumerate(prompts)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    run("pack", tmp_path / "pairs.jsonl", tmp_path / "out", "--group", "prompt")
    tasks, _ = list_tasks(open_source(str(tmp_path / "out")))
    in_task = [{item.prompt for item in t.input_shard.rows(t.start, t.stop) if isinstance(item, Pair)} for t in tasks]
    assert {p: sum(p in each for each in in_task) for p in sizes} == {"p": 1, "q": 1, "r": 1, "s": 2}
    with pytest.raises(UsageError, match=r"(?s)several cache shards.*at most 256 with --group prompt"):
        run("pack", tmp_path / "pairs.jsonl", tmp_path / "more", "--group", "prompt", "--pairs-per-tar", 257)
    assert not (tmp_path / "more").exists()


def test_rows_without_a_pair_are_counted_and_listed_as_ever(
    tmp_path: Path, pick_row: Callable[..., dict[str, object]], write_parquet: Callable[..., Path]
) -> None:
    rows = [pick_row(i, caption=prompt_of(i)) for i in range(10)]
    rows[2] |= {"label_0": 0.5, "label_1": 0.5}
    rows[4] |= {"jpg_0": None}
    rows[6] |= {"caption": None}
    rows[9] |= {"ranking_id": 1001}
    (tmp_path / "in").mkdir()
    write_parquet(tmp_path / "in" / "a.parquet", rows)
    (tmp_path / "in" / "b.parquet").write_bytes(b"damaged")
    printed = {}
    for group in ("pair", "prompt"):
        code, stdout = run("pack", tmp_path / "in", tmp_path / group, "--group", group)
        assert code == 1  # for the damaged file
        printed[group] = stdout[stdout.index("┏") :]  # below the title, which has the folder's name
    assert printed["pair"] == printed["prompt"]
    assert "duplicate_id" in printed["prompt"]
    listed = (tmp_path / "prompt" / "skipped.jsonl").read_bytes()
    assert listed == (tmp_path / "pair" / "skipped.jsonl").read_bytes()
    assert len(listed.splitlines()) == 4
    assert sorted(path.name for path in (tmp_path / "prompt").iterdir()) == ["pairs-000000.tar", "skipped.jsonl"]


def peak_bytes(num_rows: int, num_bytes: int, folder: Path) -> int:
    """The most that Python held while so many pairs were grouped, beyond what it held before."""
    tracemalloc.start()
    try:
        pairs = (pair_of(i, num_bytes=num_bytes) for i in range(num_rows))
        for _, group in group_module.group_by_prompt(pairs, folder=folder, most=16):
            for _pair in group:
                pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_grows_neither_with_the_bytes_nor_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = 2 * 50_000
    assert peak_bytes(400, pair // 2, tmp_path) < 8 * pair  # of 400 pairs
    monkeypatch.setattr(group_module, "KEYS_PER_RUN", 100)
    monkeypatch.setattr(group_module, "MAX_RUNS", 4)
    few, many = (peak_bytes(num_rows, 1, tmp_path) for num_rows in (500, 5_000))
    assert many < few + 4_500 * 18  # bytes, half of what the further keys alone have


def test_pairs_come_back_as_they_were(tmp_path: Path) -> None:
    told = {"pair_id": "a", "prompt": "p", "win": b"w", "lose": b"l", "label": 0.75, "row": 3}
    pairs = [
        Pair(**told),
        Pair(**told | {"list": "l", "scores": (2.5, -1.0), "seeds": (7, 2**62), "noise": (b"1", b"22")}),
    ]
    ((_, found),) = [
        (size, list(group)) for size, group in group_module.group_by_prompt(pairs, folder=tmp_path, most=9)
    ]
    assert found == pairs  # a list is no tuple


@pytest.mark.parametrize("phase", ["reading", "writing"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError(28, "No space left on device")])
def test_what_ends_early_leaves_nothing(tmp_path: Path, phase: str, error: BaseException) -> None:
    seen: list[list[str]] = []

    def stop_at(count: int) -> None:
        seen.append(sorted(path.name for path in tmp_path.glob(".out.partial-*/*")))
        if len(seen) == count:
            raise error

    def rows() -> Iterator[tuple[str, Pair]]:
        for i in range(NUM_ROWS):
            yield "shard", pair_of(i)
            if phase == "reading":
                stop_at(50)

    def on_written() -> None:
        if phase == "writing":
            stop_at(50)

    with pytest.raises((KeyboardInterrupt, SystemExit, StorageError)):
        pack(rows(), output=tmp_path / "out", pairs_per_tar=10, by_prompt=True, on_written=on_written)
    assert list(tmp_path.iterdir()) == []
    # The temporary files have no name, so a process that is killed leaves none either.
    assert len(seen) == 50
    assert {name for names in seen for name in names if not name.endswith(".tar")} == {"skipped.jsonl"}


def test_a_disk_that_holds_the_pairs_only_once_is_refused_while_reading(
    rows: Iterator[tuple[str, Pair]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total, written = sum(len(pair_of(i).win) + len(pair_of(i).lose) for i in range(NUM_ROWS)), []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=total * 3 // 2))
    with pytest.raises(StorageError, match=r"(?s)disk is too small.*each is there twice.*kB free"):
        pack(rows, output=tmp_path / "out", pairs_per_tar=10, by_prompt=True, on_written=lambda: written.append(1))
    assert not written
    assert next(rows, None) is not None
    assert list(tmp_path.iterdir()) == []
