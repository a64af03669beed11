"""Webdataset tars: both layouts, ids, ranges, damage, and what does not count as a row."""

import gzip
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from inpo.common.cache.commits import ShardSource
from inpo.common.cache.document import SHARD_NAME
from inpo.common.errors import DataError
from inpo.common.pairs import Pair, Skipped, open_source, tars

Members = list[tuple[str, bytes]]
WriteTar = Callable[[Path, Members], Path]


def ours(key: str, win: bytes, lose: bytes, **fields: object) -> Members:
    return [(f"{key}.json", json.dumps(fields).encode()), (f"{key}.lose.png", lose), (f"{key}.win.png", win)]


def mirror(key: str, first: bytes, second: bytes, label_0: str, label_1: str, caption: str) -> Members:
    return [
        (f"{key}.jpg_0.jpg", first),
        (f"{key}.jpg_1.jpg", second),
        (f"{key}.label_0.txt", label_0.encode()),
        (f"{key}.label_1.txt", label_1.encode()),
        (f"{key}.original_prompt.txt", caption.encode()),
    ]


def read(path: Path | str) -> list[Pair | Skipped]:
    (shard,) = open_source(str(path)).shards
    items = list(shard.rows(0, shard.num_rows))
    assert [item.row for item in items] == list(range(shard.num_rows))
    return items


def only(path: Path) -> Pair | Skipped:
    (item,) = read(path)
    return item


def test_our_layout(tmp_path: Path, write_tar: WriteTar) -> None:
    path = write_tar(tmp_path / "a.tar", ours("0001", b"W", b"L", prompt="a red cube", label=0.75, id="cube"))
    assert only(path) == Pair(pair_id="cube", prompt="a red cube", win=b"W", lose=b"L", label=0.75, row=0)


def test_our_layout_without_label_and_id(tmp_path: Path, write_tar: WriteTar) -> None:
    path = write_tar(tmp_path / "a.tar", ours("x/0001", b"W", b"L", prompt=""))
    assert only(path) == Pair(pair_id="a/x/0001", prompt="", win=b"W", lose=b"L", label=1.0, row=0)


@pytest.mark.parametrize("name", [".a", "..a", "-a", "a b", "ä", "a" * 200])
def test_the_name_of_any_file_can_stand_in_a_commit(tmp_path: Path, write_tar: WriteTar, name: str) -> None:
    path = write_tar(tmp_path / f"{name}.tar", ours("1", b"W", b"L", prompt="p"))
    (shard,) = open_source(str(path)).shards
    source = ShardSource(location=str(path), input_shard=shard.name, rows=(0, 1), fingerprint=shard.fingerprint())
    assert SHARD_NAME.fullmatch(f"{source.input_shard}-00000000")


def test_a_prompt_longer_than_a_cache_can_hold_is_skipped(tmp_path: Path, write_tar: WriteTar) -> None:
    item = only(write_tar(tmp_path / "a.tar", ours("1", b"W", b"L", prompt="p" * 1_000_001)))
    assert isinstance(item, Skipped)
    assert (item.reason, item.detail) == ("bad_metadata", "prompt has 1000001 characters, limit 1000000")
    assert isinstance(only(write_tar(tmp_path / "b.tar", ours("1", b"W", b"L", prompt="p" * 1_000_000))), Pair)


def test_a_label_below_one_half_swaps_the_sides(tmp_path: Path, write_tar: WriteTar) -> None:
    path = write_tar(tmp_path / "a.tar", ours("1", b"W", b"L", prompt="p", label=0.25))
    assert only(path) == Pair(pair_id="a/1", prompt="p", win=b"L", lose=b"W", label=0.75, row=0)


@pytest.mark.parametrize(("labels", "win", "lose"), [(("1", "0"), b"A", b"B"), (("0.0\n", "1.0\n"), b"B", b"A")])
def test_the_mirror_layout(
    tmp_path: Path, write_tar: WriteTar, labels: tuple[str, str], win: bytes, lose: bytes
) -> None:
    path = write_tar(tmp_path / "00012.tar", mirror("7", b"A", b"B", *labels, caption="a cat\n"))
    assert only(path) == Pair(pair_id="00012/7", prompt="a cat", win=win, lose=lose, label=1.0, row=0)


@pytest.mark.parametrize(
    "names",
    [
        ("jpg_0", "jpg_1", "label_0", "label_1", "caption"),
        ("jpg_0.jpeg", "jpg_1.webp", "label_0.cls", "label_1.cls", "caption.txt"),
        ("JPG_0.JPG", "JPG_1.JPG", "LABEL_0.TXT", "LABEL_1.TXT", "TXT"),
    ],
)
def test_the_mirror_layout_with_other_extensions(tmp_path: Path, write_tar: WriteTar, names: tuple[str, ...]) -> None:
    contents = (b"A", b"B", b"0", b"1", "кот 猫".encode())
    path = write_tar(tmp_path / "m.tar", [(f"5.{n}", c) for n, c in zip(names, contents, strict=True)])
    assert only(path) == Pair(pair_id="m/5", prompt="кот 猫", win=b"B", lose=b"A", label=1.0, row=0)


def test_the_mirror_layout_with_metadata_in_json(tmp_path: Path, write_tar: WriteTar) -> None:
    fields = {"caption": "a cat", "label_0": 0.0, "label_1": 1.0, "has_label": True, "ranking_id": 99}
    members = [("5.jpg_0", b"A"), ("5.jpg_1", b"B"), ("5.json", json.dumps(fields).encode())]
    assert only(write_tar(tmp_path / "m.tar", members)) == Pair(
        pair_id="99", prompt="a cat", win=b"B", lose=b"A", label=1.0, row=0
    )


SKIPS: dict[str, tuple[Members, str]] = {
    "tie": (ours("1", b"W", b"L", prompt="p", label=0.5), "tie"),
    "a label that is 0.5 as float32": (ours("1", b"W", b"L", prompt="p", label=0.5 + 1e-9), "tie"),
    "mirror tie": (mirror("1", b"A", b"B", "0.5", "0.5", "p"), "tie"),
    "null label": (ours("1", b"W", b"L", prompt="p", label=None), "unlabelled"),
    "mirror without labels": ([("1.caption", b"p"), ("1.jpg_0", b"A"), ("1.jpg_1", b"B")], "unlabelled"),
    "has_label false": ([*mirror("1", b"A", b"B", "1", "0", "p"), ("1.has_label.txt", b"False")], "unlabelled"),
    "label above one": (ours("1", b"W", b"L", prompt="p", label=1.5), "bad_label"),
    "label that is no number": (ours("1", b"W", b"L", prompt="p", label="win"), "bad_label"),
    "label NaN": (ours("1", b"W", b"L", prompt="p", label=float("nan")), "bad_label"),
    "label of a word": (ours("1", b"W", b"L", prompt="p", label="maybe"), "bad_label"),
    "has_label of a word": (ours("1", b"W", b"L", prompt="p", has_label="maybe"), "bad_metadata"),
    "has_label false in our layout": (ours("1", b"W", b"L", prompt="p", has_label="0"), "unlabelled"),
    "a member twice": ([*ours("1", b"W", b"L", prompt="p"), ("1.win.png", b"V")], "bad_metadata"),
    "two captions": ([*ours("1", b"W", b"L", prompt="p"), ("1.txt", b"another")], "bad_metadata"),
    "two first labels": (
        [*mirror("1", b"A", b"B", "1", "0", "p"), ("1.json", b'{"label_0": 0, "label_1": 1}')],
        "bad_metadata",
    ),
    "no object": ([("1.json", b'"p"'), ("1.lose.png", b"L"), ("1.win.png", b"W")], "bad_metadata"),
    "labels that contradict": (mirror("1", b"A", b"B", "1", "1", "p"), "bad_label"),
    "no prompt": (ours("1", b"W", b"L", label=1.0), "missing_prompt"),
    "null prompt": (ours("1", b"W", b"L", prompt=None), "missing_prompt"),
    "no json": ([("1.lose.png", b"L"), ("1.win.png", b"W")], "missing_prompt"),
    "prompt that is no text": (ours("1", b"W", b"L", prompt=3), "bad_metadata"),
    "prompt with half a character": (
        [("1.json", b'{"prompt": "\\ud800"}'), ("1.lose.png", b"L"), ("1.win.png", b"W")],
        "bad_metadata",
    ),
    "json that is none": ([("1.json", b"{"), ("1.lose.png", b"L"), ("1.win.png", b"W")], "bad_metadata"),
    "json list": ([("1.json", b"[]"), ("1.lose.png", b"L"), ("1.win.png", b"W")], "bad_metadata"),
    "caption that is not UTF-8": (
        [("1.caption", b"\xff"), ("1.jpg_0", b"A"), ("1.jpg_1", b"B"), ("1.label_0", b"1")],
        "bad_metadata",
    ),
    "two wins": ([*ours("1", b"W", b"L", prompt="p"), ("1.win.jpg", b"V")], "bad_metadata"),
    "both layouts": ([*ours("1", b"W", b"L", prompt="p"), ("1.jpg_0", b"A")], "bad_metadata"),
    "one side only": (ours("1", b"W", b"L", prompt="p")[:2], "missing_image"),
    "no side": (ours("1", b"W", b"L", prompt="p")[:1], "missing_image"),
    "zero bytes": (ours("1", b"W", b"", prompt="p"), "empty_image"),
}


@pytest.mark.parametrize("name", SKIPS)
def test_a_bad_row_is_skipped_whole_with_its_reason(tmp_path: Path, write_tar: WriteTar, name: str) -> None:
    members, reason = SKIPS[name]
    good = ours("2", b"W2", b"L2", prompt="q", id="good")
    bad, kept = read(write_tar(tmp_path / "a.tar", members + good))
    assert isinstance(bad, Skipped)
    assert (bad.pair_id, bad.reason) == ("a/1", reason)
    assert bad.detail
    # The neighbour keeps both of its own images.
    assert kept == Pair(pair_id="good", prompt="q", win=b"W2", lose=b"L2", label=1.0, row=1)


def test_any_range_of_rows_equals_that_part_of_all_rows(tmp_path: Path, write_tar: WriteTar) -> None:
    members = [m for i in range(20) for m in ours(f"{i:04d}", b"W%d" % i, b"L%d" % i, prompt=str(i))]
    (shard,) = open_source(str(write_tar(tmp_path / "a.tar", members))).shards
    everything = list(shard.rows(0, 20))
    assert shard.num_rows == 20
    for start, stop in [(0, 1), (7, 13), (19, 20), (15, 99), (20, 30), (5, 5)]:
        assert list(shard.rows(start, stop)) == everything[start:stop]
    assert list(pickle.loads(pickle.dumps(shard)).rows(7, 9)) == everything[7:9]


def test_other_files_in_the_tar_are_no_rows(tmp_path: Path, write_tar: WriteTar) -> None:
    members = [("README.md", b"hello"), ("./._0001.win.png", b"x"), ("__meta__/info.json", b"{}"), ("LICENSE", b"MIT")]
    path = write_tar(tmp_path / "a.tar", members + ours("./0001", b"W", b"L", prompt="p"))
    assert only(path) == Pair(pair_id="a/0001", prompt="p", win=b"W", lose=b"L", label=1.0, row=0)


def test_what_has_no_role_is_counted(tmp_path: Path, write_tar: WriteTar) -> None:
    members = [("README", b"hello"), ("notes.md", b"x"), ("._1.win.png", b"x")]
    members += [*ours("1", b"W", b"L", prompt="p", lable=0.3), ("1.cls", b"3"), ("2.cls", b"3")]
    (shard,) = open_source(str(write_tar(tmp_path / "a.tar", members))).shards
    assert shard.num_rows == 1
    assert dict(shard.not_read) == {
        "member without a suffix": 1,
        "member .md": 1,
        "hidden member": 1,
        "member .cls": 2,
        "field lable": 1,
    }


def test_links_in_a_tar_are_named_and_counted(tmp_path: Path) -> None:
    """GNU tar stores the second name of a file as a hard link."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (*ours("1", b"W", b"L", prompt="p"), *ours("2", b"W", b"L", prompt="p")[:2]):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo("2.win.png")
        info.type, info.linkname = tarfile.LNKTYPE, "1.win.png"
        tar.addfile(info)
    whole, linked = read(path)
    assert isinstance(whole, Pair)
    assert isinstance(linked, Skipped)
    assert (linked.pair_id, linked.reason) == ("a/2", "missing_image")
    assert "win is a link" in linked.detail
    (shard,) = open_source(str(path)).shards
    assert dict(shard.not_read) == {"member that is a hard link": 1}


def test_chosen_and_rejected_members(tmp_path: Path, write_tar: WriteTar) -> None:
    members = [("1.chosen.png", b"W"), ("1.json", b'{"caption": "p"}'), ("1.rejected.png", b"L")]
    assert only(write_tar(tmp_path / "a.tar", members)) == Pair(
        pair_id="a/1", prompt="p", win=b"W", lose=b"L", label=1.0, row=0
    )


def test_a_compressed_tar_under_a_tars_name_is_named(tmp_path: Path, whole: Path) -> None:
    (tmp_path / "a.tar").write_bytes(gzip.compress(whole.read_bytes()))
    with pytest.raises(DataError, match=r"(?s)cannot be read.*gzip.*uncompress it first"):
        read(tmp_path / "a.tar")


def test_names_longer_than_a_tar_header_field(tmp_path: Path, write_tar: WriteTar) -> None:
    key = "folder/" + "k" * 300
    path = write_tar(tmp_path / "a.tar", ours(key, b"W", b"L", prompt="p" * 100_000))
    item = only(path)
    assert isinstance(item, Pair)
    assert item.pair_id == f"a/{key}"
    assert len(item.prompt) == 100_000


def test_the_same_sample_twice_stays_two_rows(tmp_path: Path, write_tar: WriteTar) -> None:
    first, other = ours("1", b"W", b"L", prompt="p"), ours("2", b"W", b"L", prompt="p")
    found = read(write_tar(tmp_path / "a.tar", first + other + first))
    assert [item.pair_id for item in found] == ["a/1", "a/2", "a/1"]


def test_members_that_do_not_lie_together_are_refused(tmp_path: Path, write_tar: WriteTar) -> None:
    json_1, lose_1, win_1 = ours("1", b"W", b"L", prompt="p")
    json_2, lose_2, win_2 = ours("2", b"W", b"L", prompt="p")
    path = write_tar(tmp_path / "a.tar", [json_1, json_2, lose_1, win_1, lose_2, win_2])
    with pytest.raises(DataError, match="do not lie together") as error:
        read(path)
    assert "--sort=name" in str(error.value)


def test_a_tar_of_something_else_is_refused_with_what_it_holds(tmp_path: Path, write_tar: WriteTar) -> None:
    with pytest.raises(DataError, match="holds no preference pairs") as error:
        read(write_tar(tmp_path / "a.tar", [("0001.cls", b"3"), ("0001.jpg", b"x")]))
    assert "0001.cls, 0001.jpg" in str(error.value)


def test_an_empty_tar_has_no_rows(tmp_path: Path, write_tar: WriteTar) -> None:
    assert read(write_tar(tmp_path / "a.tar", [])) == []


@pytest.fixture
def whole(tmp_path: Path, write_tar: WriteTar) -> Path:
    """Three samples of three members; every header and every content takes one block of 512 bytes."""
    members = [m for i in range(3) for m in ours(str(i), b"W", b"L", prompt="p")]
    return write_tar(tmp_path / "whole.tar", members)


@pytest.mark.parametrize("size", [100, 512, 700, 1024, 6 * 512, 6 * 512 + 13, 17 * 512, 18 * 512])
def test_a_cut_tar_is_unreadable_wherever_it_is_cut(tmp_path: Path, whole: Path, size: int) -> None:
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[:size])
    with pytest.raises(DataError, match="This input shard cannot be read"):
        read(cut)


def test_a_damaged_header_is_unreadable_and_not_the_end(tmp_path: Path, whole: Path) -> None:
    data = bytearray(whole.read_bytes())
    data[6 * 512 : 6 * 512 + 100] = b"\xff" * 100  # the header of the second sample's first member
    damaged = tmp_path / "damaged.tar"
    damaged.write_bytes(data)
    with pytest.raises(DataError, match="damaged header at byte 3072"):
        read(damaged)


def test_a_tar_cut_after_it_was_indexed_is_unreadable(tmp_path: Path, whole: Path) -> None:
    (shard,) = open_source(str(whole)).shards
    assert shard.num_rows == 3
    whole.write_bytes(whole.read_bytes()[: 7 * 512])
    with pytest.raises(DataError, match="This file was written again"):
        list(shard.rows(0, 3))


@pytest.mark.parametrize("content", [b"", b"this is no tar" * 100, b"\x1f\x8b\x08\0" * 500])
def test_what_is_no_tar_is_unreadable(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match="This input shard cannot be read"):
        read(path)


def test_fingerprint_follows_content_and_not_the_path(tmp_path: Path, write_tar: WriteTar) -> None:
    def fingerprint(name: str, members: Members) -> str:
        (shard,) = open_source(str(write_tar(tmp_path / name, members))).shards
        return shard.fingerprint()

    base = ours("1", b"W", b"L", prompt="p", label=0.7)
    first = fingerprint("a.tar", base)
    assert fingerprint("b.tar", base) == first
    others = [
        ours("1", b"W", b"L", prompt="p", label=0.8),  # of the same size
        ours("1", b"W", b"L", prompt="q", label=0.7),
        ours("1", b"WW", b"L", prompt="p", label=0.7),
        ours("2", b"W", b"L", prompt="p", label=0.7),
        base + ours("2", b"W", b"L", prompt="p"),
    ]
    found = {fingerprint(f"c{i}.tar", members) for i, members in enumerate(others)}
    assert len(found) == len(others)
    assert first not in found


def test_a_name_too_long_for_an_id_is_one_skipped_row(tmp_path: Path, write_tar: WriteTar) -> None:
    """Whatever else is wrong with the row: its id can be listed."""
    long = ours("k" * 1200, b"W", b"L", prompt="p")
    cut = [("l" * 1200 + ".json", b"{"), ("l" * 1200 + ".win.png", b"W"), ("l" * 1200 + ".lose.png", b"L")]
    found = read(write_tar(tmp_path / "a.tar", long + cut + ours("good", b"W", b"L", prompt="p")))
    assert [(item.pair_id, getattr(item, "reason", None)) for item in found] == [
        ("a/0", "bad_metadata"),
        ("a/1", "bad_metadata"),
        ("a/good", None),
    ]


def test_samples_are_of_lists_if_one_says_so(
    tmp_path: Path, write_tar: WriteTar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged metadata says nothing, and how large an image is does not matter."""
    monkeypatch.setattr(tars, "MAX_IMAGE_BYTES", 100)
    damaged = [("1.json", b"{"), *ours("1", b"W", b"L")[1:]]
    of_list, own = ours("2", b"W" * 101, b"L", prompt="p", list="x"), ours("3", b"W", b"L", prompt="p", list="")
    member = [("4.list.txt", b"x"), *ours("4", b"W" * 101, b"L", prompt="p")]
    for name, members, has_lists in (
        ("a", damaged + of_list + own, True),
        ("b", damaged + own + of_list, True),
        ("c", damaged + own + member, True),
        ("d", damaged + own + ours("5", b"W" * 101, b"L", prompt="p"), False),
    ):
        (shard,) = open_source(str(write_tar(tmp_path / f"{name}.tar", members))).shards
        assert shard.has_lists is has_lists
        assert [item.row for item in shard.rows(0, 3)] == [0, 1, 2]
        assert len(shard.head(3)) == 1  # what can be shown
