"""Disks and folders that refuse to be written, or to be looked at."""

import errno
import os
import resource
import subprocess
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from inpo.common.cache import CacheWriter, open_cache
from inpo.common.cache.store import CacheStore
from inpo.common.durable import storage_errors, write_file
from inpo.common.errors import StorageError
from inpo.common.log import log_file
from inpo.inspection.output import refuse_output
from inpo.train.output import claim_output


def test_a_full_disk(mounted, build):
    folder = mounted("size=600k")
    manifest = build.cache(folder, pairs=(1,), latent=(4, 16, 16))
    writer = CacheWriter.open(str(folder), manifest)
    with pytest.raises(StorageError) as caught:
        writer.write("big", build.shard(manifest, 40))
    for part in ("No space left on device", str(folder), "free some space", "what is committed stays"):
        assert part in str(caught.value)
    assert not any((folder / "shards/big").iterdir())  # the half attempt does not go on filling the disk
    assert writer.write("small", build.shard(manifest, 1)) is not None
    assert list(open_cache(str(folder)).shards) == ["s0", "small"]


@pytest.mark.parametrize(
    ("full", "place"),
    [(".jsonl.", "skipped"), (".json.", "commits"), (".json.", "text-commits")],
    ids=["skipped rows", "commit", "commit of texts"],
)
def test_a_full_disk_at_the_commit(tmp_path, build, monkeypatch, full, place):
    manifest = build.cache(tmp_path, pairs=(1,))
    writer = CacheWriter.open(str(tmp_path), manifest)
    before = writer.store.listing("")
    real = os.fsync

    def refuse(handle: int) -> None:
        file = os.readlink(f"/proc/self/fd/{handle}")
        if file.endswith(".staged") and full in file and f"/{place}/" in file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    skipped = [{"pair_id": "p", "reason": "tie", "detail": "", "row": 1}]
    shard, texts = build.shard(manifest, 1, skipped=skipped), build.texts(manifest)
    with pytest.raises(StorageError, match="No space left on device"):
        _ = writer.write_texts("t9", texts) if place == "text-commits" else writer.write("s1", shard)
    assert writer.store.listing("") == before  # nothing of it goes on filling the disk


def test_a_commit_that_is_there_keeps_its_arrays_whatever_the_disk_says_then(tmp_path, build, monkeypatch):
    manifest = build.cache(tmp_path, pairs=(1,))
    writer = CacheWriter.open(str(tmp_path), manifest)

    def fail(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}") == str(tmp_path / "commits"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="Input/output error"):
        writer.write("s1", build.shard(manifest, 1))
    assert np.array_equal(open_cache(str(tmp_path)).shards["s1"].read("x0"), build.shard(manifest, 1).arrays["x0"])


def test_a_file_size_limit(tmp_path, build):
    manifest = build.manifest(latent=(4, 32, 32))
    writer = CacheWriter.open(str(tmp_path), manifest)
    shard = build.shard(manifest, 8)
    with _largest_file(100_000), pytest.raises(StorageError, match="File too large"):
        writer.write("s0", shard)
    assert writer.committed() == set()
    assert writer.write("s0", shard) is not None


@contextmanager
def _largest_file(num_bytes: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_read_only_target_can_be_read_and_not_written(mounted, build):
    folder = mounted("size=4m")
    manifest = build.cache(folder, pairs=(2,))
    (folder / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    assert open_cache(str(folder)).shards["s0"].read("x_t").shape[0] == 4
    writer = CacheWriter.open(str(folder), manifest)
    shard = build.shard(manifest, 1)
    for attempt in (
        lambda: writer.write("s1", shard),
        lambda: CacheStore(f"{folder}/x", create=True),
        lambda: refuse_output(folder / "report.html", what="report"),
        lambda: log_file(folder).__enter__(),
        lambda: claim_output(folder / "run").__enter__(),
    ):
        with pytest.raises(StorageError, match="Read-only file system") as caught:
            attempt()
        assert "choose a folder you can write to" in str(caught.value)


def test_a_folder_that_may_not_be_listed_is_not_an_empty_one(tmp_path, build, monkeypatch):
    build.cache(tmp_path, pairs=(1,))
    real = os.scandir

    def deny(path="."):
        if str(path).endswith("commits"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(StorageError, match="Permission denied") as caught:
        open_cache(str(tmp_path))
    assert "check the owner and mode" in str(caught.value)


def test_a_cache_below_a_folder_that_may_not_be_listed(tmp_path, build, monkeypatch):
    """As the homes of others are: it may be entered, and so not be opened to be flushed."""
    real = os.open

    def deny(path, *arguments, **options):
        if Path(os.fsdecode(path)) == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", deny)
    build.cache(tmp_path / "cache", pairs=(1,))
    assert open_cache(str(tmp_path / "cache")).num_pairs == 1
    write_file(tmp_path / "report.html", "x")


def test_a_link_that_leads_nowhere_is_no_cache_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "cache")
    with pytest.raises(StorageError, match="a link that leads nowhere"):
        CacheStore(str(tmp_path / "link"), create=True)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG])
def test_every_refusal_of_the_system_says_what_and_where(code):
    with pytest.raises(StorageError) as caught, storage_errors("write", "/cache/commits/s.json"):
        raise OSError(code, os.strerror(code), "/cache/commits/s.json")
    message = str(caught.value)
    assert f"Could not write: {os.strerror(code)}." in message
    assert "/cache/commits/s.json" in message
    assert "to do:" in message
