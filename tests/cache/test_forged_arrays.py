"""A hostile cache: metadata and chunks of arrays that are committed, and say what no writer of ours says."""

import json
import math
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest

from inpo.common.cache import CacheWriter, open_cache
from inpo.common.cache.committed import CommittedArrays
from inpo.common.errors import CacheCorrupt, CacheError, CacheSchemaError
from inpo.inspection.checks import check_shard, check_texts
from tests.cache.forging import attempt_of, edit, forge_file, verified

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
    arrays = {"s0": ("x_t", "pair/id", "group/prompt"), "texts/t0": ("text", "embedding", "length")}
    for owner, paths in arrays.items():
        for array in paths:
            document = json.loads((attempt_of(folder, owner) / array / "zarr.json").read_text())
            edit(document, field, value)
            forge_file(folder, f"{array}/zarr.json", json.dumps(document).encode(), owner)
    cache = open_cache(str(folder))
    shards: dict[str, CommittedArrays] = {"s0": cache.shards["s0"], "texts/t0": cache.texts.need("t0")}
    for owner, paths in arrays.items():
        for array in paths:
            with pytest.raises(CacheError) as caught:
                shards[owner].read_stored(array)
            for words in (array, owner[-2:], str(folder), "to do:"):
                assert words in str(caught.value)
    assert {finding.check for finding in check_shard(cache.shards["s0"]).findings} >= {"bytes"}
    assert check_texts(cache.texts.need("t0"), cache.manifest).findings
    assert largest < 1e7


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"[" * 60_000, b"\xff\xfe", b'{"shape": [3]}'])
def test_metadata_that_is_no_document_is_refused(folder, text):
    forge_file(folder, "pair/label/zarr.json", text)
    with pytest.raises(CacheError, match="label"):
        open_cache(str(folder)).shards["s0"].read("pair/label")
    forge_file(folder, "embedding/zarr.json", text, "texts/t0")
    with pytest.raises(CacheError, match="embedding"):
        open_cache(str(folder)).texts.need("t0").read_stored("embedding")


def crc32c(data: bytes) -> bytes:
    import google_crc32c

    return google_crc32c.value(data).to_bytes(4, "little")


def test_forged_counts_inside_a_chunk_fill_no_memory(folder):
    attempt = attempt_of(folder)
    text = (attempt / "pair" / "id" / "c" / "0").read_bytes()[:-4]
    forged = (2**32 - 1).to_bytes(4, "little") + text[4:]
    forge_file(folder, "pair/id/c/0", forged + crc32c(forged))
    with pytest.raises(CacheCorrupt, match="4294967295 texts instead of 3"):
        open_cache(str(folder)).shards["s0"].read("pair/id")

    path = "x0/c/0/0/0/0"
    data = bytearray((attempt / path).read_bytes())
    index = np.frombuffer(data[-4 - 16 * 6 : -4], "<u8").copy()
    index[1] = 1 << 45  # the length of the first chunk
    data[-4 - 16 * 6 :] = index.tobytes() + crc32c(index.tobytes())
    forge_file(folder, path, bytes(data))
    with pytest.raises(CacheCorrupt, match="x0 of shard s0"):
        open_cache(str(folder)).shards["s0"].read("x0", np.array([0]))


def forge_texts(folder: Path, count: int) -> None:
    """The texts of t0 with another count of them, compressed anew."""
    raw = numcodecs.Zstd().decode((attempt_of(folder, "texts/t0") / "text/c/0").read_bytes()[:-4])
    frame = bytes(numcodecs.Zstd().encode(count.to_bytes(4, "little") + bytes(raw)[4:]))
    forge_file(folder, "text/c/0", frame + crc32c(frame), "texts/t0")


def chunks_and_index(folder: Path, path: str) -> tuple[bytearray, np.ndarray]:
    """The file of an array of t0's four prompts, and its index of (offset, length)."""
    data = bytearray((attempt_of(folder, "texts/t0") / path).read_bytes())
    return data, np.frombuffer(data[-4 - 16 * 4 : -4], "<u8").reshape(4, 2).copy()


def forge_index(folder: Path, index: tuple[int, int]) -> None:
    """The index of the embeddings says another (offset, length) of the second prompt's chunk."""
    data, found = chunks_and_index(folder, "embedding/c/0/0/0")
    found[1] = index
    data[-4 - 16 * 4 :] = found.tobytes() + crc32c(found.tobytes())
    forge_file(folder, "embedding/c/0/0/0", bytes(data), "texts/t0")


def forge_frame(folder: Path, make: Callable[[bytes], bytes]) -> None:
    """Another frame in place of the second prompt's embedding, with its checksums right."""
    data, index = chunks_and_index(folder, "embedding/c/0/0/0")
    chunks = [bytes(data[start : start + length]) for start, length in index.tolist()]
    frame = make(chunks[1][:-4])
    chunks[1] = frame + crc32c(frame)
    start = 0
    for row, chunk in enumerate(chunks):
        index[row], start = (start, len(chunk)), start + len(chunk)
    forge_file(folder, "embedding/c/0/0/0", b"".join(chunks) + index.tobytes() + crc32c(index.tobytes()), "texts/t0")


def claiming(frame: bytes, content: int) -> bytes:
    """A zstd frame whose header says that it holds so many bytes, in the eight bytes that it has for that."""
    assert frame[4] == 0x20  # one segment, one byte of size
    return frame[:4] + bytes([0xE0]) + content.to_bytes(8, "little") + frame[6:]


FRAMES: dict[str, Callable[[Path], None]] = {
    "more texts than memory": lambda folder: forge_texts(folder, 2**32 - 1),
    "a text less": lambda folder: forge_texts(folder, 3),
    "a text more": lambda folder: forge_texts(folder, 5),
    "an index out of its file": lambda folder: forge_index(folder, (1 << 45, 70)),
    "a chunk beyond memory": lambda folder: forge_index(folder, (0, 1 << 45)),
    "a chunk that is not there": lambda folder: forge_index(folder, (2**64 - 1, 2**64 - 1)),
    "a chunk of nothing": lambda folder: forge_index(folder, (0, 0)),
    "a frame beyond memory": lambda folder: forge_frame(folder, lambda frame: claiming(frame, 1 << 45)),
    "a frame beyond all numbers": lambda folder: forge_frame(folder, lambda frame: claiming(frame, 2**64 - 1)),
    "a frame of nothing": lambda folder: forge_frame(folder, lambda frame: claiming(frame, 0)),
    "a frame of a byte more": lambda folder: forge_frame(folder, lambda frame: claiming(frame, 61)),
    "a frame that does not say": lambda folder: forge_frame(folder, lambda frame: frame[:4] + b"\0\x58" + frame[6:]),
    "no frame": lambda folder: forge_frame(folder, lambda frame: bytes(len(frame))),
    "a frame of a gigabyte of zeros": lambda folder: forge_frame(
        folder, lambda frame: bytes(numcodecs.Zstd().encode(bytes(1 << 30)))
    ),
    "two frames": lambda folder: forge_frame(folder, lambda frame: frame + frame),
}


@pytest.mark.parametrize("name", FRAMES)
def test_forged_frames_of_texts_fill_no_memory(folder, name):
    FRAMES[name](folder)
    path = "text" if "text" in name else "embedding"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for rows in (None, np.array([1])):
        with pytest.raises((CacheSchemaError, CacheCorrupt), match=rf"rray {path} of text shard t0"):
            open_cache(str(folder)).texts.need("t0").read_stored(path, rows)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    assert {finding.shard for finding in verified(folder)} >= {"texts/t0"}


def test_a_row_of_texts_beyond_any_prompt_is_refused(folder):
    """A compressed file does not tell its array's size, and a width belongs to no one but the array."""
    path = "embedding/zarr.json"
    document = json.loads((attempt_of(folder, "texts/t0") / path).read_text())
    document["shape"][2] = 1 << 27
    document["chunk_grid"]["configuration"]["chunk_shape"][2] = 1 << 27
    document["codecs"][0]["configuration"]["chunk_shape"][2] = 1 << 27
    forge_file(folder, path, json.dumps(document).encode(), "texts/t0")
    with pytest.raises(CacheSchemaError, match=r"1342177280 bytes by prompt, limit 268435456"):
        open_cache(str(folder)).texts.need("t0").read_stored("embedding", np.array([0]))


POSITIONS = {
    "a timestep behind the last": ("timestep", (-1, -1), 1000),
    "a timestep below the first": ("timestep", (0, 0), -1),
    "a group behind the last": ("image/group", -1, 3),
    "a group below the first": ("image/group", 0, -1),
    "a win behind the last": ("pair/win", -1, 6),
    "a win below the first": ("pair/win", 0, -1),
    "a lose behind the last": ("pair/lose", 0, 1 << 30),
    "a lose below the first": ("pair/lose", -1, -1),
    "a text behind the last": ("group/prompt", (0, 0), 2),
    "a text below the first": ("group/prompt", (1, 0), -1),
    "a prompt behind the last": ("group/prompt", (2, 1), 4),
    "a prompt below the first": ("group/prompt", (0, 1), -1),
    "a prompt of a text that is as short": ("group/prompt", (0, slice(None)), (0, 1)),
}


def forged_numbers(folder: Path, build: Any, monkeypatch: pytest.MonkeyPatch, path: str, at: Any, value: Any) -> None:
    """A cache whose writer did not look at what it wrote."""
    monkeypatch.setattr(CacheWriter, "_check", lambda self, name, data: None)
    manifest = build.manifest()
    data = build.shard(manifest, 3)
    data.arrays[path][at] = value
    build.writer(folder, manifest).write("s0", data)


@pytest.mark.parametrize("name", POSITIONS)
def test_a_position_outside_what_it_points_into_is_refused(tmp_path, build, monkeypatch, name):
    path, at, value = POSITIONS[name]
    forged_numbers(tmp_path, build, monkeypatch, path, at, value)
    with pytest.raises(CacheSchemaError, match=rf"(?s){path} of shard s0.*got: "):
        open_cache(str(tmp_path)).shards["s0"].read(path)
    assert {finding.shard for finding in verified(tmp_path)} == {"s0"}


def test_a_pair_of_images_of_two_groups_is_refused(tmp_path, build, monkeypatch):
    forged_numbers(tmp_path, build, monkeypatch, "pair/lose", 0, 2)
    with pytest.raises(CacheSchemaError, match=r"(?s)pair/lose of shard s0.*not of one group"):
        open_cache(str(tmp_path)).shards["s0"].groups()
    assert {finding.shard for finding in verified(tmp_path)} == {"s0"}


@pytest.mark.parametrize(("path", "at", "value"), [("pair/win", 0, 1), ("image/group", 0, 1)])
def test_a_pair_of_one_image_and_groups_that_do_not_ascend_are_found(tmp_path, build, monkeypatch, path, at, value):
    forged_numbers(tmp_path, build, monkeypatch, path, at, value)
    assert {finding.shard for finding in verified(tmp_path)} == {"s0"}
