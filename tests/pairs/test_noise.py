"""The noise that images were made from, as files of a source: read where it is asked for, in every container."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inpo.common.pairs import Pair, Skipped, open_source
from inpo.common.pairs.noise import decode_noise
from inpo.data.pack import pack

FIRST, SECOND = np.arange(12, dtype=np.float32).reshape(3, 2, 2), np.ones((3, 2, 2), np.float32)


def npy(values: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, **options)
    return stream.getvalue()


def rows_of(location: object, *, with_noise: bool = True) -> list[Pair | Skipped]:
    source = open_source(str(location), with_noise=with_noise)
    return [item for shard in source.shards for item in shard.rows(0, shard.num_rows)]


def write_list(folder: Path) -> Path:
    """The second image is the better one: of a pair with two fields, a pair with a list, and a ranking."""
    for name, data in {"a.png": b"1", "b.png": b"2", "a.npy": npy(FIRST), "b.npy": npy(SECOND)}.items():
        (folder / name).write_bytes(data)
    pair = {"image1": "a.png", "image2": "b.png", "label_0": 0, "label_1": 1, "prompt": "p"}
    rows = [
        pair | {"id": "fields", "noise_image1": "a.npy", "noise_image2": "b.npy"},
        pair | {"id": "list", "noises": ["a.npy", "b.npy"]},
        {"images": ["a.png", "b.png"], "rank": [2, 1], "prompt": "p", "id": "r", "noises": ["a.npy", "b.npy"]},
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def write_parquet(folder: Path) -> Path:
    columns = {"win": [b"2"], "lose": [b"1"], "prompt": ["p"], "noise_win": [npy(SECOND)], "noise_lose": [npy(FIRST)]}
    pq.write_table(pa.table(columns), folder / "pairs.parquet")
    return folder / "pairs.parquet"


def write_tar(folder: Path) -> Path:
    members = {"win.png": b"2", "lose.png": b"1", "json": b'{"prompt": "p", "noises": ["elsewhere.npy"]}'}
    members |= {"noise_win.npy": npy(SECOND), "noise_lose.npy": npy(FIRST)}
    with tarfile.open(folder / "pairs.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(f"0.{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return folder / "pairs.tar"


@pytest.mark.parametrize("write", [write_list, write_parquet, write_tar])
def test_every_container_has_it_and_packing_keeps_it(tmp_path: Path, write: Any) -> None:
    where = write(tmp_path)
    for group, count in ((False, 0), (True, 1)):
        packed = tmp_path / f"packed{count}"
        named = [("shard", item) for item in rows_of(where)]
        pack(iter(named), output=packed, pairs_per_tar=10, by_prompt=group)
        for pairs in (rows_of(where), rows_of(packed)):
            assert len(pairs) == len(named)
            for pair in pairs:
                assert isinstance(pair, Pair), pair
                assert (pair.win, pair.lose) == (b"2", b"1")
                assert pair.noise is not None
                np.testing.assert_array_equal(decode_noise(pair.noise[0]), SECOND)
                np.testing.assert_array_equal(decode_noise(pair.noise[1]), FIRST)


@pytest.mark.parametrize("write", [write_list, write_parquet, write_tar])
def test_it_is_not_read_where_nobody_asks(tmp_path: Path, write: Any) -> None:
    where = write(tmp_path)
    for file in tmp_path.glob("*.npy"):
        file.unlink()
    for pair in rows_of(where, with_noise=False):
        assert isinstance(pair, Pair), pair
        assert pair.noise is None
    (shard, *_) = open_source(str(where)).shards
    assert "noise" not in str([name for name in shard.not_read if "noises" not in name])


def test_a_row_whose_noise_is_missing_says_so(tmp_path: Path) -> None:
    write_list(tmp_path)
    (tmp_path / "a.npy").unlink()
    (tmp_path / "b.npy").write_bytes(b"")
    found = rows_of(tmp_path)
    assert [(item.reason, type(item)) for item in found if isinstance(item, Skipped)] == [
        ("missing_noise", Skipped)
    ] * 3
    rows = [{"win": "a.png", "lose": "b.png", "prompt": "p", "noises": value} for value in (["a.npy"], "a.npy", 3)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [item.reason for item in rows_of(tmp_path) if isinstance(item, Skipped)] == ["bad_metadata"] * 3


@pytest.mark.parametrize("write", ["parquet", "list"])
def test_a_row_whose_noise_is_null_has_none_and_keeps_its_seeds(tmp_path: Path, write: str) -> None:
    """As where a column of noise holds that of some rows, and others have seeds alone."""
    write_list(tmp_path)
    (tmp_path / "pairs.jsonl").unlink()
    row = {"win": "b.png", "lose": "a.png", "prompt": "p", "seeds": [1, 2]}
    rows = [row | {"noise_win": "b.npy", "noise_lose": "a.npy"}, row | {"noise_win": None, "noise_lose": None}]
    if write == "list":
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    first, second = rows_of(tmp_path)
    assert isinstance(first, Pair)
    assert isinstance(second, Pair)
    assert first.noise is not None
    assert (second.noise, second.seeds) == (None, (1, 2))


@pytest.mark.parametrize(
    ("images", "noise"),
    [
        (("image1", "image2"), {"noise_win": "a.npy", "noise_lose": "b.npy"}),
        (("win", "lose"), {"noise_image1": "a.npy", "noise_image2": "b.npy"}),
        (("win", "lose"), {"noise_win": "a.npy", "noise_lose": "b.npy", "noises": ["b.npy", "a.npy"]}),
    ],
)
def test_noise_that_may_be_of_either_image_is_refused(
    tmp_path: Path, images: tuple[str, str], noise: dict[str, Any]
) -> None:
    """The second image is the better one of the first row: which of the two `noise_win` is of, nobody knows."""
    write_list(tmp_path)
    row = {images[0]: "a.png", images[1]: "b.png", "prompt": "p"} | noise
    labels = {"label_0": 0, "label_1": 1} if images[0] == "image1" else {}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row | labels))
    (found,) = rows_of(tmp_path)
    assert isinstance(found, Skipped)
    assert found.reason == "bad_metadata"
    assert "the noise is given as" in found.detail


def _header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no .npy file"),
        (b"\x89PNG", "no .npy file"),
        (npy(FIRST)[:60], "no .npy file"),
        (npy(FIRST)[:-1], "of 47 bytes"),
        (npy(FIRST) + b"0", "of 49 bytes"),
        (npy(np.array([{"a": 1}], dtype=object), allow_pickle=True), "of dtype object"),
        (npy(FIRST.astype(np.int32)), "of dtype int32"),
        (npy(np.asfortranarray(FIRST)), "Fortran"),
        (npy(FIRST[0]), "of shape"),
        (npy(np.full((1, 1, 1), np.nan, np.float32)), "NaN"),
        (_header("{'descr': '<f4', 'fortran_order': False, 'shape': (100000, 100000, 100000), }\n"), "of 0 bytes"),
        (_header("{'descr': '<f4', 'fortran_order': False, 'shape': __import__('os').getcwd(), }\n"), "no .npy file"),
        (_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -4, 1), }\n") + bytes(16), "of shape"),
    ],
)
def test_what_is_no_noise_is_refused_in_words(data: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decode_noise(data)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
def test_what_is_noise(dtype: str) -> None:
    np.testing.assert_array_equal(decode_noise(npy(FIRST.astype(dtype))), FIRST)
    np.testing.assert_array_equal(decode_noise(npy(FIRST.astype(dtype)[None])), FIRST)
