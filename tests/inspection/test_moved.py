"""What `verify --quarantine` moves, and what stays."""

import errno
import json

from obstore.exceptions import PermissionDeniedError

from inpo.common.cache.store import CacheStore
from inpo.common.errors import refused as refuse
from inpo.inspection.verify import quarantine, verify


def test_a_flipped_bit_is_named_and_quarantine_moves_that_commit_alone(fresh, inspect):
    folder = fresh("corrupt")
    done = inspect("verify", folder, "--quarantine")
    assert done.code == 1
    assert "array target of shard s1" in done.out
    assert "moved 1 commits" in done.out
    assert [file.name for file in (folder / "commits").iterdir()] == ["s0.json"]
    assert [file.name for file in (folder / "quarantine").iterdir()] == ["s1.json"]
    assert inspect("verify", folder).code == 0
    assert json.loads(inspect("summary", folder, "--json").out)["num_quarantined"] == 1


def test_what_the_store_refuses_is_not_checked_and_not_moved(fresh, inspect, monkeypatch):
    """Beside a shard that is damaged, one of images and one of texts that may not be read, and are sound."""
    folder = fresh("corrupt")
    ranges = CacheStore.ranges

    def refused(store, name, spans):
        if name.startswith(("shards/s0/", "texts/t0/")):
            raise PermissionDeniedError("403 ExpiredToken")
        return ranges(store, name, spans)

    with monkeypatch.context() as patch:
        patch.setattr(CacheStore, "ranges", refused)
        done = inspect("verify", folder, "--quarantine")
    assert done.code == 1
    assert "1 bad: s1; 2 not checked: s0, texts/t0" in done.out
    assert "s0  not checked: Could not read" in done.out
    assert "verify again" in done.out
    assert [file.name for file in (folder / "quarantine").rglob("*.json")] == ["s1.json"]
    # Where nothing is bad the exit code says all the same that something was not checked.
    (folder / "quarantine" / "s1.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(CacheStore, "ranges", refused)
        done = inspect("verify", folder)
    assert (done.code, "read: 2 not checked: s0, texts/t0" in done.out) == (1, True)
    assert "what it needs could not be read" in done.out
    assert "all sound" in inspect("verify", folder).out


def test_a_list_that_the_store_refuses_ends_nothing(fresh, inspect, monkeypatch):
    """The lists of skipped rows, and the labels of a set: the shards are not checked, the others are."""
    folder = fresh("corrupt")
    labels = folder / "labels/mine"
    labels.mkdir(parents=True)
    (labels / "s0.json").write_text("{}")
    get = CacheStore.get

    def refused(store, name):
        if name.startswith(("skipped/s0/", "labels/mine/s0")):
            raise refuse("read", name, errno.EIO, "")
        return get(store, name)

    for what in ("skipped", "labels"):
        with monkeypatch.context() as patch:
            patch.setattr(
                CacheStore, "get", lambda store, name, what=what: (refused if what in name else get)(store, name)
            )
            done = inspect("verify", folder)
        assert done.code == 1
        assert "1 bad: s1; 1 not checked: s0" in done.out, what
        assert "s0  not checked: Could not read" in done.out


def test_only_the_commit_that_was_checked_is_moved(fresh, states):
    """Another process moved it, and then made the shard again, while this one was still checking."""
    folder = fresh("corrupt")
    found = verify(str(folder))
    assert quarantine(str(folder), found) == ["s1"]
    first = (folder / "quarantine" / "s1.json").read_bytes()
    assert quarantine(str(folder), found) == []
    again = (states("healthy") / "commits" / "s1.json").read_bytes()
    assert again != first
    (folder / "commits" / "s1.json").write_bytes(again)
    assert quarantine(str(folder), found) == []
    assert (folder / "commits" / "s1.json").read_bytes() == again
    # Found bad in its turn (its attempt is not there), it overwrites nothing.
    assert quarantine(str(folder), verify(str(folder))) == ["s1"]
    kept = {file.name: file.read_bytes() for file in (folder / "quarantine").iterdir()}
    assert kept == {"s1.json": first, "s1.2.json": again}
