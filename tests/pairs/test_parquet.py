"""Pick-a-Pic v2 parquet: rows, columns, row groups, damage."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inpo.common.errors import DataError
from inpo.common.pairs import Pair, Skipped, open_source

PickRow = Callable[..., dict[str, object]]
WriteParquet = Callable[..., Path]


def read(path: Path | str) -> list[Pair | Skipped]:
    (shard,) = open_source(str(path)).shards
    items = list(shard.rows(0, shard.num_rows))
    assert [item.row for item in items] == list(range(shard.num_rows))
    return items


def test_rows_as_published(tmp_path: Path, pick_row: PickRow, write_parquet: WriteParquet) -> None:
    rows = [pick_row(0), pick_row(1, label_0=0.0, label_1=1.0), pick_row(2, caption="")]
    found = read(write_parquet(tmp_path / "a.parquet", rows))
    images = [(row["jpg_0"], row["jpg_1"]) for row in rows]
    assert found == [
        Pair(pair_id="1000", prompt="caption 0", win=images[0][0], lose=images[0][1], label=1.0, row=0),
        Pair(pair_id="1001", prompt="caption 1", win=images[1][1], lose=images[1][0], label=1.0, row=1),
        Pair(pair_id="1002", prompt="", win=images[2][0], lose=images[2][1], label=1.0, row=2),
    ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"label_0": 0.5, "label_1": 0.5}, "tie"),
        ({"has_label": False}, "unlabelled"),
        ({"label_0": None, "label_1": None}, "unlabelled"),
        ({"label_0": 1.0, "label_1": 1.0}, "bad_label"),
        ({"label_0": float("nan"), "label_1": 0.0}, "bad_label"),
        ({"label_0": 3.0, "label_1": -2.0}, "bad_label"),
        ({"caption": None}, "missing_prompt"),
        ({"jpg_0": None}, "missing_image"),
        ({"jpg_1": b""}, "empty_image"),
    ],
)
def test_a_bad_row_is_skipped_whole_with_its_reason(
    tmp_path: Path, pick_row: PickRow, write_parquet: WriteParquet, changes: dict[str, object], reason: str
) -> None:
    rows = [pick_row(0), pick_row(1, **changes), pick_row(2)]
    first, bad, last = read(write_parquet(tmp_path / "a.parquet", rows))
    assert isinstance(bad, Skipped)
    assert (bad.pair_id, bad.reason) == ("1001", reason)
    for item, row in ((first, rows[0]), (last, rows[2])):
        assert isinstance(item, Pair)
        assert (item.win, item.lose) == (row["jpg_0"], row["jpg_1"])


def test_a_caption_that_is_not_utf8_is_one_bad_row(tmp_path: Path, pick_row: PickRow) -> None:
    rows = [pick_row(0), pick_row(1)]
    table = pa.table(
        {
            "jpg_0": pa.array([row["jpg_0"] for row in rows], pa.binary()),
            "jpg_1": pa.array([row["jpg_1"] for row in rows], pa.binary()),
            "label_0": [1.0, 1.0],
            "caption": pa.array([b"fine", b"\xff\xfe"], pa.binary()).view(pa.string()),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    good, bad = read(tmp_path / "a.parquet")
    assert isinstance(good, Pair)
    assert isinstance(bad, Skipped)
    assert bad.reason == "bad_metadata"


def test_without_a_prompt_column_every_row_is_counted(
    tmp_path: Path, pick_row: PickRow, write_parquet: WriteParquet
) -> None:
    found = read(write_parquet(tmp_path / "a.parquet", [pick_row(0), pick_row(1)], drop=("caption",)))
    assert [item.reason for item in found if isinstance(item, Skipped)] == ["missing_prompt"] * 2


def test_ids_without_a_ranking_id(tmp_path: Path, pick_row: PickRow, write_parquet: WriteParquet) -> None:
    by_uid = read(write_parquet(tmp_path / "a.parquet", [pick_row(3)], drop=("ranking_id",)))
    assert [item.pair_id for item in by_uid] == ["uid-3-0_uid-3-1"]
    by_row = read(write_parquet(tmp_path / "b.parquet", [pick_row(3)], drop=("ranking_id", "image_0_uid")))
    assert [item.pair_id for item in by_row] == ["b/0"]


def test_images_as_the_datasets_library_stores_them(tmp_path: Path) -> None:
    table = pa.table(
        {
            "jpg_0": [{"bytes": b"A", "path": "a.jpg"}],
            "jpg_1": [{"bytes": b"B", "path": None}],
            "label_0": [0.0],
            "caption": ["p"],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [Pair(pair_id="a/0", prompt="p", win=b"B", lose=b"A", label=1.0, row=0)]


def test_images_by_path_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "a.png").write_bytes(b"A")
    rows = [
        {"chosen": {"bytes": None, "path": "img/a.png"}, "rejected": {"bytes": b"B", "path": "img/none.png"}},
        {"chosen": {"bytes": b"C", "path": None}, "rejected": {"bytes": None, "path": "img/none.png"}},
        {"chosen": {"bytes": None, "path": "/etc/hostname"}, "rejected": {"bytes": b"B", "path": None}},
        {"chosen": {"bytes": None, "path": None}, "rejected": {"bytes": b"B", "path": None}},
    ]
    pq.write_table(pa.Table.from_pylist([row | {"prompt": "p"} for row in rows]), tmp_path / "a.parquet")
    good, *bad = read(tmp_path / "a.parquet")
    assert good == Pair(pair_id="a/0", prompt="p", win=b"A", lose=b"B", label=1.0, row=0)
    assert [item.reason for item in bad if isinstance(item, Skipped)] == [
        "missing_image",
        "not_allowed",
        "missing_image",
    ]
    texts = {"win": ["img/a.png"], "lose": ["img/a.png"], "caption": ["p"]}
    pq.write_table(pa.table(texts), tmp_path / "b.parquet")
    (item,) = read(tmp_path / "b.parquet")
    assert isinstance(item, Pair)
    assert (item.win, item.lose) == (b"A", b"A")


def test_float_ids_of_a_column_with_a_null(tmp_path: Path, pick_row: PickRow) -> None:
    rows = [pick_row(i) for i in range(3)]
    names = ("jpg_0", "jpg_1", "label_0", "caption")
    table = {name: [row[name] for row in rows] for name in names} | {"ranking_id": [101.0, None, float("nan")]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert [item.pair_id for item in read(tmp_path / "a.parquet")] == ["101", "a/1", "a/2"]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"Chosen": [b"A"], "rejected": [b"B"]}, ["no field win or chosen", "'Chosen'"]),
        ({"images": [[b"A", b"B"]], "prompt": ["p"]}, ["rank", "found: images, prompt"]),
    ],
)
def test_a_column_that_is_not_there_is_named(
    tmp_path: Path, columns: dict[str, list[object]], words: list[str]
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no image columns") as error:
        read(tmp_path / "a.parquet")
    for word in words:
        assert word in str(error.value)


def test_a_pointer_under_a_parquets_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(DataError, match=r"(?s)cannot be read.*git-lfs pointer.*git lfs pull"):
        read(tmp_path / "a.parquet")


def test_any_range_of_rows_equals_that_part_of_all_rows(
    tmp_path: Path, pick_row: PickRow, write_parquet: WriteParquet
) -> None:
    path = write_parquet(tmp_path / "a.parquet", [pick_row(i) for i in range(50)], row_group_size=20)
    (shard,) = open_source(str(path)).shards
    everything = list(shard.rows(0, 50))
    assert [item.pair_id for item in everything] == [str(1000 + i) for i in range(50)]
    for start, stop in [(0, 1), (19, 21), (3, 18), (17, 44), (40, 99), (49, 50), (50, 60), (7, 7)]:
        assert list(shard.rows(start, stop)) == everything[start:stop]
    assert list(pickle.loads(pickle.dumps(shard)).rows(30, 33)) == everything[30:33]


def test_columns_and_row_groups_that_are_not_needed_are_not_read(
    tmp_path: Path, pick_row: PickRow, write_parquet: WriteParquet
) -> None:
    """Bytes of other columns and row groups are overwritten; the rows asked for still read the same."""
    path = write_parquet(tmp_path / "a.parquet", [pick_row(i) for i in range(12)], row_group_size=4)
    (shard,) = open_source(str(path)).shards
    expected = list(shard.rows(4, 8))
    metadata = pq.ParquetFile(path).metadata
    data = bytearray(path.read_bytes())
    for group in range(3):
        for i in range(metadata.num_columns):
            column = metadata.row_group(group).column(i)
            if group != 1 or column.path_in_schema in ("user_id", "best_image_uid", "are_different"):
                start = column.dictionary_page_offset or column.data_page_offset
                data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    told = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(told.st_atime_ns, told.st_mtime_ns))  # damaged, and not written again
    assert list(shard.rows(4, 8)) == expected
    with pytest.raises(DataError, match="This input shard cannot be read"):
        list(shard.rows(0, 4))


def test_a_parquet_file_of_something_else_is_refused_with_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x"], "image": [b"y"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no image columns") as error:
        read(tmp_path / "a.parquet")
    assert "columns text, image" in str(error.value)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_a_cut_file_is_unreadable(tmp_path: Path, pick_row: PickRow, write_parquet: WriteParquet, keep: float) -> None:
    path = write_parquet(tmp_path / "a.parquet", [pick_row(i) for i in range(8)])
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    (shard,) = open_source(str(path)).shards
    with pytest.raises(DataError, match="This input shard cannot be read"):
        _ = shard.num_rows
    with pytest.raises(DataError, match="This input shard cannot be read"):
        shard.fingerprint()


def test_fingerprint_follows_content_and_not_the_path(
    tmp_path: Path, pick_row: PickRow, write_parquet: WriteParquet
) -> None:
    def fingerprint(name: str, rows: list[dict[str, object]]) -> str:
        (shard,) = open_source(str(write_parquet(tmp_path / name, rows))).shards
        return shard.fingerprint()

    first = fingerprint("a.parquet", [pick_row(0), pick_row(1)])
    assert fingerprint("b.parquet", [pick_row(0), pick_row(1)]) == first
    assert fingerprint("c.parquet", [pick_row(0)]) != first
    assert fingerprint("d.parquet", [pick_row(0), pick_row(1, caption="caption 2")]) != first


def test_fingerprint_sees_values_that_change_their_rows(
    tmp_path: Path, pick_row: PickRow, write_parquet: WriteParquet
) -> None:
    """Size, counts, least and greatest values stay what they were."""

    def fingerprints(file: Path) -> set[str]:
        return {open_source(str(file), with_noise=noise).shards[0].fingerprint() for noise in (True, False)}

    one, other = {"label_0": 1.0, "label_1": 0.0}, {"label_0": 0.0, "label_1": 1.0}
    first = [pick_row(0, **one), pick_row(1, **other), pick_row(2)]
    turned = [pick_row(0, **other), pick_row(1, **one), pick_row(2)]
    exchanged = [pick_row(0, caption="caption 1", **one), pick_row(1, caption="caption 0", **other), pick_row(2)]
    files = [write_parquet(tmp_path / f"{n}.parquet", rows) for n, rows in enumerate((first, turned, exchanged))]
    for n, sides in enumerate((["a", "b", "c"], ["b", "a", "c"])):
        files.append(tmp_path / f"paths-{n}.parquet")
        pq.write_table(pa.table({"win": sides, "lose": ["d"] * 3, "prompt": ["p"] * 3}), files[-1])
    found = list(map(fingerprints, files))
    assert list(map(len, found)) == [1] * 5
    assert len(set().union(*found)) == 5
