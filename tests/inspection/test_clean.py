"""`clean`: orphans go, committed attempts and young ones stay."""

import errno
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from inpo.common.cache.store import CacheStore
from inpo.common.errors import StorageError
from inpo.inspection import leftovers
from inpo.inspection.leftovers import find_leftovers, remove_leftover


def files(folder: Path) -> dict[Path, bytes]:
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def grow_old(folder: Path) -> None:
    old = time.time() - 2 * 3600
    for file in folder.rglob("*"):
        os.utime(file, (old, old))


def with_orphan(folder: Path, *, old: bool, of: str = "shards/s0") -> dict[Path, bytes]:
    """A second attempt beside the committed one of a shard. Returns the files that must survive."""
    survivors = files(folder)
    (committed,) = (folder / of).iterdir()
    orphan = Path(shutil.copytree(committed, committed.with_name("feedfeedfeedfeed")))
    if old:
        grow_old(orphan)
    return survivors


@pytest.mark.parametrize("of", ["shards/s0", "texts/t0", "texts/empty"])
def test_an_orphan_goes_after_yes_and_nothing_else_does(fresh, inspect, of):
    folder = fresh("healthy")
    survivors = with_orphan(folder, old=True, of=of)
    refused = inspect("clean", folder, answer="n\n")
    assert refused.code == 1
    assert "nothing was removed" in refused.out
    assert len(files(folder)) > len(survivors)
    done = inspect("clean", folder, answer="y\n")
    assert done.code == 0
    assert f"{of}/feedfeedfeedfeed" in done.out
    assert files(folder) == survivors
    assert inspect("verify", folder).code == 0


def test_committed_attempts_stay_however_old(fresh, inspect):
    folder = fresh("healthy")
    grow_old(folder)
    before = files(folder)
    done = inspect("clean", folder, "--yes", "--all")
    assert done.code == 0
    assert "nothing to remove" in done.out
    assert files(folder) == before


@pytest.mark.parametrize("of", ["shards/s0", "texts/t0"])
def test_a_young_attempt_is_left_to_its_writer_unless_all_is_said(fresh, inspect, of):
    folder = fresh("healthy")
    survivors = with_orphan(folder, old=False, of=of)
    done = inspect("clean", folder, "--yes")
    assert done.code == 0
    assert "1 younger than an hour" in done.out
    assert len(files(folder)) > len(survivors)
    assert inspect("clean", folder, "--yes", "--all").code == 0
    assert files(folder) == survivors


def test_an_attempt_committed_in_the_meantime_stays(fresh):
    folder = fresh("writing")
    whole = fresh("healthy")
    store = CacheStore(str(folder))
    (leftover,) = find_leftovers(store)
    commit = (whole / "commits" / "s1.json").read_text()
    (attempt,) = (whole / "shards" / "s1").iterdir()
    # `writing` and `healthy` were written apart: give the leftover the name that the commit says.
    shards, skipped = folder / "shards" / "s1", folder / "skipped" / "s1"
    (shards / leftover.attempt).rename(shards / attempt.name)
    (skipped / f"{leftover.attempt}.jsonl").rename(skipped / f"{attempt.name}.jsonl")
    (leftover,) = find_leftovers(store)
    (folder / "commits" / "s1.json").write_text(commit)
    before = files(folder)
    assert remove_leftover(store, leftover) is False
    assert files(folder) == before


def test_an_attempt_at_texts_committed_in_the_meantime_stays(fresh):
    folder = fresh("healthy")
    store = CacheStore(str(folder))
    commit = (folder / "text-commits" / "t0.json").read_bytes()
    (folder / "text-commits" / "t0.json").unlink()
    (leftover,) = find_leftovers(store)
    assert leftover.path.startswith("texts/t0/")
    (folder / "text-commits" / "t0.json").write_bytes(commit)
    before = files(folder)
    assert remove_leftover(store, leftover) is False
    assert files(folder) == before


def test_texts_and_images_of_one_name_are_told_apart(fresh, inspect):
    """A text shard may have the name of a shard of images: what one has committed says nothing of the other."""
    folder = fresh("healthy")
    survivors = files(folder)
    (committed,) = (folder / "shards" / "s0").iterdir()
    shutil.copytree(committed, folder / "texts" / "s0" / committed.name)
    grow_old(folder)
    assert "removed 1 leftovers" in inspect("clean", folder, "--yes").out
    assert files(folder) == survivors


@pytest.mark.parametrize(("of", "commit"), [("shards/s0", "commits/s0"), ("texts/t0", "text-commits/t0")])
def test_attempts_of_a_shard_whose_commit_cannot_be_read_stay(fresh, inspect, of, commit):
    folder = fresh("healthy")
    with_orphan(folder, old=True, of=of)
    grow_old(folder)
    (folder / f"{commit}.json").write_text("{")
    before = files(folder)
    inspect("clean", folder, "--yes", "--all")
    assert files(folder) == before


def test_a_list_that_was_on_its_way_belongs_to_its_attempt(fresh, inspect):
    """A writer that dies while it writes a list, or a mark, leaves a .staged file."""
    folder = fresh("healthy")
    survivors = with_orphan(folder, old=True)
    for name in (
        "skipped/s0/feedfeedfeedfeed.jsonl.0f.staged",
        "shards/s0/deaddeaddeaddead.removing.0f.staged",
        "texts/t0/cafecafecafecafe.removing",
    ):
        (folder / name).write_text("{")
    grow_old(folder)
    assert {each.attempt for each in find_leftovers(CacheStore(str(folder)))} == {
        "feedfeedfeedfeed",
        "deaddeaddeaddead",
        "cafecafecafecafe",
    }
    assert "removed 3 leftovers" in inspect("clean", folder, "--yes").out
    assert files(folder) == survivors
    assert "nothing to remove" in inspect("clean", folder, "--yes").out


def test_where_a_commit_is_no_document_the_rest_is_shown_and_nothing_removed(fresh, inspect):
    folder = fresh("healthy")
    with_orphan(folder, old=True)
    with (folder / "commits" / "s0.json").open("wb") as stream:
        stream.truncate(1 << 30)  # sparse
    for command in (("summary", folder), ("report", folder, "--out", folder.parent / "r.html")):
        done = inspect(*command)
        assert done.code == 1
        assert "s0" in done.out
        assert "no document of a cache" in done.out
        assert "error:" not in done.out
    assert "nothing to remove" in inspect("clean", folder, "--yes", "--all").out


@pytest.mark.parametrize("name", [".DS_Store", "._ATTEMPT", "notes.txt", "ATTEMPT copy/zarr.json"])
@pytest.mark.parametrize("of", ["shards/s0", "texts/t0", "skipped/s0"])
def test_a_file_that_no_writer_left_takes_no_committed_attempt_with_it(fresh, inspect, of, name):
    folder = fresh("healthy")
    (committed,) = (folder / of.replace("skipped", "shards")).iterdir()
    file = folder / of / name.replace("ATTEMPT", committed.name)
    file.parent.mkdir(exist_ok=True)
    file.write_text("x")
    grow_old(folder)
    before = files(folder)
    assert "orphaned   0 attempts" in inspect("summary", folder).out
    assert "nothing to remove" in inspect("clean", folder, "--yes", "--all").out
    assert files(folder) == before


def test_who_leaves_an_attempt_alone_leaves_the_mark_of_another_clean(fresh, monkeypatch):
    """One clean finds no commit; then the writer commits, and a second clean sees that and goes away. The writer must
    still see that the first one is removing."""
    folder = fresh("healthy")
    store = CacheStore(str(folder))
    file = folder / "commits" / "s0.json"
    commit = file.read_bytes()
    file.unlink()
    (leftover,) = find_leftovers(store)
    look = leftovers.committed_attempt
    marks = []

    def looked(*arguments):
        found = look(*arguments)
        if not marks:
            marks.append("looked")
            file.write_bytes(commit)
            assert remove_leftover(store, leftover) is False
            marks.extend(name for name in store.listing("shards/s0") if name.endswith(".removing"))
        return found

    monkeypatch.setattr(leftovers, "committed_attempt", looked)
    assert remove_leftover(store, leftover)
    assert len(marks) == 2
    assert marks[1].startswith(f"{leftover.attempt}.")
    assert store.listing("shards/s0") == {}


def test_what_lies_behind_links_is_cleaned_too_and_a_link_to_nowhere_is_told(fresh, inspect, tmp_path):
    folder = fresh("healthy")
    with_orphan(folder, old=True)
    for place in ("shards/s0", "texts"):
        disk = tmp_path / place.replace("/", "-")
        (folder / place).rename(disk)
        (folder / place).symlink_to(disk)
    (folder / "shards" / "s9").symlink_to(folder / "shards")  # a circle
    done = inspect("clean", folder, "--yes")
    assert done.code == 0
    assert "removed 1 leftovers" in done.out
    assert not (tmp_path / "shards-s0" / "feedfeedfeedfeed").exists()
    (folder / "shards" / "s9").unlink()
    assert inspect("verify", folder).code == 0
    disk.rename(tmp_path / "elsewhere")
    done = inspect("clean", folder, "--yes")
    assert done.code == 1
    assert f"no {disk}" in done.out


def test_what_another_commit_names_stays_wherever_links_lead(fresh, inspect, tmp_path):
    """To another shard of the cache, to a cache beside it, to all shards under a second name: none of it is left over,
    and nothing is lost from sight."""
    folder = fresh("healthy")
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    (committed,) = (other / "shards" / "s1").iterdir()
    committed.rename(committed.with_name("feedfeedfeedfeed"))
    (other / "commits" / f"a.json.{'a' * 32}.staged").write_bytes(b"{}")
    grow_old(folder)
    grow_old(other)
    before = files(other)
    for name, place in (("s00", folder / "shards" / "s0"), ("s9", other / "shards" / "s1")):
        (folder / "shards" / name).symlink_to(place)
    (folder / "labels").symlink_to(other / "commits")
    (folder / "again").symlink_to(folder / "shards")
    done = inspect("clean", folder, "--yes", "--all")
    assert "nothing to remove" in done.out
    assert files(other) == before
    assert inspect("verify", folder).code == 0
    assert json.loads(inspect("summary", folder, "--json").out)["num_orphaned"] == 0


def test_of_an_attempt_that_is_a_link_the_link_goes(fresh, inspect, tmp_path):
    folder = fresh("healthy")
    survivors = with_orphan(folder, old=True)
    orphan = folder / "shards" / "s0" / "feedfeedfeedfeed"
    orphan.rename(tmp_path / "elsewhere")
    orphan.symlink_to(tmp_path / "elsewhere")
    kept = files(tmp_path / "elsewhere")
    assert "removed 1 leftovers" in inspect("clean", folder, "--yes").out
    assert not orphan.is_symlink()
    assert files(folder) == survivors
    assert files(tmp_path / "elsewhere") == kept


def test_a_document_that_never_got_its_name_goes(fresh, inspect):
    folder = fresh("healthy")
    before = files(folder)
    old, young = (folder / "commits" / f"s9.json.{digit * 32}.staged" for digit in "ab")
    for file in (old, young):
        file.write_bytes(b"{}")
    os.utime(old, (1, 1))
    done = inspect("clean", folder, "--yes")
    assert done.code == 0
    assert f"commits/{old.name}" in done.out
    assert "left alone: 1" in done.out
    young.unlink()
    assert files(folder) == before


def test_a_folder_that_may_not_be_listed_is_not_taken_for_an_empty_one(fresh, monkeypatch):
    folder = fresh("healthy")
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("shards/s0"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(StorageError, match="Permission denied"):
        find_leftovers(CacheStore(str(folder)))
