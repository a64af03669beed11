"""Lists of pairs and of rankings over nine little files, in the containers they come in."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from inpo.common.pairs import Pair, Skipped, open_source

FILES = {f"{letter}.png": letter.upper().encode() for letter in "abcdefghi"}


def struct(name: str) -> dict[str, Any]:
    """An image as the datasets library stores it."""
    return {"bytes": FILES[name], "path": name}


def parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
    return folder / "train-00000-of-00001.parquet"


def array(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "train.json").write_text(json.dumps(rows))
    return folder / "train.json"


def as_csv(folder: Path, rows: list[dict[str, Any]]) -> Path:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    (folder / "any.csv").write_text(stream.getvalue())
    return folder / "any.csv"


def as_lines(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "any.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "any.jsonl"


def read(path: Path, **how: Any) -> list[Pair | Skipped]:
    """All rows; any range of them is that part of all."""
    (shard,) = open_source(str(path), **how).shards
    found = list(shard.rows(0, shard.num_rows))
    assert [item.row for item in found] == list(range(shard.num_rows))
    for start in range(len(found)):
        assert list(shard.rows(start, start + 2)) == found[start : start + 2]
    prompts = {item.prompt for item in found if isinstance(item, Pair)}
    assert prompts <= set(shard.prompts(0, shard.num_rows))
    return found


def said(item: Pair | Skipped) -> str:
    return item.reason if isinstance(item, Skipped) else (item.win + item.lose).decode()
