"""A file that is written again after its rows were found: no row of it is read by where the old rows were."""

import io
import os
import pickle
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from inpo.common.errors import DataError
from inpo.common.pairs import InputShard, Pair, open_source
from tests.pairs.lists import array, as_csv, as_lines, parquet, read, said, struct

Write = Callable[[Path, list[dict[str, Any]]], Path]
ROWS = [{"win": "images/a.png", "lose": "images/b.png", "prompt": f"red {i}", "id": str(i)} for i in range(3)]
EXCHANGED = [row | {"win": row["lose"], "lose": row["win"], "prompt": f"not {row['id']}"} for row in ROWS]
"""As many bytes."""


def as_tar(folder: Path, rows: list[dict[str, Any]]) -> Path:
    with tarfile.open(folder / "any.tar", "w") as tar:
        for row in rows:
            members = {f"{side}.png": (folder / row[side]).read_bytes() for side in ("lose", "win")}
            for name, data in (members | {"txt": row["prompt"].encode()}).items():
                info = tarfile.TarInfo(f"{row['id']}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder / "any.tar"


def as_parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    return parquet(folder, [row | {side: struct(Path(row[side]).name) for side in ("win", "lose")} for row in rows])


def write_again(write: Write, folder: Path, rows: list[dict[str, Any]]) -> None:
    """Later, whatever the grain of this file system's times."""
    file = write(folder, rows)
    told = file.stat()
    os.utime(file, ns=(told.st_atime_ns, told.st_mtime_ns + 10_000_000_000))


@pytest.mark.parametrize("write", [as_tar, as_parquet, as_lines, as_csv, array])
def test_rows_are_those_that_were_found_or_an_error(write: Write, folder: Path) -> None:
    path = write(folder, ROWS)
    size = path.stat().st_size
    (shard,) = open_source(str(path)).shards
    before = shard.fingerprint()
    assert [said(item) for item in shard.rows(0, 3)] == ["AB"] * 3
    begun: Iterator[object] = shard.rows(0, 3)
    next(begun)
    write_again(write, folder, EXCHANGED)
    assert path.stat().st_size == size
    elsewhere: InputShard = pickle.loads(pickle.dumps(shard))  # as another process has it
    for each in (shard, elsewhere):
        for ask in (each.rows, each.prompts):
            with pytest.raises(DataError, match="This file was written again") as caught:
                list(ask(1, 2))
            assert caught.value.where == str(path)
    with pytest.raises(DataError, match="This file was written again"):
        list(begun)
    found = read(path)
    assert [said(item) for item in found] == ["BA"] * 3
    assert [item.prompt for item in found if isinstance(item, Pair)] == ["not 0", "not 1", "not 2"]
    (anew,) = open_source(str(path)).shards
    assert anew.fingerprint() != before


def test_a_file_at_an_address(folder: Path) -> None:
    store = fsspec.filesystem("memory")
    try:
        store.pipe_file("/again/any.tar", as_tar(folder, ROWS).read_bytes())
        (shard,) = open_source("memory://again/any.tar").shards
        assert [said(item) for item in shard.rows(0, 3)] == ["AB"] * 3
        store.pipe_file("/again/any.tar", as_tar(folder, EXCHANGED).read_bytes())
        with pytest.raises(DataError, match="This file was written again"):
            list(shard.rows(0, 3))
    finally:
        store.store.clear()


def test_a_tar_of_images_beside_a_list(folder: Path) -> None:
    def pack(_: Path, rows: list[dict[str, Any]]) -> Path:
        with tarfile.open(folder / "set.tar", "w") as tar:
            for row in rows:
                tar.add(folder / "images/a.png", row["win"])
                tar.add(folder / "images/b.png", row["lose"])
        return folder / "set.tar"

    named = {"win": "1.png", "lose": "2.png", "prompt": "p", "id": "x"}
    pack(folder, [named])
    (shard,) = open_source(str(as_lines(folder, [named, named | {"id": "y"}]))).shards
    rows = shard.rows(0, 2)
    assert said(next(rows)) == "AB"
    write_again(pack, folder, [{"win": "2.png", "lose": "1.png"}])
    with pytest.raises(DataError, match="This file was written again"):
        next(rows)
    assert [said(item) for item in shard.rows(0, 2)] == ["BA"] * 2
