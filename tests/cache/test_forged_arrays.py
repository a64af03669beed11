"""A hostile cache: metadata and chunks of arrays that are committed, and say what no writer of ours says."""

import json
import math
from typing import Any

import numpy as np
import pytest

from inpo.common.cache import CacheWriter, open_cache
from inpo.common.errors import CacheCorrupt, CacheError, CacheSchemaError
from inpo.inspection.checks import check_shard
from tests.cache.forging import edit, forge_file, verified

BIG = 1 << 50
METADATA = {
    "more pairs": ("shape.0", 9),
    "pairs beyond memory": ("shape.0", BIG),
    "no pair": ("shape.0", 0),
    "pairs below none": ("shape.0", -3),
    "pairs that are no number": ("shape.0", "3"),
    "an axis less": ("shape", lambda shape: shape[1:]),
    "an axis more": ("shape", lambda shape: [*shape, 1]),
    "a shape that is none": ("shape", None),
    "another dtype": ("data_type", "float64"),
    "a dtype beyond memory": ("data_type", {"name": "fixed_length_utf32", "configuration": {"length_bytes": 1 << 40}}),
    "chunks beyond memory": ("chunk_grid.configuration.chunk_shape.0", BIG),
    "smaller chunks": ("chunk_grid.configuration.chunk_shape.0", 1),
    "another grid": ("chunk_grid.name", "rectilinear"),
    "a codec more": ("codecs", lambda codecs: [*codecs, {"name": "gzip", "configuration": {"level": 5}}]),
    "an unknown codec": ("codecs", [{"name": "\x1b[31m", "configuration": {}}]),
    "codecs that are none": ("codecs", [3]),
    "no codec": ("codecs", []),
    "other file names": ("chunk_key_encoding", {"name": "v2", "configuration": {"separator": "."}}),
    "other axes": ("dimension_names.0", "side"),
    "another fill value": ("fill_value", 7),
    "another node": ("node_type", "group"),
    "another format": ("zarr_format", 2),
    "a transformer": ("storage_transformers", [{"name": "x", "configuration": {}}]),
    "what must be understood": ("surprise", {"name": "x", "must_understand": True}),
}


@pytest.mark.parametrize("name", METADATA)
def test_forged_metadata_of_an_array_is_refused_before_anything_is_made_for_it(folder, name, monkeypatch):
    field, value = METADATA[name]
    largest = 0
    real = np.empty

    def watched(shape: Any, *arguments: Any, **options: Any) -> np.ndarray:
        nonlocal largest
        largest = max(largest, math.prod(shape) if isinstance(shape, tuple) else int(shape))
        return real(shape, *arguments, **options)

    monkeypatch.setattr(np, "empty", watched)
    arrays = ("x_t", "pair_id", "prompt/embedding")
    for array in arrays:
        (attempt,) = (folder / "shards" / "s0").iterdir()
        document = json.loads((attempt / array / "zarr.json").read_text())
        edit(document, field, value)
        forge_file(folder, f"{array}/zarr.json", json.dumps(document).encode())
    shard = open_cache(str(folder)).shards["s0"]
    for array in arrays:
        with pytest.raises(CacheError) as caught:
            shard.read(array)
        for words in (array, "s0", str(folder), "to do:"):
            assert words in str(caught.value)
    assert {finding.check for finding in check_shard(shard).findings} >= {"bytes"}
    assert largest < 1e7


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"[" * 60_000, b"\xff\xfe", b'{"shape": [3]}'])
def test_metadata_that_is_no_document_is_refused(folder, text):
    forge_file(folder, "label/zarr.json", text)
    with pytest.raises(CacheError, match="label"):
        open_cache(str(folder)).shards["s0"].read("label")


def crc32c(data: bytes) -> bytes:
    import google_crc32c

    return google_crc32c.value(data).to_bytes(4, "little")


def test_forged_counts_inside_a_chunk_fill_no_memory(folder):
    (attempt,) = (folder / "shards" / "s0").iterdir()
    text = (attempt / "pair_id" / "c" / "0").read_bytes()[:-4]
    forged = (2**32 - 1).to_bytes(4, "little") + text[4:]
    forge_file(folder, "pair_id/c/0", forged + crc32c(forged))
    with pytest.raises(CacheSchemaError, match="4294967295 texts instead of 3"):
        open_cache(str(folder)).shards["s0"].read("pair_id")

    path = "x0/c/0/0/0/0/0"
    data = bytearray((attempt / path).read_bytes())
    index = np.frombuffer(data[-4 - 16 * 3 : -4], "<u8").copy()
    index[1] = 1 << 45  # the length of the first chunk
    data[-4 - 16 * 3 :] = index.tobytes() + crc32c(index.tobytes())
    forge_file(folder, path, bytes(data))
    with pytest.raises(CacheCorrupt, match="x0 of shard s0"):
        open_cache(str(folder)).shards["s0"].read("x0", np.array([0]))


@pytest.mark.parametrize(("path", "value"), [("prompt_index", -1), ("prompt_index", 99), ("timestep", 1000)])
def test_a_position_outside_what_it_points_into_is_refused(tmp_path, build, monkeypatch, path, value):
    monkeypatch.setattr(CacheWriter, "_check", lambda self, name, data: None)
    manifest = build.manifest()
    data = build.shard(manifest, 3)
    data.arrays[path].reshape(-1)[-1] = value
    CacheWriter.open(str(tmp_path), manifest).write("s0", data)
    with pytest.raises(CacheSchemaError, match=rf"{path} of shard s0(.|\n)*{value} outside|{value}"):
        open_cache(str(tmp_path)).shards["s0"].read(path)
    assert {finding.shard for finding in verified(tmp_path)} == {"s0"}
