"""Lists of pairs: JSON lines and CSV, image files and URLs."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from inpo.common.errors import DataError
from inpo.common.pairs import Pair, Skipped, open_source, reach


def read(location: Path | str, *, allow_remote: bool = False) -> list[Pair | Skipped]:
    (shard,) = open_source(str(location), allow_remote=allow_remote).input_shards()
    items = list(shard.rows(0, shard.num_rows))
    assert [item.row for item in items] == list(range(shard.num_rows))
    return items


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "img").mkdir()
    for name, data in (("a.png", b"A"), ("b.png", b"B"), ("c d.png", b"C"), ("empty.png", b"")):
        (tmp_path / "img" / name).write_bytes(data)
    return tmp_path


def write_lines(folder: Path, *rows: dict[str, object] | str) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


GOOD = {"win": "img/a.png", "lose": "img/b.png", "prompt": "a cube"}


def test_json_lines(folder: Path) -> None:
    rows = [
        GOOD | {"id": "first", "label": 0.9},
        {"lose": "img/a.png", "win": str(folder / "img" / "c d.png"), "prompt": "赤い立方体\u2028 \U0001f9ca", "id": 7},
        GOOD | {"id": "swapped", "label": 0.2},
        GOOD | {"id": "empty prompt", "prompt": ""},
    ]
    expected = [
        Pair(pair_id="first", prompt="a cube", win=b"A", lose=b"B", label=0.9, row=0),
        Pair(pair_id="7", prompt="赤い立方体\u2028 \U0001f9ca", win=b"C", lose=b"A", label=1.0, row=1),
        Pair(pair_id="swapped", prompt="a cube", win=b"B", lose=b"A", label=0.8, row=2),
        Pair(pair_id="empty prompt", prompt="", win=b"A", lose=b"B", label=1.0, row=3),
    ]
    write_lines(folder, *rows)
    assert read(folder) == expected
    assert read(folder / "pairs.jsonl") == expected


def test_csv(folder: Path) -> None:
    text = (
        "\ufeffid,win,lose,prompt,label\r\n"
        'first,img/a.png,img/b.png,"a cube, red",0.9\r\n'
        "\r\n"
        'second,img/b.png,img/c d.png,"two\r\nlines and a ""quote""",1\r\n'
    )
    (folder / "pairs.csv").write_text(text, encoding="utf-8", newline="")
    assert read(folder) == [
        Pair(pair_id="first", prompt="a cube, red", win=b"A", lose=b"B", label=0.9, row=0),
        Pair(pair_id="second", prompt='two\r\nlines and a "quote"', win=b"B", lose=b"C", label=1.0, row=1),
    ]


def test_a_very_long_prompt(folder: Path) -> None:
    prompt = "猫 " * 30_000
    (item,) = read(write_lines(folder, GOOD | {"prompt": prompt}))
    assert isinstance(item, Pair)
    assert item.prompt == prompt


SKIPS: dict[str, tuple[dict[str, object] | str, str]] = {
    "tie": (GOOD | {"label": 0.5}, "tie"),
    "null label": (GOOD | {"label": None}, "unlabelled"),
    "label in words": (GOOD | {"label": "better"}, "bad_label"),
    "no prompt": ({"win": "img/a.png", "lose": "img/b.png"}, "missing_prompt"),
    "no file": (GOOD | {"win": "img/none.png"}, "missing_image"),
    "no lose": ({"win": "img/a.png", "prompt": "p"}, "missing_image"),
    "a folder": (GOOD | {"win": "img"}, "missing_image"),
    "an empty name": (GOOD | {"win": ""}, "missing_image"),
    "zero bytes": (GOOD | {"lose": "img/empty.png"}, "empty_image"),
    "no JSON": ('{"win": "img/a.png"', "bad_metadata"),
    "a JSON list": ("[1, 2]", "bad_metadata"),
    "a number for a path": (GOOD | {"win": 3}, "bad_metadata"),
    "an id that is a list": (GOOD | {"id": ["x"]}, "bad_metadata"),
    "half a character": ('{"win": "img/a.png", "lose": "img/b.png", "prompt": "\\udc80"}', "bad_metadata"),
}


@pytest.mark.parametrize("name", SKIPS)
def test_a_bad_row_is_skipped_whole_with_its_reason(folder: Path, name: str) -> None:
    row, reason = SKIPS[name]
    first, bad, last = read(write_lines(folder, GOOD | {"id": "1"}, row, GOOD | {"id": "3"}))
    assert isinstance(bad, Skipped)
    assert bad.reason == reason
    assert bad.detail
    assert [first.pair_id, last.pair_id] == ["1", "3"]
    assert all(isinstance(item, Pair) and (item.win, item.lose) == (b"A", b"B") for item in (first, last))


def test_csv_rows_that_do_not_fit_the_header_or_utf8(folder: Path) -> None:
    lines = [b"win,lose,prompt", b"img/a.png,img/b.png", b"img/a.png,img/b.png,p,q", b"img/a.png,img/b.png,\xff", b""]
    (folder / "pairs.csv").write_bytes(b"\n".join(lines) + b"img/a.png,img/b.png,fine\n")
    found = read(folder)
    assert [getattr(item, "reason", "pair") for item in found] == ["bad_metadata"] * 3 + ["pair"]


def test_csv_without_a_prompt_column_counts_every_row(folder: Path) -> None:
    (folder / "pairs.csv").write_text("win,lose\nimg/a.png,img/b.png\nimg/b.png,img/a.png\n")
    assert [getattr(item, "reason", "pair") for item in read(folder)] == ["missing_prompt"] * 2


def test_csv_without_image_columns_is_refused(folder: Path) -> None:
    (folder / "pairs.csv").write_text("chosen,rejected,prompt\na,b,c\n")
    with pytest.raises(DataError, match="lacks columns") as error:
        read(folder)
    assert "chosen, rejected, prompt" in str(error.value)


def test_csv_with_a_quote_that_never_closes_is_unreadable(folder: Path) -> None:
    (folder / "pairs.csv").write_text('win,lose,prompt\nimg/a.png,img/b.png,"open\nimg/b.png,img/a.png,p\n')
    with pytest.raises(DataError, match="this input shard cannot be read"):
        read(folder)


def test_ids_follow_what_a_row_says_and_not_its_place(folder: Path) -> None:
    rows: list[dict[str, object]] = [GOOD, GOOD | {"prompt": "q"}, GOOD | {"win": "img/c d.png"}]
    before = {item.pair_id for item in read(write_lines(folder, *rows))}
    assert len(before) == 3
    after = read(write_lines(folder, {"win": "img/b.png", "lose": "img/a.png", "prompt": "new"}, *reversed(rows)))
    assert {item.pair_id for item in after[1:]} == before
    assert after[0].pair_id not in before


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_any_range_of_rows_equals_that_part_of_all_rows(folder: Path, kind: str) -> None:
    if kind == "jsonl":
        write_lines(folder, *(GOOD | {"id": str(i), "prompt": "é" * i} for i in range(12)), "", "  ")
    else:
        rows = [f'{i},img/a.png,img/b.png,"é' + "\n" * i + '"' for i in range(12)]
        (folder / "pairs.csv").write_text("\n".join(["id,win,lose,prompt", *rows, "", ""]), encoding="utf-8")
    (shard,) = open_source(str(folder)).input_shards()
    assert shard.num_rows == 12
    everything = list(shard.rows(0, 12))
    assert [item.pair_id for item in everything] == [str(i) for i in range(12)]
    for start, stop in [(0, 1), (5, 9), (11, 12), (9, 99), (12, 20), (4, 4)]:
        assert list(shard.rows(start, stop)) == everything[start:stop]
    assert list(pickle.loads(pickle.dumps(shard)).rows(5, 7)) == everything[5:7]


def test_images_of_rows_that_are_not_asked_for_are_not_read(folder: Path) -> None:
    write_lines(folder, GOOD | {"win": "img/none.png"}, GOOD)
    (shard,) = open_source(str(folder)).input_shards()
    (item,) = shard.rows(1, 2)
    assert isinstance(item, Pair)


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    """The in-memory file system, empty before and after."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def test_images_by_url_and_a_list_by_url(folder: Path, memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe({"/set/img/a.png": b"A", "/other/b.png": b"B"})
    rows = [
        {"win": "img/a.png", "lose": "memory://other/b.png", "prompt": "p", "id": "1"},
        {"win": "memory://set/img/a.png", "lose": "memory://other/none.png", "prompt": "p", "id": "2"},
        {"win": f"file://{folder}/img/c d.png", "lose": "img/a.png", "prompt": "p", "id": "3"},
    ]
    memory.pipe("/set/pairs.jsonl", "\n".join(json.dumps(row) for row in rows).encode())
    for location in ("memory://set", "memory://set/pairs.jsonl"):
        found, missing, local = read(location, allow_remote=True)
        assert found == Pair(pair_id="1", prompt="p", win=b"A", lose=b"B", label=1.0, row=0)
        assert [getattr(item, "reason", None) for item in (missing, local)] == ["missing_image", "not_allowed"]


class RemoteProblem(Exception):
    """What HTTP clients raise: an exception with a status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


@pytest.mark.parametrize(("status", "refused"), [(403, True), (410, True), (429, False), (503, False)])
def test_an_outage_of_everything_is_no_missing_image(
    memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch, status: int, refused: bool
) -> None:
    """Were an outage counted as missing images, the commit would keep a hole as large as the shard for good."""
    memory.pipe("/set/pairs.jsonl", json.dumps({"win": "a.png", "lose": "b.png", "prompt": "p"}).encode())

    opened = memory.open

    def fails(path: str, *arguments: object, **options: object) -> object:
        if path.endswith(".png"):
            raise RemoteProblem(status)
        return opened(path, *arguments, **options)

    monkeypatch.setattr(memory, "open", fails)
    monkeypatch.setattr(reach, "_SECONDS_TO_NEXT_TRY", 0.0)
    if refused:
        (item,) = read("memory://set")
        assert isinstance(item, Skipped)
        assert item.reason == "missing_image"
    else:
        with pytest.raises(DataError, match="no image of these rows could be fetched"):
            read("memory://set")


def test_fingerprint_follows_the_lines_and_not_the_path(folder: Path) -> None:
    def fingerprint(name: str, text: str) -> str:
        (folder / name).write_text(text)
        (shard,) = open_source(str(folder / name)).input_shards()
        return shard.fingerprint()

    first = fingerprint("a.jsonl", '{"win": "a"}\n')
    assert fingerprint("b.jsonl", '{"win": "a"}\n') == first
    assert fingerprint("c.jsonl", '{"win": "b"}\n') != first
