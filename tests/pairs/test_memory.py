"""Streaming and decoding a source larger than the memory it may use, measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

# Images of noise: about 150 kB each as JPEG. A few are drawn, and the row number follows the end of each file, where
# decoders do not look, so that no two are equal.
IMAGES = """
import io, sys
import numpy as np
from PIL import Image

draw = np.random.default_rng(0)
images = []
for _ in range(8):
    stream = io.BytesIO()
    Image.fromarray(draw.integers(0, 256, (512, 512, 3), dtype=np.uint8)).save(stream, "JPEG", quality=75)
    images.append(stream.getvalue())
image = lambda row, shift: images[(row + shift) % 8] + row.to_bytes(8, "little")
path, num_rows = sys.argv[1], int(sys.argv[2])
"""
WRITE_TAR = """
import json, tarfile

with tarfile.open(path, "w") as tar:
    for row in range(num_rows):
        told = json.dumps({"prompt": str(row), "id": str(row)}).encode()
        for name, data in {"win.jpg": image(row, 0), "lose.jpg": image(row, 1), "json": told}.items():
            info = tarfile.TarInfo(f"{row:06d}.{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
"""
WRITE_PARQUET = """
import pyarrow as pa
import pyarrow.parquet as pq

rows_per_group = int(sys.argv[3])
types = {"jpg_0": pa.binary(), "jpg_1": pa.binary(), "label_0": pa.float64(), "label_1": pa.float64(),
         "caption": pa.string(), "ranking_id": pa.int64(), "unused": pa.binary()}
schema = pa.schema(list(types.items()))
with pq.ParquetWriter(path, schema) as writer:
    for begin in range(0, num_rows, rows_per_group):
        batches = []
        for first in range(begin, min(begin + rows_per_group, num_rows), 100):
            rows = range(first, min(first + 100, begin + rows_per_group, num_rows))
            side = lambda shift: [image(row, shift) for row in rows]
            columns = [side(0), side(1), [1.0] * len(rows), [0.0] * len(rows), [str(i) for i in rows], list(rows),
                       side(2)]
            batches.append(pa.record_batch([pa.array(c, t) for c, t in zip(columns, types.values())], schema=schema))
        writer.write_table(pa.Table.from_batches(batches), row_group_size=rows_per_group)
"""

READ = """
import json, sys
from inpo.common.pairs.images import decode_image
from inpo.common.pairs import Pair, open_source

def peak_megabytes():
    # Not ru_maxrss, which a child inherits from its parent.
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

before, num_pairs, num_bytes = peak_megabytes(), 0, 0
decode_every = int(sys.argv[2])
for shard in open_source(sys.argv[1]).shards:
    for item in shard.rows(0, shard.num_rows):
        assert isinstance(item, Pair), item
        if item.row % decode_every == 0:
            assert decode_image(item.win).size == decode_image(item.lose).size == (512, 512)
        num_pairs += 1
        num_bytes += len(item.win) + len(item.lose)
print(json.dumps({"before": before, "peak": peak_megabytes(), "pairs": num_pairs, "megabytes": num_bytes / 2**20}))
"""


def python(script: str, *arguments: object) -> str:
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout


def measure(location: Path, *, decode_every: int) -> dict[str, float]:
    return dict(json.loads(python(READ, location, decode_every)))


def test_one_huge_row_group_streams_in_little_memory(tmp_path: Path) -> None:
    """420 MB of images that are read, and half as much in a column that is not."""
    python(IMAGES + WRITE_PARQUET, tmp_path / "one.parquet", 1400, 1400)
    found = measure(tmp_path / "one.parquet", decode_every=10)
    assert found["pairs"] == 1400
    assert found["megabytes"] > 400
    assert found["peak"] - found["before"] < 200


def test_a_tar_streams_in_little_memory(tmp_path: Path) -> None:
    python(IMAGES + WRITE_TAR, tmp_path / "one.tar", 1400)
    found = measure(tmp_path / "one.tar", decode_every=10)
    assert found["pairs"] == 1400
    assert found["megabytes"] > 400
    assert found["peak"] - found["before"] < 200


LISTS = """
import json, sys
from pathlib import Path
import pyarrow as pa
import pyarrow.parquet as pq
from inpo.common.pairs import Pair, columns, open_source, reach

class Held:
    now = most = 0

    @classmethod
    def add(cls, count):
        cls.now += count
        cls.most = max(cls.most, cls.now)

class Rows(Held): pass

class Images(Held): pass

class Image(bytes):
    def __del__(self):
        Images.add(-1)

def image(self, value, side):
    Images.add(1)
    return Image(read(self, value, side))

def row(self, **fields):
    Rows.add(1)
    made(self, **fields)

read, made = reach.Reach.image, columns.RowFields.__init__
reach.Reach.image, columns.RowFields.__init__ = image, row
columns.RowFields.__del__ = lambda self: Rows.add(-1)

folder, num_rows = Path(sys.argv[1]), 2_500
for name in "abc":
    (folder / f"{name}.png").write_bytes(name.encode())
images = [f"{name}.png" for name in "abc"]
rankings = [{"id": f"r{i}", "prompt": "p", "images": images, "ranks": [1, 2, 3]} for i in range(num_rows)]
singles = [{"prompt_id": i // 3, "prompt": "p", "image": images[i % 3], "rank": i % 3 + 1} for i in range(num_rows)]
pq.write_table(pa.Table.from_pylist(rankings), folder / "rankings.parquet")
(folder / "singles.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in singles))
found = {}
for name in ("rankings.parquet", "singles.jsonl"):
    (shard,) = open_source(str(folder / name), pairs_from="best-worst").shards
    pairs = sum(isinstance(item, Pair) for item in shard.rows(0, shard.num_rows))
    found[name] = {"pairs": pairs, "rows": Rows.most, "images": Images.most}
print(json.dumps(found))
"""


def test_of_thousands_of_rows_of_lists_those_of_two_lists_are_held(tmp_path: Path) -> None:
    """Counted: the rows and images that are alive together, while the index is made and while pairs are read."""
    found = json.loads(python(LISTS, tmp_path))
    assert {name: each["pairs"] for name, each in found.items()} == {"rankings.parquet": 2_500, "singles.jsonl": 833}
    for each in found.values():
        assert 1 <= each["images"] <= 4
        assert 1 <= each["rows"] <= 12


@pytest.mark.slow
@pytest.mark.parametrize("rows_per_group", [10_000, 1_000])
@pytest.mark.timeout(1800)
def test_ten_thousand_rows_stream_in_one_and_a_half_gigabytes(tmp_path: Path, rows_per_group: int) -> None:
    path = tmp_path / "big.parquet"
    python(IMAGES + WRITE_PARQUET, path, 10_000, rows_per_group)
    found = measure(path, decode_every=1)
    assert found["pairs"] == 10_000
    assert found["megabytes"] > 2500
    assert found["peak"] < 1500
