"""The prompts of a source, read without its images."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inpo.common.pairs import Pair, open_source

IMAGE = bytes(range(256)) * 6000
ROWS = 12


def _write_tar(folder: Path) -> str:
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for row in range(ROWS):
            fields = json.dumps({"id": f"id-{row}", "prompt": f"a prompt {row}", "label": 1.0}).encode()
            for suffix, data in (("win.png", IMAGE), ("json", fields), ("lose.png", IMAGE)):
                info = tarfile.TarInfo(f"{row:05d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(folder)


def _write_parquet(folder: Path) -> str:
    table = {
        "win": [IMAGE[row:] for row in range(ROWS)],  # not equal, or the file would hold one of them
        "lose": [IMAGE[100 + row :] for row in range(ROWS)],
        "prompt": [f"a prompt {row}" for row in range(ROWS)],
        "id": [f"id-{row}" for row in range(ROWS)],
    }
    pq.write_table(pa.table(table), folder / "pairs.parquet", compression="none", use_dictionary=False)
    return str(folder)


def _write_two_layouts(folder: Path) -> str:
    """Some rows have win and lose, others jpg_0 and jpg_1, as when two sources were put together."""

    def cells(start: int, *, ours: bool) -> list[bytes | None]:
        return [IMAGE[start + row :] if (row % 2 == 0) == ours else None for row in range(ROWS)]

    images = {
        name: cells(100 * number, ours=number < 2) for number, name in enumerate(("win", "lose", "jpg_0", "jpg_1"))
    }
    texts = {"prompt": [f"a prompt {row}" for row in range(ROWS)], "label_0": [1.0] * ROWS}
    pq.write_table(pa.table(images | texts), folder / "pairs.parquet", compression="none", use_dictionary=False)
    return str(folder)


def _write_rankings(folder: Path) -> str:
    """Three images a row of the file: three pairs."""
    table = {
        "images": [[IMAGE[row + number :] for number in range(3)] for row in range(ROWS // 3)],
        "ranks": [[2, 1, 3]] * (ROWS // 3),
        "prompt": [f"a prompt {row}" for row in range(ROWS // 3)],
    }
    pq.write_table(pa.table(table), folder / "pairs.parquet", compression="none", use_dictionary=False)
    return str(folder)


def _write_list(folder: Path) -> str:
    for name in ("win.png", "lose.png"):
        (folder / name).write_bytes(IMAGE)
    rows = [
        {"win": "win.png", "lose": "lose.png", "prompt": f"a prompt {row}", "id": f"id-{row}"} for row in range(ROWS)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def _bytes_read() -> int:
    """By this process so far, from any file."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("write", [_write_tar, _write_parquet, _write_two_layouts, _write_rankings, _write_list])
def test_prompts_are_read_without_the_images(tmp_path: Path, write: Callable[[Path], str]) -> None:
    """All that the pairs have, also of a part of the rows, for less than two images' bytes."""
    (shard,) = open_source(write(tmp_path)).shards
    assert shard.num_rows == ROWS
    before = _bytes_read()
    told = list(shard.prompts(2, ROWS))
    without = _bytes_read() - before
    pairs = [item for item in shard.rows(2, ROWS) if isinstance(item, Pair)]
    with_images = _bytes_read() - before - without
    assert len(pairs) == ROWS - 2
    assert list(dict.fromkeys(told)) == list(dict.fromkeys(pair.prompt for pair in pairs))
    assert without < 2 * len(IMAGE) < 10 * len(IMAGE) < with_images


def test_rows_that_give_no_pair_do_not_hide_the_prompts_of_others(tmp_path: Path) -> None:
    rows = [
        {"win": "win.png", "lose": "lose.png", "prompt": "a prompt"},
        {"win": "win.png", "lose": None, "prompt": "without an image"},
        {"win": "win.png", "lose": "lose.png"},
        {"win": "win.png", "lose": "lose.png", "prompt": "one", "caption": "another"},
        {"win": "win.png", "lose": "lose.png", "prompt": "the last"},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "no JSON\n")
    (shard,) = open_source(str(tmp_path)).shards
    assert {"a prompt", "the last"} <= set(shard.prompts(0, shard.num_rows))
