"""Shards of the run's own names that another source, or nobody, has made."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import inpo.precompute.run as run_module
from inpo.common.cache import open_cache
from inpo.precompute.pipeline import Outcome
from inpo.precompute.worker import ShardWorker


def test_another_sources_file_of_the_same_name_is_left_out_and_told(
    pipelines: Callable,
    examples: Callable,
    write_tars: Callable,
    run: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Files are often called alike. Those of the cache stay, and nobody is told that the new ones are in it."""
    model, cache = pipelines(), tmp_path / "cache"
    first = write_tars(tmp_path / "one", examples(1), 1)
    before = run.cache(first, model, cache)
    (name,) = (commit.source.input_shard for commit in before.commits.values())
    capsys.readouterr()
    other = write_tars(tmp_path / "two", examples(1, first=5), 1)
    assert run(other, model, cache) == 1
    said = capsys.readouterr().err
    for words in ("Another source's file of this name", f"{other}: {name}", f"made from: {first}", "rename the file"):
        assert words in said
    assert "committed:" not in said
    assert open_cache(str(cache)).commits == before.commits
    # Beside it a file of a name of its own is made.
    write_tars(tmp_path / "two", examples(2, first=5), 1)
    assert run(other, model, cache) == 1
    assert "committed: 1 of 1 shards, 1 pairs" in capsys.readouterr().err
    after = open_cache(str(cache))
    assert len(after.commits) == 2
    assert after.commits.items() > before.commits.items()
    # Also where both have one name in two folders that are worked in.
    monkeypatch.chdir(tmp_path / "one")
    assert run(".", model, tmp_path / "third") == 0
    monkeypatch.chdir(tmp_path / "two")
    assert run(".", model, tmp_path / "third") == 1
    assert "Another source's file of this name" in capsys.readouterr().err
    # The same rows at another place are the same source.
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    assert run(str(tmp_path / "moved"), model, cache) == 0


def test_who_loses_a_race_to_another_source_says_so(
    pipelines: Callable,
    examples: Callable,
    write_tars: Callable,
    run: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two runs from two folders with files of one name: both found the cache empty. What the other has committed stays,
    and is not counted as this source's; whether it is met before reading, at the commit, or by Ray's driver."""
    model = pipelines()
    first = write_tars(tmp_path / "one", examples(1), 1)
    theirs = run.cache(first, model, tmp_path / "theirs").commits
    second = write_tars(tmp_path / "two", examples(1, first=5), 1)

    def fails(cache: Path, number: int, method: str | None) -> None:
        """The other commits right before this run calls a method of its worker; None: Ray's driver asks."""

        def meanwhile() -> None:
            shutil.copytree(tmp_path / "theirs", cache, dirs_exist_ok=True)

        def by_a_dead_worker(phase: Any, tasks: Any, *, on_outcome: Any, **told: Any) -> str:
            meanwhile()
            for task in tasks.values():
                on_outcome(Outcome(task=task))
            return ""

        capsys.readouterr()
        with monkeypatch.context() as patch:
            if method is None:
                patch.setattr(run_module, "run_local", by_a_dead_worker)
            else:
                own = getattr(ShardWorker, method)
                patch.setattr(ShardWorker, method, lambda *given: (meanwhile(), own(*given))[1])
            assert run(second, model, cache) == 1
        said = capsys.readouterr().err
        for words in ("Another source's file of this name", f"{second}: 00000", f"made from: {first}", "left out: 1"):
            assert words in said
        assert f"committed: {number} of {number + 1} shards, {number} pairs" in said
        assert "by another writer first" not in said
        assert ("next: inpo train" in said) == (number > 0)
        found = open_cache(str(cache)).commits
        assert theirs.items() <= found.items()
        assert len(found) == number + 1

    fails(tmp_path / "at-the-commit", 0, "write")
    fails(tmp_path / "told-by-ray", 0, None)
    write_tars(tmp_path / "two", examples(2, first=5), 1)
    fails(tmp_path / "before-reading", 1, "is_committed")


@pytest.mark.parametrize("lost", [0, 1])
def test_an_input_of_which_another_source_has_committed_a_shard_is_left_out_as_a_whole(
    pipelines: Callable,
    examples: Callable,
    write_tars: Callable,
    run: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    lost: int,
) -> None:
    """Else each of two sources has parts of it. What was committed before that stays, and is told; so are the shards
    that were read ahead, which no other has."""
    monkeypatch.setattr("inpo.precompute.tasks.MAX_PAIRS_PER_SHARD", 1)
    model, cache = pipelines(), tmp_path / "cache"
    theirs = run.cache(write_tars(tmp_path / "one", examples(4), 4), model, tmp_path / "theirs").commits
    second = write_tars(tmp_path / "two", examples(4, first=5), 4)
    write, name = ShardWorker.write, f"00000-{lost:08d}"

    def meanwhile(self: ShardWorker, task: Any, data: Any) -> Any:
        if task.name == name:
            for place in (f"shards/{name}", "texts", "text-commits"):
                shutil.copytree(tmp_path / "theirs" / place, cache / place, dirs_exist_ok=True)
            (cache / "commits").mkdir(exist_ok=True)
            shutil.copy(tmp_path / "theirs" / "commits" / f"{name}.json", cache / "commits")
        return write(self, task, data)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(ShardWorker, "write", meanwhile)
        assert run(second, model, cache) == 1
    said = capsys.readouterr().err
    found = open_cache(str(cache)).commits
    assert found.keys() == {f"00000-{number:08d}" for number in range(lost + 1)}
    assert found[name] == theirs[name]
    assert f"committed: {lost} of 4 shards, {lost} pairs" in said
    assert said.count("Another source's file of this name") == 1
    assert "input shards left out: 1" in said
    assert ("1 shards of what is left out had been committed from this source and stay, 00000-00000000" in said) == lost
    assert run(second, model, cache) == 1
    assert open_cache(str(cache)).commits == found


def test_a_run_that_ends_without_all_its_shards_has_failed(
    pipelines: Callable, tars: Callable, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    write = ShardWorker.write

    def moved(self: ShardWorker, task: Any, data: Any) -> Any:
        commit = write(self, task, data)
        if task.start == 0 and task.input_shard.name == "00001":
            self.writer.store.remove(f"commits/{task.name}.json")
        return commit

    monkeypatch.setattr(ShardWorker, "write", moved)
    assert run(tars(2, 1), pipelines(), tmp_path / "cache") == 1
    said = capsys.readouterr().err
    for words in ("committed: 1 of 2 shards", "1 shards are not committed, 00001-00000000 first", "same command again"):
        assert words in said
