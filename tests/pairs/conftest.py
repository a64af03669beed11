"""Builders for small pair sources, made with tarfile, pyarrow and Pillow directly, not with the code under test."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.pairs.lists import FILES

PickRow = dict[str, object]


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    """encoded(seed, size=(w, h), format=...): a small image file of random pixels."""

    def build(seed: int = 0, size: tuple[int, int] = (8, 8), format: str = "PNG") -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, format=format)
        return stream.getvalue()

    return build


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, list[tuple[str, bytes]]], Path]:
    """write_tar(path, [(member name, bytes), ...]) in the order given."""

    def build(path: Path, members: list[tuple[str, bytes]]) -> Path:
        with tarfile.open(path, "w") as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return build


PICK_SCHEMA = pa.schema(
    [
        ("are_different", pa.bool_()),
        ("best_image_uid", pa.string()),
        ("caption", pa.string()),
        ("has_label", pa.bool_()),
        ("image_0_uid", pa.string()),
        ("image_1_uid", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("ranking_id", pa.int64()),
        ("user_id", pa.int64()),
    ]
)


@pytest.fixture(scope="session")
def pick_row(encoded: Callable[..., bytes]) -> Callable[..., PickRow]:
    """pick_row(i, **changes): row i of a Pick-a-Pic v2 file, image 0 preferred."""

    def build(i: int, **changes: object) -> PickRow:
        row: PickRow = {
            "are_different": True,
            "best_image_uid": f"uid-{i}-0",
            "caption": f"caption {i}",
            "has_label": True,
            "image_0_uid": f"uid-{i}-0",
            "image_1_uid": f"uid-{i}-1",
            "jpg_0": encoded(2 * i),
            "jpg_1": encoded(2 * i + 1),
            "label_0": 1.0,
            "label_1": 0.0,
            "ranking_id": 1000 + i,
            "user_id": 7,
        }
        return row | changes

    return build


@pytest.fixture(scope="session")
def write_parquet() -> Callable[..., Path]:
    """write_parquet(path, rows, row_group_size=..., drop=columns): a file as Pick-a-Pic v2 publishes them."""

    def build(path: Path, rows: list[PickRow], row_group_size: int = 4, drop: tuple[str, ...] = ()) -> Path:
        table = pa.Table.from_pylist(rows, schema=PICK_SCHEMA)
        pq.write_table(table.drop_columns(list(drop)), path, row_group_size=row_group_size)
        return path

    return build


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name, data in FILES.items():
        (tmp_path / "images" / name).write_bytes(data)
    return tmp_path
