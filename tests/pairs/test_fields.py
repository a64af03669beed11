"""One field has one meaning in every container: the same row as parquet, JSON lines, a JSON array, CSV and tar."""

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inpo.common.pairs import Pair, Skipped, open_source

IMAGES = {"a.png": b"A", "b.png": b"B", "c.png": b"C", "d.png": b"D"}
IMAGE_FIELDS = ("win", "lose", "chosen", "rejected", "jpg_0", "jpg_1")


def as_parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    held = [{name: IMAGES[v] if name in IMAGE_FIELDS else v for name, v in row.items()} for row in rows]
    pq.write_table(pa.Table.from_pylist(held), folder / "a.parquet")
    return folder / "a.parquet"


def as_lines(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "a.jsonl"


def as_array(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "a.json").write_text(json.dumps(rows, indent=2))
    return folder / "a.json"


def as_csv(folder: Path, rows: list[dict[str, Any]]) -> Path:
    lines = [",".join(rows[0]), *(",".join("" if v is None else str(v) for v in row.values()) for row in rows)]
    (folder / "a.csv").write_text("\n".join(lines))
    return folder / "a.csv"


def as_tar(folder: Path, rows: list[dict[str, Any]], *, members: bool = False) -> Path:
    """Fields in the JSON member, or each in a member of its own."""
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number, row in enumerate(rows):
            parts = {f"{name}.png": IMAGES[row[name]] for name in IMAGE_FIELDS if name in row}
            fields = {name: value for name, value in row.items() if name not in IMAGE_FIELDS}
            if members:
                parts |= {f"{name}.txt": f"{value}\n".encode() for name, value in fields.items() if value is not None}
            else:
                parts["json"] = json.dumps(fields).encode()
            for suffix, data in parts.items():
                info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder / "a.tar"


def as_members(folder: Path, rows: list[dict[str, Any]]) -> Path:
    return as_tar(folder, rows, members=True)


CONTAINERS = {f.__name__[3:]: f for f in (as_parquet, as_lines, as_array, as_csv, as_tar, as_members)}


def read(path: Path) -> list[Pair | Skipped]:
    (shard,) = open_source(str(path)).shards
    found = list(shard.rows(0, shard.num_rows))
    assert [item.row for item in found] == list(range(shard.num_rows))
    for start in range(len(found)):
        assert list(shard.rows(start, start + 1)) == found[start : start + 1]
        assert list(shard.rows(start, 99)) == found[start:]
    return found


@pytest.fixture(params=list(CONTAINERS))
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[list[dict[str, Any]]], Path]:
    for name, data in IMAGES.items():
        (tmp_path / name).write_bytes(data)
    return lambda rows: CONTAINERS[request.param](tmp_path, rows)


def pick(**fields: Any) -> dict[str, Any]:
    return {"jpg_0": "a.png", "jpg_1": "b.png", "caption": "p", "ranking_id": 7} | fields


@pytest.mark.parametrize("value", [False, 0, 0.0, "False", "false", "0", "0.0", "no", " FALSE "])
def test_has_label_of_any_type_says_unlabelled(write: Callable[..., Path], value: object) -> None:
    (item,) = read(write([pick(label_0=1.0, label_1=0.0, has_label=value)]))
    assert isinstance(item, Skipped)
    assert (item.pair_id, item.reason) == ("7", "unlabelled")


@pytest.mark.parametrize("value", [True, 1, 1.0, "True", "true", "1", "yes"])
def test_has_label_of_any_type_says_labelled(write: Callable[..., Path], value: object) -> None:
    (item,) = read(write([pick(label_0=1.0, label_1=0.0, has_label=value)]))
    assert item == Pair(pair_id="7", prompt="p", win=b"A", lose=b"B", label=1.0, row=0)


@pytest.mark.parametrize("labels", [(False, True), (0, 1), (0.0, 1.0), ("0", "1"), ("false", "true"), ("0.0", "1.0")])
def test_labels_of_any_type(write: Callable[..., Path], labels: tuple[object, object]) -> None:
    (item,) = read(write([pick(label_0=labels[0], label_1=labels[1])]))
    assert item == Pair(pair_id="7", prompt="p", win=b"B", lose=b"A", label=1.0, row=0)


@pytest.mark.parametrize("name", ["id", "pair_id", "ranking_id"])
@pytest.mark.parametrize("value", [101, 101.0, "101", "101.0"])
def test_an_id_is_the_same_in_any_type(write: Callable[..., Path], name: str, value: object) -> None:
    row = {"win": "a.png", "lose": "b.png", "prompt": "p", name: value}
    (item,) = read(write([row]))
    assert item == Pair(pair_id="101", prompt="p", win=b"A", lose=b"B", label=1.0, row=0)


def test_an_id_that_floats_cannot_hold_is_no_id(write: Callable[..., Path]) -> None:
    (item,) = read(write([pick(label_0=1.0, ranking_id=1e300)]))
    if isinstance(item, Skipped):  # where the container has floats
        assert item.reason == "bad_metadata"
    else:
        assert item.pair_id == "1e+300"


@pytest.mark.parametrize("prompt", ["prompt", "caption"])
@pytest.mark.parametrize("sides", [("win", "lose"), ("chosen", "rejected")])
def test_names_that_mean_the_same(write: Callable[..., Path], prompt: str, sides: tuple[str, str]) -> None:
    (item,) = read(write([{sides[0]: "c.png", sides[1]: "a.png", prompt: "a cat", "id": "x"}]))
    assert item == Pair(pair_id="x", prompt="a cat", win=b"C", lose=b"A", label=1.0, row=0)


@pytest.mark.parametrize(("caption", "reason"), [("p", "pair"), ("q", "bad_metadata")])
def test_prompt_and_caption_must_agree(write: Callable[..., Path], caption: str, reason: str) -> None:
    row = {"win": "a.png", "lose": "b.png", "prompt": "p", "caption": caption, "id": "x"}
    (item,) = read(write([row]))
    # Two members of a tar for one role are a fault of their own.
    assert getattr(item, "reason", "pair") == reason or "more than one member" in getattr(item, "detail", "")


RANKINGS: list[tuple[dict[str, Any], dict[tuple[int, int], str]]] = [
    ({"rank": [2, 1, 3]}, {(0, 1): "BA", (0, 2): "AC", (1, 2): "BC"}),
    ({"ranks": [0, 1, 1]}, {(0, 1): "AB", (0, 2): "AC", (1, 2): "tie"}),
    ({"scores": [0.1, -3.5, 0.7]}, {(0, 1): "AB", (0, 2): "CA", (1, 2): "CB"}),
    ({"score": ["1", "2", "3"]}, {(0, 1): "BA", (0, 2): "CA", (1, 2): "CB"}),
    ({"human_preference": [0, 1, 0]}, {(0, 1): "BA", (0, 2): "tie", (1, 2): "BC"}),
    ({"rank": [1, 2, None]}, {(0, 1): "AB", (0, 2): "unlabelled", (1, 2): "unlabelled"}),
    ({"rank": [1, 2, 3], "scores": [9, 5, 5]}, {(0, 1): "AB", (0, 2): "AC", (1, 2): "BC"}),
    ({"rank": [1, 2, 3], "scores": [1, 2, 0]}, {(0, 1): "bad_label", (0, 2): "AC", (1, 2): "BC"}),
    ({"rank": [1, 2]}, {(0, 1): "bad_metadata"}),
    ({}, {(0, 1): "bad_metadata"}),
]


def said(item: Pair | Skipped) -> str:
    return item.reason if isinstance(item, Skipped) else (item.win + item.lose).decode()


@pytest.mark.parametrize(("order", "expected"), RANKINGS)
@pytest.mark.parametrize("container", [as_lines, as_array, as_parquet])
@pytest.mark.parametrize("name", ["images", "image_path"])
def test_every_two_images_of_a_ranking_are_compared(
    tmp_path: Path,
    order: dict[str, Any],
    expected: dict[tuple[int, int], str],
    container: Callable[..., Path],
    name: str,
) -> None:
    for file, data in IMAGES.items():
        (tmp_path / file).write_bytes(data)
    ranking = {"id": "r", "prompt": "p", name: ["a.png", "b.png", "c.png"]} | order
    if container is as_parquet:
        if not order:
            pytest.skip("a file without such a column is refused whole")
        if name == "images":
            ranking[name] = [{"bytes": IMAGES[file], "path": None} for file in ranking[name]]
        if "scores" in order and "rank" not in order:
            ranking[name] = [IMAGES[file] for file in ("a.png", "b.png", "c.png")]
    found = read(container(tmp_path, [ranking | {"id": "before"}, ranking]))
    assert len(found) == 2 * len(expected)
    for prefix, part in (("before", found[: len(expected)]), ("r", found[len(expected) :])):
        assert {item.pair_id: said(item) for item in part} == {
            f"{prefix}.{i}-{j}": word for (i, j), word in expected.items()
        }
        assert all(item.label == 1.0 for item in part if isinstance(item, Pair))


def test_ids_of_a_ranking_without_one_stay_when_it_grows(tmp_path: Path) -> None:
    for file, data in IMAGES.items():
        (tmp_path / file).write_bytes(data)
    three = {"prompt": "p", "images": ["a.png", "b.png", "c.png"], "ranks": [1, 2, 3]}
    four = {"prompt": "p", "images": ["d.png", "a.png", "b.png", "c.png"], "ranks": [4, 3, 1, 2]}
    first, more = ({item.pair_id for item in read(as_lines(tmp_path, [row]))} for row in (three, four))
    assert (len(first), len(more)) == (3, 6)
    assert first < more


@pytest.mark.parametrize("count", [0, 1, 101])
def test_a_ranking_of_too_few_or_too_many_is_one_bad_row(tmp_path: Path, count: int) -> None:
    ranking = {"prompt": "p", "images": ["a.png"] * count, "ranks": list(range(count))}
    (item,) = read(as_lines(tmp_path, [ranking]))
    assert isinstance(item, Skipped)
    assert item.reason == "bad_metadata"


def test_images_of_a_ranking_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from inpo.common.pairs.reach import Reach

    asked: list[object] = []
    original = Reach.read
    monkeypatch.setattr(Reach, "read", lambda self, path, side: asked.append(path) or original(self, path, side))
    for file, data in IMAGES.items():
        (tmp_path / file).write_bytes(data)
    (shard,) = open_source(
        str(as_lines(tmp_path, [{"prompt": "p", "images": list(IMAGES), "ranks": [1, 2, 3, 4]}]))
    ).shards
    assert len(list(shard.rows(0, 6))) == 6
    assert sorted(map(str, asked)) == sorted(IMAGES)


@pytest.mark.parametrize("blank", ["", " ", None])
def test_a_blank_value_says_nothing(write: Callable[..., Path], blank: object) -> None:
    """A second label and has_label: what a container has for "nothing" differs, what it means does not."""
    (item,) = read(write([pick(label_0=1.0, label_1=blank, has_label=blank)]))
    assert item == Pair(pair_id="7", prompt="p", win=b"A", lose=b"B", label=1.0, row=0)


def test_text_that_parquet_stores_as_binary_is_text(tmp_path: Path) -> None:
    row = {"win": b"A", "lose": b"B", "prompt": "é".encode(), "id": b"7.0", "label": b"0.75", "has_label": b"true"}
    pq.write_table(pa.Table.from_pylist([row, row | {"prompt": b"\xe9"}]), tmp_path / "a.parquet")
    pair, bad = read(tmp_path / "a.parquet")
    assert pair == Pair(pair_id="7", prompt="é", win=b"A", lose=b"B", label=0.75, row=0)
    assert isinstance(bad, Skipped)
    assert (bad.reason, bad.detail) == ("bad_metadata", "prompt is not UTF-8")


THREE = ["a.png", "b.png", "c.png"]
IRREGULAR: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "the first order is null in one row": (
        [
            {"images": THREE, "rank": None, "scores": [1.0, 2.0, 3.0], "prompt": "p"},
            {"images": THREE[:2], "rank": [1, 2], "scores": None, "prompt": "p"},
        ],
        ["BA", "CA", "CB", "AB"],
    ),
    "the images are null in one row": (
        [
            {"images": None, "rank": [1, 2, 3], "prompt": "p"},
            {"images": THREE[:2], "rank": [1, 2], "prompt": "p"},
            {"images": None, "rank": None, "prompt": "p"},
        ],
        [*["bad_metadata"] * 3, "AB", "bad_metadata"],
    ),
    "pairs and rankings in one file": (
        [
            {"win": "a.png", "lose": "b.png", "images": None, "rank": None, "prompt": "p"},
            {"win": None, "lose": None, "images": THREE[:2], "rank": [2, 1], "prompt": "p"},
            {"win": "a.png", "lose": "b.png", "images": THREE[:2], "rank": [2, 1], "prompt": "p"},
        ],
        ["AB", "BA", "bad_metadata"],
    ),
    "a path that is no list beside the images of a pair": (
        [{"win": "a.png", "lose": "b.png", "image_path": "x", "scores": [1.0, 2.0, 3.0], "prompt": "p"}] * 2,
        ["AB", "AB"],
    ),
}


@pytest.mark.parametrize(("rows", "expected"), IRREGULAR.values(), ids=IRREGULAR)
@pytest.mark.parametrize("container", [as_lines, as_array, as_parquet])
def test_rows_are_counted_as_they_are_read(
    tmp_path: Path, rows: list[dict[str, Any]], expected: list[str], container: Callable[..., Path]
) -> None:
    for file, data in IMAGES.items():
        (tmp_path / file).write_bytes(data)
    if container is as_parquet:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        found = read(tmp_path / "a.parquet")
    else:
        found = read(container(tmp_path, rows))
    assert [said(item) for item in found] == expected


def test_fields_that_say_nothing_beside_the_others_are_not_read(write: Callable[..., Path]) -> None:
    path = write([pick(label_0=1.0, label=0.0, score=3.0)])
    (shard,) = open_source(str(path)).shards
    assert {re.sub(r"^\w+ \.?|\.txt$", "", name): count for name, count in shard.not_read.items()} == {
        "label": 1,
        "score": 1,
    }
