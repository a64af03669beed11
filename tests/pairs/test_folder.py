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
    (shard,) = open_source(str(location), allow_remote=allow_remote).shards
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
    "no lose": ({"win": "img/a.png", "prompt": "p"}, "bad_metadata"),
    "null lose": (GOOD | {"lose": None}, "missing_image"),
    "no image field": ({"prompt": "p", "picture_1": "img/a.png"}, "bad_metadata"),
    "a name twice": (
        '{"win": "img/a.png", "lose": "img/b.png", "prompt": "p", "label": 1, "label": 0}',
        "bad_metadata",
    ),
    "nested too deep": ("[" * 100_000, "bad_metadata"),
    "two prompts": (GOOD | {"caption": "another"}, "bad_metadata"),
    "two layouts": (GOOD | {"jpg_0": "img/a.png"}, "bad_metadata"),
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
    (folder / "pairs.csv").write_text("winner,loser,prompt\na,b,c\n")
    with pytest.raises(DataError, match="lacks columns") as error:
        read(folder)
    assert "winner, loser, prompt" in str(error.value)
    (folder / "pairs.csv").write_text("win,lose,win,prompt\na,b,c,d\n")
    with pytest.raises(DataError, match=r"(?s)names a column twice.*got: +win\n"):
        read(folder)


CSV_ROWS = {
    "text after a quote": ('img/a.png,img/b.png,"Hello" says a cat', [1]),
    "a quote that never closes": ('img/a.png,img/b.png,"open', [1]),
    "two of them": ('img/a.png,img/b.png,"open\nimg/a.png,img/b.png,"open', [1, 2]),
    "a quote that closes in the row below": ('img/a.png,img/b.png,"open\nimg/a.png,img/b.png,"x" y', [1, 2]),
    "a field that is too long": ("img/a.png,img/b.png," + "x" * 200_000, [1]),
    "fields too many": ("img/a.png,img/b.png,p,q,r", [1]),
}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", CSV_ROWS)
def test_a_bad_row_of_a_csv_is_named_and_touches_no_other(folder: Path, name: str, end: str) -> None:
    bad, rows = CSV_ROWS[name]
    good = ["img/a.png,img/b.png,first", 'img/b.png,img/a.png,"a, ""b""\nand c"', "img/b.png,img/a.png,last"]
    text = "\n".join(["win,lose,prompt", good[0], bad, *good[1:], ""])
    (folder / "pairs.csv").write_bytes(text.replace("\n", end).encode())
    found = read(folder)
    assert [item.row for item in found if isinstance(item, Skipped)] == rows
    for item, row in zip([item for item in found if isinstance(item, Skipped)], rows, strict=True):
        assert item.reason == "bad_metadata"
        assert f"line {row + 2}:" in item.detail
    kept = [item for item in found if isinstance(item, Pair)]
    assert [item.prompt for item in kept] == ["first", f'a, "b"{end}and c', "last"]
    (shard,) = open_source(str(folder)).shards
    for start in range(len(found)):
        assert list(shard.rows(start, len(found))) == found[start:]


def test_json_lines_whose_lines_end_in_cr(folder: Path) -> None:
    lines = [json.dumps(GOOD | {"id": str(i)}) for i in range(3)]
    (folder / "pairs.jsonl").write_bytes("\r".join(lines).encode())
    assert [item.pair_id for item in read(folder)] == ["0", "1", "2"]


def test_tab_separated(folder: Path) -> None:
    (folder / "pairs.tsv").write_text('win\tlose\tprompt\nimg/a.png\timg/b.png\ta cube, "red"\n')
    (item,) = read(folder)
    assert isinstance(item, Pair)
    assert (item.win, item.lose, item.prompt) == (b"A", b"B", 'a cube, "red"')


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array(folder: Path, indent: int | None, mark: bytes) -> None:
    rows: list[object] = [GOOD | {"id": f"é{i}", "prompt": "猫 ],[ {"} for i in range(5)]
    rows[2:2] = ["no object", GOOD | {"label": 0.5, "id": "tie"}]
    (folder / "pairs.json").write_bytes(mark + json.dumps(rows, indent=indent, ensure_ascii=False).encode() + b"\n ")
    found = read(folder)
    assert [getattr(item, "reason", item.pair_id) for item in found] == [
        "é0",
        "é1",
        "bad_metadata",
        "tie",
        *"é2 é3 é4".split(),
    ]
    (shard,) = open_source(str(folder / "pairs.json")).shards
    for start, stop in [(0, 1), (2, 5), (6, 7), (3, 99)]:
        assert list(shard.rows(start, stop)) == found[start:stop]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("pairs.jsonl", b'[\n {"win": "a"}\n]', ["JSON array", "name the file .json"]),
        ("pairs.jsonl", b'[{"win": "a"}]', ["JSON array"]),
        ("pairs.json", b'{"win": "a"}\n{"win": "b"}\n', ["no JSON array", "name the file .jsonl"]),
        ("pairs.json", b'[{"win": "a"},\n {"win": }]', ["no JSON array", "line 2"]),
        ("pairs.json", b'[{"win": "a"}', ["no JSON array", "delimiter"]),
        ("pairs.json", b'[{"win": "\xe9"}]', ["0xe9", "Latin-1"]),
        ("pairs.jsonl", '{"win": "a"}\n'.encode("utf-16"), ["UTF-16", "UTF-8"]),
        ("pairs.csv", "win,lose\n".encode("utf-16-le"), ["UTF-16"]),
        ("pairs.csv", b"PK\x03\x04" + bytes(26) + b"[Content_Types].xml", ["Excel workbook", "CSV"]),
        ("pairs.jsonl", b"\x1f\x8b\x08\0abc", ["gzip", "uncompress"]),
        ("pairs.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", ["git-lfs pointer", "git lfs pull"]),
        ("pairs.csv", b"<!DOCTYPE html><html>", ["HTML page"]),
    ],
)
def test_a_list_that_is_something_else_is_named(folder: Path, name: str, data: bytes, words: list[str]) -> None:
    (folder / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        read(folder)
    for word in words:
        assert word in str(caught.value)


def test_fields_that_are_not_read_are_counted(folder: Path) -> None:
    write_lines(folder, GOOD | {"lable": 0.2}, GOOD | {"lable": 0.4, "model": "x"}, "no JSON")
    (shard,) = open_source(str(folder)).shards
    assert dict(shard.not_read) == {"field lable": 2, "field model": 1}
    (folder / "other.csv").write_text("win,lose,prompt,seed\na,b,c,1\n")
    (shard,) = open_source(str(folder / "other.csv")).shards
    assert dict(shard.not_read) == {"column seed": 1}


def test_what_a_missing_field_may_be_called(folder: Path) -> None:
    bad, named = read(write_lines(folder, {"Win": "img/a.png", "lose": "img/b.png", "prompt": "p"}, GOOD))
    assert isinstance(bad, Skipped)
    assert "found: Win, lose, prompt" in bad.detail
    assert "'Win'" in bad.detail
    assert isinstance(named, Pair)


@pytest.mark.parametrize(("path", "word"), [("img\\a.png", "backslash"), (" img/a.png", "blank"), ("~/a.png", "~")])
def test_why_a_file_is_not_there(folder: Path, path: str, word: str) -> None:
    (item,) = read(write_lines(folder, GOOD | {"win": path}))
    assert isinstance(item, Skipped)
    assert item.reason == "missing_image"
    assert word in item.detail


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
    (shard,) = open_source(str(folder)).shards
    assert shard.num_rows == 12
    everything = list(shard.rows(0, 12))
    assert [item.pair_id for item in everything] == [str(i) for i in range(12)]
    for start, stop in [(0, 1), (5, 9), (11, 12), (9, 99), (12, 20), (4, 4)]:
        assert list(shard.rows(start, stop)) == everything[start:stop]
    assert list(pickle.loads(pickle.dumps(shard)).rows(5, 7)) == everything[5:7]


def test_images_of_rows_that_are_not_asked_for_are_not_read(folder: Path) -> None:
    write_lines(folder, GOOD | {"win": "img/none.png"}, GOOD)
    (shard,) = open_source(str(folder)).shards
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
        with pytest.raises(DataError, match="No image of these rows could be fetched"):
            read("memory://set")


def test_fingerprint_follows_the_lines_and_not_the_path(folder: Path) -> None:
    def fingerprint(name: str, text: str) -> str:
        (folder / name).write_text(text)
        (shard,) = open_source(str(folder / name)).shards
        return shard.fingerprint()

    first = fingerprint("a.jsonl", '{"win": "a"}\n')
    assert fingerprint("b.jsonl", '{"win": "a"}\n') == first
    assert fingerprint("c.jsonl", '{"win": "b"}\n') != first
