"""The two forms pairs are written in: parquet with the columns of Pick-a-Pic v2, and webdataset tars.

    parquet/pairs-00000.parquet       jpg_0, jpg_1, label_0, label_1, has_label, caption, ranking_id, image uids
    webdataset/pairs-00000.tar        <key>.win.png  <key>.lose.png  <key>.json {prompt, label, id}

One file per part, in one row group. The pictures are PNG in both, as JPEG would smear 64 pixels; the columns keep the
published names. The same pair carries the same id: the parquet's ranking_id, the tar's key.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset

from inpo.common.durable import new_file

SCHEMA = pa.schema(
    {
        "jpg_0": pa.binary(),
        "jpg_1": pa.binary(),
        "label_0": pa.float64(),
        "label_1": pa.float64(),
        "has_label": pa.bool_(),
        "caption": pa.string(),
        "ranking_id": pa.int64(),
        "image_0_uid": pa.string(),
        "image_1_uid": pa.string(),
        "best_image_uid": pa.string(),
    }
)


@dataclass(frozen=True, kw_only=True)
class LabelledPair:
    """Two pictures for one caption and which of them is preferred."""

    index: int
    caption: str
    pictures: tuple[bytes, bytes]
    """PNG files."""
    picture_ids: tuple[str, str]
    label_0: float
    """1.0 when the first picture is preferred, 0.0 when the second is, 0.5 for a tie."""
    flipped: bool
    """The label says the opposite of what the oracle thinks."""


def write_parquet(pairs: Sequence[LabelledPair], file: Path) -> None:
    """Writes one part as a parquet file with one row group."""
    rows = [_row(pair) for pair in pairs]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    with new_file(file) as path:
        pq.write_table(table, path, row_group_size=len(pairs))


def _row(pair: LabelledPair) -> dict[str, Any]:
    best = "tie" if pair.label_0 == 0.5 else pair.picture_ids[0 if pair.label_0 == 1 else 1]
    return {
        "jpg_0": pair.pictures[0],
        "jpg_1": pair.pictures[1],
        "label_0": pair.label_0,
        "label_1": 1 - pair.label_0,
        "has_label": True,
        "caption": pair.caption,
        "ranking_id": pair.index,
        "image_0_uid": pair.picture_ids[0],
        "image_1_uid": pair.picture_ids[1],
        "best_image_uid": best,
    }


def write_webdataset(pairs: Sequence[LabelledPair], file: Path) -> None:
    """Writes one part as a tar; the preferred picture is `win`, and a tie keeps its order with label 0.5."""
    with (
        new_file(file) as path,
        path.open("wb") as stream,
        webdataset.TarWriter(stream, user="", group="", mtime=0, encoder=False) as tar,
    ):
        for pair in pairs:
            win, lose = reversed(pair.pictures) if pair.label_0 == 0 else pair.pictures
            text = {"prompt": pair.caption, "label": max(pair.label_0, 1 - pair.label_0), "id": str(pair.index)}
            tar.write(
                {"__key__": f"{pair.index:06d}", "win.png": win, "lose.png": lose, "json": json.dumps(text).encode()}
            )


WRITERS: dict[str, Callable[[Sequence[LabelledPair], Path], None]] = {
    "parquet": write_parquet,
    "webdataset": write_webdataset,
}
_SUFFIXES = {"parquet": "parquet", "webdataset": "tar"}


def part_file(folder: Path, format: str, part: int) -> Path:
    """Where a part lies in a folder of pairs."""
    return folder / format / f"pairs-{part:05d}.{_SUFFIXES[format]}"
