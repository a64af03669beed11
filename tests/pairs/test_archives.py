"""Images in archives beside a list, against what unpacking them gives; each public set in its exact layout."""

import gzip
import io
import json
import random
import stat
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inpo.common.errors import DataError
from inpo.common.pairs import Pair, Skipped, archive, archives, open_source

Members = list[tuple[str, bytes]]


def tar_of(members: Members, *, format: int = tarfile.GNU_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def zip_of(members: Members, how: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", how) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return stream.getvalue()


def cut(data: bytes, count: int) -> list[bytes]:
    """In pieces of one size but the last, which end anywhere, also within a header."""
    size = len(data) // count + 7
    return [data[begin : begin + size] for begin in range(0, len(data), size)]


def noise(seed: int, size: int = 3000) -> bytes:
    return random.Random(seed).randbytes(size)


def read(path: Path | str, **how: Any) -> list[Pair | Skipped]:
    (shard,) = open_source(str(path), **how).shards
    return list(shard.rows(0, shard.num_rows))


def ask(folder: Path, *names: str, **how: Any) -> list[Pair | Skipped]:
    """What rows with these images give."""
    rows = [{"win": name, "lose": name, "prompt": "p", "id": str(i)} for i, name in enumerate(names)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read(folder / "pairs.jsonl", **how)


def test_hpdv3_plus_plus_a_tar_in_pieces(tmp_path: Path) -> None:
    members = [(f"images/qwen_image/prompt_{i:06d}/{j}.jpg", noise(2 * i + j)) for i in range(9) for j in range(2)]
    rows = [{"prompt": f"p{i}", "path1": members[2 * i + 1][0], "path2": members[2 * i][0]} for i in range(9)]
    (tmp_path / "train_aes.json").write_text(json.dumps(rows))
    for number, piece in enumerate(cut(tar_of(members), 5)):
        (tmp_path / f"images.tar.parta{'abcdef'[number]}").write_bytes(piece)
    (tmp_path / "images.tar.parts.sha256").write_text("0123")
    before = sorted(tmp_path.iterdir())
    found = read(tmp_path / "train_aes.json")
    assert [(item.win, item.lose) for item in found if isinstance(item, Pair)] == [
        (noise(2 * i + 1), noise(2 * i)) for i in range(9)
    ]
    assert sorted(tmp_path.iterdir()) == before  # nothing is unpacked
    (tmp_path / "images.tar.partac").unlink()
    with pytest.raises(
        DataError, match=r"(?s)archive of images cannot be read.*between images.tar.partab and .*partad"
    ):
        read(tmp_path / "train_aes.json")


def test_hpdv3_a_compressed_tar_in_pieces_is_named_until_it_is_one_tar(tmp_path: Path) -> None:
    row = {"prompt": "p", "path1": "images/a.jpg", "path2": "images/b.jpg", "confidence": 0.9, "choice_dist": [3, 1]}
    (tmp_path / "train.json").write_text(json.dumps([row]))
    tar = tar_of([("images/a.jpg", noise(1)), ("images/b.jpg", noise(2))])
    for number, piece in enumerate(cut(gzip.compress(tar), 3)):
        (tmp_path / f"images.tar.gz.{number:02d}").write_bytes(piece)
    (skipped,) = read(tmp_path / "train.json")
    assert isinstance(skipped, Skipped)
    assert skipped.reason == "missing_image"
    assert "compressed archives are not looked into (images.tar.gz.00)" in skipped.detail
    (tmp_path / "images.tar").write_bytes(tar)  # cat images.tar.gz.* | gunzip > images.tar
    (item,) = read(tmp_path / "train.json")
    assert isinstance(item, Pair)
    assert (item.win, item.lose, item.label) == (noise(1), noise(2), 0.75)


def test_image_reward_db_zips_in_a_folder_of_each_split(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    (tmp_path / "images" / "train").mkdir(parents=True)
    for part in (1, 2):
        names = [f"{part}-{i}.webp" for i in range(3)]
        zipped = [(name, noise(10 * part + i)) for i, name in enumerate(names)]
        data = zip_of([*zipped, (f"train_{part}.json", b"[]")])
        (tmp_path / "images" / "train" / f"train_{part}.zip").write_bytes(data)
        told = {"prompt_id": f"00{part}", "prompt": f"p{part}", "classification": "People", "overall_rating": 4}
        rows += [
            told | {"image_path": f"images/train/train_{part}/{name}", "rank": i + 1} for i, name in enumerate(names)
        ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata-train.parquet")
    (tmp_path / "metadata-train.json").write_text(json.dumps(rows))
    expected = [(noise(10 * part + i), noise(10 * part + j)) for part in (1, 2) for i, j in ((0, 1), (0, 2), (1, 2))]
    for name in ("metadata-train.parquet", "metadata-train.json"):
        found = read(tmp_path / name)
        assert [(item.win, item.lose) for item in found if isinstance(item, Pair)] == expected
        assert [item.list for item in found if isinstance(item, Pair)] == ["001"] * 3 + ["002"] * 3


@pytest.mark.parametrize("packed", [False, True])
def test_hpdv2_images_in_a_folder_of_the_lists_name(tmp_path: Path, packed: bool) -> None:
    row = {"prompt": "p", "image_path": ["000904.jpg", "000905.jpg"], "rank": [2, 1], "raw_annotation": []}
    (tmp_path / "test.json").write_text(json.dumps([row]))
    data = tar_of([(f"test/{name}", noise(i)) for i, name in enumerate(row["image_path"])])
    (tmp_path / "test.tar").write_bytes(data)
    if not packed:
        with tarfile.open(tmp_path / "test.tar") as tar:
            tar.extractall(tmp_path, filter="data")
        (tmp_path / "test.tar").unlink()
    (item,) = read(tmp_path / "test.json")
    assert isinstance(item, Pair)
    assert (item.win, item.lose) == (noise(1), noise(0))


@pytest.mark.parametrize("seed", range(6))
def test_every_member_is_what_unpacking_gives(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    folders = ["", "./", "images/", "images/ü b/", "x" * 120 + "/"]
    members = [(f"{draw.choice(folders)}{i}.png", noise(i, draw.randrange(1, 5000))) for i in range(12)]
    kind = draw.choice(["tar", "zip"])
    make: dict[str, Callable[[], bytes]] = {
        "tar": lambda: tar_of(members, format=draw.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])),
        "zip": lambda: zip_of(members, draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])),
    }
    data, (packed, unpacked) = make[kind](), (tmp_path / "packed", tmp_path / "unpacked")
    packed.mkdir()
    unpacked.mkdir()
    endings = draw.choice([[""], [".001", ".002", ".003"], [".aa", ".ab"], ["-part0", "-part1"]])
    for ending, piece in zip(endings, cut(data, len(endings)) if len(endings) > 1 else [data], strict=True):
        (packed / f"set.{kind}{ending}").write_bytes(piece)
    for name, content in members:
        (unpacked / name).parent.mkdir(parents=True, exist_ok=True)
        (unpacked / name).write_bytes(content)
    names = [name for name, _ in members] + ["images/gone.png"]
    by_hand = ask(unpacked, *names)
    assert ask(packed, *names)[:-1] == by_hand[:-1]
    assert isinstance(ask(packed, "images/gone.png")[0], Skipped)
    in_folder = ask(packed, *(f"set/{name}" for name, _ in members), *(f"set.{kind}/{name}" for name, _ in members))
    assert [getattr(item, "win", item) for item in in_folder] == 2 * [content for _, content in members]


def test_names_that_lead_elsewhere_and_links_are_no_images(tmp_path: Path) -> None:
    folder = tmp_path / "list"
    folder.mkdir()
    with tarfile.open(folder / "set.tar", "w") as tar:
        for name in ("/abs.png", "../up.png", "a/../../up2.png", "ok.png"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"T"))
        for name, target in (("soft.png", "/etc/hostname"), ("hard.png", "ok.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = (tarfile.SYMTYPE, target) if name == "soft.png" else (tarfile.LNKTYPE, target)
            tar.addfile(info)
        device = tarfile.TarInfo("device.png")
        device.type = tarfile.CHRTYPE
        tar.addfile(device)
    link = zipfile.ZipInfo("zlink.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(folder / "other.zip", "w") as archive:
        archive.writestr(link, "/etc/hostname")
        archive.writestr("../zup.png", b"Z")
    outside = ask(folder, "/abs.png", "../up.png", "a/../../up2.png", "../zup.png")
    assert [getattr(item, "reason", "pair") for item in outside] == ["not_allowed"] * 4
    inside = ask(folder, "abs.png", "up.png", "up2.png", "zup.png", "soft.png", "hard.png", "device.png", "zlink.png")
    assert [getattr(item, "reason", "pair") for item in inside] == ["missing_image"] * 8
    assert all("is a link or the like" in item.detail for item in inside[4:] if isinstance(item, Skipped))
    assert isinstance(ask(folder, "ok.png")[0], Pair)
    # An archive outside the list's folder is one of another owner.
    (folder / "ok.png").unlink(missing_ok=True)
    (folder / "set.tar").rename(tmp_path / "set.tar")
    (folder / "set.tar").symlink_to(tmp_path / "set.tar")
    assert [getattr(item, "reason", "pair") for item in ask(folder, "ok.png")] == ["missing_image"]
    assert isinstance(ask(folder, "ok.png", allow_remote=True)[0], Pair)


def test_an_image_that_is_there_twice_is_refused_and_a_file_comes_first(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of([("0.png", b"A"), ("1.png", b"A"), ("2.png", b"A"), ("2.png", b"B")]))
    (tmp_path / "b.zip").write_bytes(zip_of([("0.png", b"B"), ("1.png", b"B")]))
    (tmp_path / "1.png").write_bytes(b"F")
    both, file, twice = ask(tmp_path, "0.png", "1.png", "2.png")
    assert isinstance(both, Skipped)
    assert "0.png is in a.tar and b.zip: keep one" in both.detail
    assert isinstance(file, Pair)
    assert file.win == b"F"
    assert isinstance(twice, Skipped)
    assert "in a.tar is there twice" in twice.detail
    (own,) = ask(tmp_path, "b/0.png")  # by the archive's own name
    assert isinstance(own, Pair)
    assert own.win == b"B"


def test_a_damaged_archive_fails_the_shard_and_a_damaged_member_its_row(tmp_path: Path) -> None:
    tar = tar_of([("0.png", noise(0)), ("1.png", noise(1))])
    (tmp_path / "a.tar").write_bytes(tar[:4000])
    with pytest.raises(DataError, match=r"(?s)archive of images cannot be read.*a\.tar.*ends early"):
        ask(tmp_path, "0.png")
    (tmp_path / "a.tar").write_bytes(gzip.compress(tar))
    with pytest.raises(DataError, match=r"(?s)a\.tar.*gzip data"):
        ask(tmp_path, "0.png")
    (tmp_path / "a.tar").unlink()
    for how in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        data = bytearray(zip_of([("0.png", bytes(3000)), ("1.png", noise(1))], how))
        data[data.index(b"0.png") + 10] ^= 0xFF
        (tmp_path / "b.zip").write_bytes(data)
        bad, good = ask(tmp_path, "0.png", "1.png")
        assert isinstance(bad, Skipped)
        assert "in b.zip is damaged" in bad.detail
        assert isinstance(good, Pair)
    data = bytearray(zip_of([("0.png", noise(0))]))
    data[data.index(b"PK\x01\x02") + 8] |= 1  # says that it is encrypted
    (tmp_path / "b.zip").write_bytes(data)
    (locked,) = ask(tmp_path, "0.png")
    assert isinstance(locked, Skipped)
    assert "is encrypted" in locked.detail
    (tmp_path / "b.zip").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(DataError, match=r"b\.zip"):
        ask(tmp_path, "0.png")


def test_no_member_is_read_beyond_the_limit_of_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 1 << 16
    monkeypatch.setattr(archive, "MAX_IMAGE_BYTES", limit)
    large, small = bytes(limit + 1), bytes(limit)
    (tmp_path / "a.tar").write_bytes(tar_of([("t.png", large)]))
    bomb = bytearray(zip_of([("z.png", large), ("lies.png", large), ("at.png", small)]))
    for mark, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):  # the second member says that it has one byte
        at = bomb.index(mark, bomb.index(mark) + 1) + place
        bomb[at : at + 4] = (1).to_bytes(4, "little")
    (tmp_path / "b.zip").write_bytes(bomb)
    found = ask(tmp_path, "t.png", "z.png", "lies.png", "at.png")
    assert [getattr(item, "reason", "pair") for item in found] == ["too_large", "too_large", "missing_image", "pair"]
    endless = tarfile.TarInfo("long")
    endless.type, endless.size = tarfile.XHDTYPE, 1 << 40
    (tmp_path / "a.tar").write_bytes(endless.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(DataError, match=f"a header of {1 << 40} bytes"):
        ask(tmp_path, "0.png")
    (tmp_path / "a.tar").unlink()
    monkeypatch.setattr(archive, "MAX_MEMBERS", 2)
    (tmp_path / "c.zip").write_bytes(zip_of([(f"{i}.png", b"x") for i in range(3)]))
    with pytest.raises(DataError, match="more than 2 members"):
        ask(tmp_path, "0.png")


def test_an_archive_is_gone_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [(f"{i}.png", noise(i, 50)) for i in range(300)]
    whole = tar_of(members)
    (tmp_path / "set.tar").write_bytes(whole)
    opened: list[object] = []
    original = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *a, **k: opened.append(k) or original(*a, **k))
    assert all(isinstance(item, Pair) for item in ask(tmp_path, *(name for name, _ in members)))
    assert isinstance(ask(tmp_path, "7.png")[0], Pair)
    assert len(opened) == 1
    (tmp_path / "damaged.tar").write_bytes(whole[:4000])  # cannot be read, and has nothing that is needed
    assert all(isinstance(item, Pair) for item in ask(tmp_path, *(name for name, _ in members)))
    assert len(opened) == 2
    (tmp_path / "set.tar").write_bytes(tar_of([("7.png", b"new and of another size")]))
    (changed,) = ask(tmp_path, "7.png")
    assert isinstance(changed, Pair)
    assert changed.win == b"new and of another size"


def test_a_member_is_found_without_going_through_the_others(tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_bytes(zip_of([(f"{i}.png", b"x") for i in range(5000)], zipfile.ZIP_STORED))
    assert isinstance(ask(tmp_path, "7.png")[0], Pair)  # its members are known from here on
    beside = archives.Archives(root=str(tmp_path), allowed=lambda file: True)
    assert beside.find("8.png") is not None
    tracemalloc.start()
    try:
        assert beside.find("9.png") is not None
        assert tracemalloc.get_traced_memory()[1] < 5000 * 8 // 2  # of the 5000 keys no copy was made
    finally:
        tracemalloc.stop()


def test_a_zip_at_an_address_is_read_by_ranges(tmp_path: Path) -> None:
    row = {"win": "images/0.png", "lose": "images/1.png", "prompt": "p"}
    data = zip_of([("0.png", noise(0)), ("1.png", noise(1))])
    elsewhere = fsspec.filesystem("memory")
    elsewhere.pipe({"/zipped/pairs.jsonl": json.dumps(row).encode(), "/zipped/images.zip": data})
    try:
        (item,) = read("memory://zipped")
        assert isinstance(item, Pair)
        assert (item.win, item.lose) == (noise(0), noise(1))
    finally:
        elsewhere.rm("/zipped", recursive=True)


@pytest.mark.parametrize(
    ("error", "reasons"),
    [
        (PermissionError("no listing"), ["pair", "missing_image"]),
        (ConnectionResetError("in trouble"), ["pair", "unreachable"]),
    ],
)
def test_an_image_that_may_be_in_an_archive_is_not_said_to_be_missing(
    monkeypatch: pytest.MonkeyPatch, error: OSError, reasons: list[str]
) -> None:
    rows = [{"win": name, "lose": name, "prompt": "p"} for name in ("here.png", "images/0.png")]
    elsewhere = fsspec.filesystem("memory")
    listed = "".join(json.dumps(row) + "\n" for row in rows).encode()
    elsewhere.pipe({"/asked/pairs.jsonl": listed, "/asked/here.png": b"x"})
    (shard,) = open_source("memory://asked/pairs.jsonl").shards

    def fail(self: object, path: str) -> bool:
        raise error

    try:
        monkeypatch.setattr(type(elsewhere), "isdir", fail)
        assert [getattr(item, "reason", "pair") for item in shard.rows(0, 2)] == reasons
    finally:
        monkeypatch.undo()
        elsewhere.rm("/asked", recursive=True)
