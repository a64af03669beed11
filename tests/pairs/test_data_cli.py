"""`inpo data pack` and `inpo data check`, read back with tarfile and json alone."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image
from typer.testing import CliRunner

from inpo.common.errors import DataError, StorageError, UsageError
from inpo.common.pairs import Pair, open_source
from inpo.data.cli import app

PickRow = Callable[..., dict[str, object]]
WriteParquet = Callable[..., Path]
REPOSITORY = Path(__file__).parents[2]


def run(*arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr); errors that the front door would print are raised. `check` decodes here."""
    here = ["--decode-workers", "0"] if arguments[0] == "check" and "--decode-workers" not in arguments else []
    result = CliRunner().invoke(app, [*map(str, arguments), *here])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def pairs(location: Path | str) -> list[tuple[str, str, bytes, bytes, float]]:
    found = [item for shard in open_source(str(location)).shards for item in shard.rows(0, shard.num_rows)]
    return [(i.pair_id, i.prompt, i.win, i.lose, i.label) for i in found if isinstance(i, Pair)]


@pytest.fixture
def parquet(tmp_path: Path, pick_row: PickRow, write_parquet: WriteParquet) -> Path:
    """Ten rows: seven pairs, a tie, an unlabelled row and a repeated id."""
    rows = [pick_row(i, label_0=float(i % 2), label_1=float(1 - i % 2)) for i in range(10)]
    rows[3] |= {"label_0": 0.5, "label_1": 0.5}
    rows[5] |= {"has_label": False}
    rows[8] |= {"ranking_id": 1000}
    return write_parquet(tmp_path / "pick.parquet", rows)


def test_parquet_to_tars_gives_the_same_pairs_and_ids(tmp_path: Path, parquet: Path) -> None:
    code, _, _ = run("pack", parquet, tmp_path / "out", "--pairs-per-tar", 3)
    assert code == 0
    expected = [pair for row, pair in zip([0, 1, 2, 4, 6, 7, 8, 9], pairs(parquet), strict=True) if row != 8]
    assert len(expected) == 7
    assert pairs(tmp_path / "out") == expected
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["pairs-000000.tar", "pairs-000001.tar", "pairs-000002.tar", "skipped.jsonl"]
    # Packing what was packed changes nothing at all.
    run("pack", tmp_path / "out", tmp_path / "again", "--pairs-per-tar", 3)
    for name in names[:3]:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_tars_read_by_tarfile_and_by_webdataset(tmp_path: Path, parquet: Path) -> None:
    run("pack", parquet, tmp_path / "out", "--pairs-per-tar", 4)
    members: dict[str, bytes] = {}
    for path in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                stream = tar.extractfile(info)
                assert stream is not None
                members[info.name] = stream.read()
    assert sorted(members) == [f"{i:09d}.{suffix}" for i in range(7) for suffix in ("json", "lose.png", "win.png")]
    samples = []
    for path in sorted((tmp_path / "out").glob("*.tar")):
        with path.open("rb") as stream:
            files = webdataset.tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
            samples.extend(webdataset.tariterators.group_by_keys(files))
    for i, (pair_id, prompt, win, lose, label) in enumerate(pairs(tmp_path / "out")):
        assert json.loads(members[f"{i:09d}.json"]) == {"prompt": prompt, "label": label, "id": pair_id}
        assert (members[f"{i:09d}.win.png"], members[f"{i:09d}.lose.png"]) == (win, lose)
        assert (samples[i]["win.png"], samples[i]["lose.png"]) == (win, lose)


def test_soft_labels_prompts_and_formats_survive_packing(tmp_path: Path, encoded: Callable[..., bytes]) -> None:
    formats = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "ppm": "PPM"}
    lines = []
    for i, (extension, format) in enumerate(formats.items()):
        (tmp_path / f"{i}w").write_bytes(encoded(i, format=format))
        (tmp_path / f"{i}l").write_bytes(b"not decoded while packing")
        lines.append({"win": f"{i}w", "lose": f"{i}l", "prompt": f"猫 {extension}\n", "label": 0.3, "id": f"a/{i}"})
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    run("pack", tmp_path / "pairs.jsonl", tmp_path / "out")
    assert pairs(tmp_path / "out") == pairs(tmp_path / "pairs.jsonl")
    with tarfile.open(tmp_path / "out" / "pairs-000000.tar") as tar:
        # Labels below one half swap the sides, so the real images come out as lose.
        assert sorted(n.split(".")[2] for n in tar.getnames() if ".lose." in n) == sorted(formats)


PLAIN = {"prompt": "p", "win": "a.png", "lose": "b.png"}
RANKING = {"prompt": "p", "images": ["a.png", "b.png", "c.png"], "ranks": [1, 2, 3]}


@pytest.mark.parametrize("group", ["pair", "prompt"])
@pytest.mark.parametrize(
    ("rows", "is_lists"),
    [
        ([RANKING, RANKING | {"images": ["d.png", "a.png"], "ranks": [1, 2]}], True),
        ([PLAIN, RANKING | {"id": "r"}], True),
        ([RANKING | {"images": ["a.png", "b.png"], "ranks": [2, 1]}], True),
        ([PLAIN | {"prompt_id": "7.0", "id": "x"}, PLAIN | {"prompt_id": 7, "id": "y"}], True),
        ([PLAIN | {"image_0_uid": 1, "image_1_uid": uid} for uid in ("0", "00")], False),
        ([PLAIN | {"id": i, "score_win": i, "score_lose": 2, "scores_of": f"rater {i}"} for i in (1, 3)], False),
    ],
)
def test_packed_pairs_are_of_the_same_groups_with_the_same_ids_and_scores(
    tmp_path: Path, rows: list[dict[str, object]], is_lists: bool, group: str
) -> None:
    """Everything random hangs on the id of the pair or of its group: a list's and its prompt's."""
    for name in "abcd":
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("pack", tmp_path / "pairs.jsonl", tmp_path / "out", "--group", group)[0] == 0
    (source,) = open_source(str(tmp_path / "pairs.jsonl")).shards
    (packed,) = open_source(str(tmp_path / "out")).shards
    assert list(packed.rows(0, 99)) == list(source.rows(0, 99))
    assert packed.num_rows == source.num_rows > 0
    assert packed.has_lists is source.has_lists is is_lists


def test_pack_lists_what_it_leaves_out(tmp_path: Path, parquet: Path) -> None:
    _, stdout, _ = run("pack", parquet, tmp_path / "out")
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["pair_id"], line["reason"], line["input_shard"], line["row"]) for line in listed] == [
        ("1003", "tie", "pick", 3),
        ("1005", "unlabelled", "pick", 5),
        ("1000", "duplicate_id", "pick", 8),
    ]
    assert all(reason in stdout for reason in ("tie", "unlabelled", "duplicate_id"))


def test_pack_refuses_a_folder_with_something_in_it(tmp_path: Path, parquet: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="there already"):
        run("pack", parquet, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"
    with pytest.raises(UsageError, match="local folder"):
        run("pack", parquet, "s3://bucket/out")


def test_pack_does_not_replace_the_folder_that_it_runs_in(
    tmp_path: Path, parquet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match="the folder that this runs in"):
        run("pack", parquet, ".")
    assert run("pack", parquet, "packed")[0] == 0
    assert [entry.name for entry in Path.cwd().iterdir()] == ["packed"]


def test_pack_into_an_empty_folder(tmp_path: Path, parquet: Path) -> None:
    (tmp_path / "out").mkdir()
    assert run("pack", parquet, tmp_path / "out")[0] == 0
    assert len(pairs(tmp_path / "out")) == 7


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(StorageError, match="No space left"):
        run("pack", parquet, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_killed_pack_leaves_no_output(tmp_path: Path, encoded: Callable[..., bytes]) -> None:
    """Every pair is a tar of its own that is flushed to the disk, so the kill finds the packing half done."""
    (tmp_path / "a.png").write_bytes(encoded(0))
    lines = [{"win": "a.png", "lose": "a.png", "prompt": "p", "id": str(i)} for i in range(20_000)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    script = "import sys; from inpo.data.cli import app; app(sys.argv[1:])"
    command = [sys.executable, "-c", script, "pack", tmp_path / "pairs.jsonl", tmp_path / "out", "--pairs-per-tar", "1"]
    process = subprocess.Popen(command, cwd=REPOSITORY)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".out.partial-*/pairs-000000.tar")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="No pairs found"):
        open_source(str(tmp_path / "out"))


def test_an_unreadable_shard_is_one_line_and_the_others_go_on(tmp_path: Path, parquet: Path) -> None:
    run("pack", parquet, tmp_path / "in", "--pairs-per-tar", 2)
    (tmp_path / "in" / "pairs-000001.tar").write_bytes(b"damaged")
    everything = pairs(parquet)
    for command in (["check", tmp_path / "in"], ["pack", tmp_path / "in", tmp_path / "out"]):
        code, _, stderr = run(*command)
        assert code == 1
        assert [
            line for line in stderr.splitlines() if line.startswith("warning: unreadable input shard pairs-000001:")
        ]
    kept = [pair[0] for pair in pairs(tmp_path / "out")]
    packed = [pair[0] for i, pair in enumerate(everything) if i != 6]
    assert kept == packed[:2] + packed[4:]


def test_a_parquet_page_damaged_half_way_keeps_the_rows_before_it(
    tmp_path: Path, pick_row: PickRow, write_parquet: WriteParquet
) -> None:
    path = write_parquet(tmp_path / "a.parquet", [pick_row(i) for i in range(8)], row_group_size=4)
    column = pq.ParquetFile(path).metadata.row_group(1).column(6)
    assert column.path_in_schema == "jpg_0"
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    code, stdout, _ = run("check", path, "--json")
    report = json.loads(stdout)
    assert code == 1
    assert list(report["unreadable"]) == ["a"]
    assert report["num_pairs"] == 4


def jpeg(mode: str, size: tuple[int, int]) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, "JPEG" if mode == "RGB" else "TIFF")
    return stream.getvalue()


@pytest.fixture
def bad(tmp_path: Path, pick_row: PickRow, write_parquet: WriteParquet, encoded: Callable[..., bytes]) -> Path:
    """Two files with every reason that a parquet source can have, one row each, and three good rows."""
    whole = encoded(1, size=(64, 64))
    # The header of a BMP that claims 30000 x 30000 pixels.
    bomb = b"BM" + bytes(16) + (30_000).to_bytes(4, "little") * 2 + b"\1\0\x18\0" + bytes(24)
    bomb = bomb[:14] + (40).to_bytes(4, "little") + bomb[18:]
    bomb = bomb[:10] + (54).to_bytes(4, "little") + bomb[14:]
    first = [
        pick_row(0, jpg_0=jpeg("RGB", (40, 30))),
        pick_row(1, label_0=0.5, label_1=0.5),
        pick_row(2, has_label=False),
        pick_row(3, label_0=7.0),
        pick_row(4, caption=None),
        pick_row(5, jpg_0=None),
        pick_row(6, jpg_1=b""),
        pick_row(7, jpg_1=whole[: len(whole) // 2]),
    ]
    second = [
        pick_row(8, jpg_0=b"no image"),
        pick_row(9, jpg_1=bomb),
        pick_row(10, jpg_0=jpeg("F", (4, 4))),
        pick_row(11, ranking_id=1000),
        pick_row(12, label_0=0.8, label_1=0.2),
        pick_row(13, caption=""),
    ]
    (tmp_path / "bad").mkdir()
    write_parquet(tmp_path / "bad" / "a.parquet", first)
    write_parquet(tmp_path / "bad" / "b.parquet", second)
    return tmp_path / "bad"


EXPECTED = {
    "1001": "tie",
    "1002": "unlabelled",
    "1003": "bad_label",
    "1004": "missing_prompt",
    "1005": "missing_image",
    "1006": "empty_image",
    "1007": "truncated",
    "1008": "unreadable",
    "1009": "decompression_bomb",
    "1010": "unsupported_mode",
    "1000": "duplicate_id",
}


def test_check_counts_every_reason_and_lists_every_pair(tmp_path: Path, bad: Path) -> None:
    code, stdout, _ = run("check", bad, "--json", "--out", tmp_path / "list.jsonl", "--decode-workers", "4")
    report = json.loads(stdout)
    assert code == 0
    assert report["skipped"] == dict.fromkeys(EXPECTED.values(), 1)
    assert {k: v for k, v in report.items() if k != "skipped"} == {
        "location": str(bad),
        "kind": "parquet",
        "num_input_shards": 2,
        "num_rows": 14,
        "num_pairs": 3,
        "num_soft_labels": 1,
        "num_empty_prompts": 1,
        "smallest_side": 8,
        "largest_side": 40,
        "not_read": {"column are_different": 14, "column best_image_uid": 14, "column user_id": 14},
        "unreadable": {},
        "no_pair": [],
    }
    listed = [json.loads(line) for line in (tmp_path / "list.jsonl").read_text().splitlines()]
    assert {line["pair_id"]: line["reason"] for line in listed} == EXPECTED
    # The duplicate is in the other file, with its place.
    assert [(line["input_shard"], line["row"]) for line in listed if line["reason"] == "duplicate_id"] == [("b", 3)]
    assert all(line["detail"] for line in listed)


def test_check_prints_a_table_with_the_same_counts(bad: Path) -> None:
    code, stdout, _ = run("check", bad)
    assert code == 0
    for reason in EXPECTED.values():
        (line,) = [line for line in stdout.splitlines() if f"skipped: {reason} " in line]
        assert "1" in line


def test_a_source_without_a_pair_is_a_failure(tmp_path: Path, pick_row: PickRow, write_parquet: WriteParquet) -> None:
    path = write_parquet(tmp_path / "a.parquet", [pick_row(0, has_label=False), pick_row(1, caption=None)])
    code, stdout, stderr = run("check", path, "--json")
    assert code == 1
    assert json.loads(stdout)["num_pairs"] == 0
    assert re.search(r"1 x unlabelled: .*for instance 1000: has_label is false\n +1 x missing_prompt: .*1001", stderr)
    assert "fields found: are_different, best_image_uid, caption, " in stderr
    assert "--columns" not in stderr, "no column is missing"
    before = sorted(tmp_path.iterdir())
    with pytest.raises(
        DataError, match=r"(?s)nothing to pack.*1 x unlabelled: .*1 x missing_prompt: .*fields found: are_diff"
    ):
        run("pack", path, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_not_read_is_in_both_tables(tmp_path: Path, parquet: Path) -> None:
    run("pack", parquet, tmp_path / "tars", "--pairs-per-tar", 3)
    (tmp_path / "tars" / "README.md").write_text("about")
    (tmp_path / "tars" / "other.jsonl").write_text("{}")
    (tmp_path / "tars" / "raw").mkdir()
    code, stdout, _ = run("check", tmp_path / "tars", "--json")
    assert code == 0
    expected = {"file *.jsonl": 1, "file *.md": 1, "folder raw": 1}  # pack's own list is none of them
    assert json.loads(stdout)["not_read"] == expected
    for command in (["check", tmp_path / "tars"], ["pack", tmp_path / "tars", tmp_path / "again"]):
        _, stdout, _ = run(*command)
        table = " ".join(re.sub(r"[^\w*.() ]", " ", stdout).split())
        for name in expected:
            assert name in table
        assert "not read 3" in table


def test_check_says_where_its_list_cannot_be_written(tmp_path: Path, bad: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match=r"(?s)write the list.*/file\n.*where a folder is needed"):
        run("check", bad, "--out", tmp_path / "file" / "bad.jsonl")
    assert (tmp_path / "file").read_text() == "mine"


def test_check_replaces_its_own_list_and_no_other_file(
    tmp_path: Path, bad: Path, encoded: Callable[..., bytes]
) -> None:
    own, image, empty = tmp_path / "own.jsonl", tmp_path / "a.png", tmp_path / "empty.jsonl"
    image.write_bytes(encoded(0))
    empty.touch()
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"win": "a.png", "lose": "a.png", "prompt": "p", "label": 0.5}) + "\n")
    for out in (pairs, image, next(bad.glob("*.parquet"))):
        before = out.read_bytes()
        for source in (bad, tmp_path / "nothing"):  # before anything is read
            with pytest.raises(UsageError, match="there already, and is no list"):
                run("check", source, "--out", out)
        assert out.read_bytes() == before
    for out in (own, own, empty):
        run("check", pairs, "--out", out)
        assert [json.loads(line)["reason"] for line in out.read_text().splitlines()] == ["tie"]


def test_pack_says_where_its_folder_cannot_be_made(tmp_path: Path, parquet: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match=r"(?s)write the tars.*/file\n.*where a folder is needed"):
        run("pack", parquet, tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "mine"


def test_check_refuses_what_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no source of pairs"):
        run("check", tmp_path)
