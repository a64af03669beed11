"""What happens to an attempt between its arrays and its commit: no commit of what is not there stays."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inpo.common.cache import CacheWriter, Commit, TextCommit, open_cache
from inpo.common.cache.commits import AnyCommit
from inpo.common.cache.store import CacheStore
from inpo.common.errors import StorageError
from inpo.inspection.leftovers import find_leftovers, remove_leftover
from tests.cache.forging import verified


def meddle(monkeypatch, what: Callable[[CacheWriter, str], None], *, times: int = 1) -> list[str]:
    """Something happens to an attempt between its arrays and its commit."""
    real, folders = CacheWriter._write_arrays, []

    def write(self: CacheWriter, folder: str, arrays: Any, specs: Any) -> None:
        real(self, folder, arrays, specs)
        folders.append(folder)
        if len(folders) <= times:
            what(self, folder)

    monkeypatch.setattr(CacheWriter, "_write_arrays", write)
    return folders


def clean(writer: CacheWriter, folder: str) -> None:
    for leftover in find_leftovers(writer.store):
        assert remove_leftover(writer.store, leftover)


def change_a_file(how: Callable[[Path], object]) -> Callable[[CacheWriter, str], None]:
    def change(writer: CacheWriter, folder: str) -> None:
        array = "x0/c/0/0/0/0" if folder.startswith("shards/") else "text/c/0"
        how(Path(writer.store.location) / folder / array)

    return change


MEDDLING = {
    "clean --all": clean,
    "a file is lost": change_a_file(lambda file: file.unlink()),
    "a file is short": change_a_file(lambda file: file.write_bytes(file.read_bytes()[:-1])),
    "a file is zeros": change_a_file(lambda file: file.write_bytes(bytes(file.stat().st_size))),
    "a file too many": change_a_file(lambda file: file.with_name("1").write_bytes(b"")),
}


def write(writer: CacheWriter, build: Any, kind: str) -> AnyCommit | None:
    """A shard of three pairs, or one of texts."""
    if kind == "images":
        return writer.write("s0", build.shard(writer.manifest, 3))
    return writer.write_texts("t9", build.texts(writer.manifest, 9))


KINDS = {"images": ("shards/s0", Commit), "texts": ("texts/t9", TextCommit)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MEDDLING)
def test_an_attempt_that_changed_before_its_commit_is_made_again(tmp_path, build, monkeypatch, name, kind):
    writer = build.writer(tmp_path, build.manifest())
    folders = meddle(monkeypatch, MEDDLING[name])
    commit = write(writer, build, kind)
    assert commit is not None
    assert folders[1] == f"{KINDS[kind][0]}/{commit.attempt}"
    assert verified(tmp_path) == []
    cache = open_cache(str(tmp_path), allow_empty=True)
    if kind == "images":
        assert len(cache.shards["s0"].read("x_t")) == 6
    else:
        assert len(cache.texts.need("t9").read_stored("embedding")) == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MEDDLING)
def test_an_attempt_that_always_changes_is_never_committed(tmp_path, build, monkeypatch, name, kind):
    writer = build.writer(tmp_path, build.manifest())
    meddle(monkeypatch, MEDDLING[name], times=9)
    before = writer.committed(KINDS[kind][1])
    with pytest.raises(StorageError, match="nothing is committed") as caught:
        write(writer, build, kind)
    assert "inspect clean --all" in str(caught.value)
    assert writer.committed(KINDS[kind][1]) == before


def test_a_listing_that_lags_makes_no_commit_with_fewer_files(tmp_path, build, monkeypatch):
    manifest = build.manifest()
    writer = CacheWriter.open(str(tmp_path), manifest)
    real = CacheStore.listing
    monkeypatch.setattr(
        CacheStore, "listing", lambda self, prefix: dict(list(real(self, prefix).items())[:3]) if "/" in prefix else {}
    )
    with pytest.raises(StorageError, match="no such file"):
        writer.write("s0", build.shard(manifest, 3))
    assert not (tmp_path / "commits").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_clean_and_a_commit_at_the_same_moment(tmp_path, build, monkeypatch, kind):
    """clean has looked for the commit and found none; then the writer commits; then clean removes. In every order one
    sees the other: no commit of an attempt that is gone stays."""
    writer = build.writer(tmp_path, build.manifest())
    store = CacheStore(str(tmp_path))
    place, kind_of_commit = KINDS[kind]
    put_new, remove = CacheStore.put_new, CacheStore.remove
    commits = []

    def at_commit(self: CacheStore, name: str, data: bytes) -> bool:
        if name.startswith(f"{kind_of_commit.folder}/") and not commits:
            commits.append(name)
            (leftover,) = find_leftovers(store)
            assert leftover.path == f"{place}/{leftover.attempt}"

            def removing(each: CacheStore, prefix: str) -> None:  # the commit comes before the first removal
                monkeypatch.setattr(CacheStore, "remove", remove)
                assert put_new(self, name, data)
                shard = place.rpartition("/")[2]
                assert writer._difference(leftover.path, shard, leftover.attempt, b"", digests=False) is not None
                remove(each, prefix)

            monkeypatch.setattr(CacheStore, "remove", removing)
            assert remove_leftover(store, leftover)
            return True
        return put_new(self, name, data)

    monkeypatch.setattr(CacheStore, "put_new", at_commit)
    assert write(writer, build, kind) is not None
    assert len(commits) == 1
    assert verified(tmp_path) == []
    cache = open_cache(str(tmp_path), allow_empty=True)
    arrays = cache.shards["s0"] if kind == "images" else cache.texts.need("t9")
    assert len(arrays.read_stored("x_t" if kind == "images" else "embedding")) == {"images": 6, "texts": 4}[kind]


@pytest.mark.parametrize(("place", "commit"), [("shards", "commits/s0.json"), ("texts", "text-commits/t0.json")])
def test_clean_leaves_what_was_committed_while_it_looked(tmp_path, build, place, commit):
    manifest = build.cache(tmp_path, pairs=(2,))
    store = CacheStore(str(tmp_path))
    data = (tmp_path / commit).read_bytes()
    (tmp_path / commit).unlink()
    (leftover,) = find_leftovers(store)
    (tmp_path / commit).write_bytes(data)
    assert remove_leftover(store, leftover) is False
    assert verified(tmp_path) == []
    assert not [name for name in store.listing(place) if name.endswith(".removing")]
    assert open_cache(str(tmp_path)).manifest == manifest
