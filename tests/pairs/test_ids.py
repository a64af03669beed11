"""A pair's id is one line that lists, commands and terminals give back as it is; others are bad rows."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from inpo.common.pairs import Pair, Skipped, open_source

BAD = [
    "a\nb",
    "a\r",
    "a\x1b[31mb",
    "a\0b",
    "a\tb",
    "a\x85b",
    "a\u2028b",
    "a\u202eb",
    "\ufeffa",
    " a",
    "a ",
    "\u3000a",
    "x" * 3000,
]
GOOD = ["a b", "赤い猫 🐈", "../../etc/passwd", "-x", "#1", "[/bold]", "$(a)", "https://h/x?id=5", "x" * 1000]


def read(file: Path) -> list[Pair | Skipped]:
    (shard,) = open_source(str(file)).shards
    return list(shard.rows(0, 99))


def check(items: list[Pair | Skipped]) -> None:
    assert [getattr(item, "reason", "pair") for item in items] == ["pair"] * len(GOOD) + ["bad_metadata"] * len(BAD)
    assert [item.pair_id for item in items[: len(GOOD)]] == GOOD
    for item in items:
        assert item.pair_id.isprintable()
        assert item.pair_id == item.pair_id.strip()


def test_of_a_list(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"A")
    rows = [{"win": "a.png", "lose": "a.png", "prompt": "p", "id": each} for each in [*GOOD, *BAD]]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    check(read(tmp_path / "pairs.jsonl"))


def test_of_a_tar(tmp_path: Path, write_tar: Callable[..., Path]) -> None:
    members = []
    for i, each in enumerate([*GOOD, *BAD]):
        metadata = json.dumps({"prompt": "p", "id": each}).encode()
        members += [(f"{i:03}.json", metadata), (f"{i:03}.lose.png", b"L"), (f"{i:03}.win.png", b"W")]
    check(read(write_tar(tmp_path / "a.tar", members)))


def test_a_tars_keys_are_ids_and_no_key_moves_another(tmp_path: Path, write_tar: Callable[..., Path]) -> None:
    members = []
    for key in ("1", "2\n2", "3\x1b[2J", "4"):
        members += [(f"{key}.json", b'{"prompt": "p"}'), (f"{key}.lose.png", b"L"), (f"{key}.win.png", key.encode())]
    first, broken, coloured, last = read(write_tar(tmp_path / "a.tar", members))
    assert isinstance(first, Pair)
    assert isinstance(last, Pair)
    assert [(item.pair_id, item.win) for item in (first, last)] == [("a/1", b"1"), ("a/4", b"4")]
    assert [getattr(item, "reason", None) for item in (broken, coloured)] == ["bad_metadata"] * 2
    assert [item.pair_id for item in (broken, coloured)] == ["a/1", "a/2"]


@pytest.mark.parametrize("ids", ["ranking_id", "image uids"])
def test_of_parquet(
    tmp_path: Path, ids: str, pick_row: Callable[..., dict[str, object]], write_parquet: Callable[..., Path]
) -> None:
    if ids == "ranking_id":
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = write_parquet(tmp_path / "a.parquet", [pick_row(i) for i in range(len(GOOD + BAD))])
        table = pq.read_table(file)
        table = table.set_column(table.schema.get_field_index("ranking_id"), "ranking_id", pa.array(GOOD + BAD))
        pq.write_table(table, file)
        check(read(file))
    else:
        rows = [pick_row(0, image_0_uid="a\nb", ranking_id=None), pick_row(1, ranking_id=None)]
        bad, good = read(write_parquet(tmp_path / "a.parquet", rows))
        assert getattr(bad, "reason", None) == "bad_metadata"
        assert good.pair_id == "uid-1-0_uid-1-1"
