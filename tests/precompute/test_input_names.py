"""The names of input shards: a file keeps the one that the cache has, when files of its name come beside it or go."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inpo.common.cache import open_cache
from inpo.common.pairs import open_source
from inpo.evaluation.relabel import relabel_cache


class Height:
    """A scorer."""

    name, preference_temperature = "height", 1.0

    def score(self, images: Any, prompts: Any) -> np.ndarray:
        return np.array([float(image.height) for image in images])


def test_a_file_keeps_its_name_when_another_of_its_name_comes_or_goes(
    pipelines: Callable,
    examples: Callable,
    write_tars: Callable,
    run: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is committed is neither made again nor counted twice, whatever lies beside its file."""
    model, cache, place = pipelines(), tmp_path / "cache", tmp_path / "pairs"
    both = f"{place}/**/*.tar"

    def names(source: str) -> dict[str, str]:
        """{input shard: its pair} of the cache after a run that warns of nothing."""
        capsys.readouterr()
        found = run.cache(source, model, cache)
        assert "warning" not in capsys.readouterr().err
        return {shard.commit.source.input_shard: str(shard.read("pair/id")[0]) for shard in found}

    write_tars(place / "a", examples(2), 1)
    alone = {"00000": "pair-000", "00001": "pair-001"}
    assert names(str(place / "a" / "00000.tar")) == {"00000": "pair-000"}
    assert names(both) == alone
    before = open_cache(str(cache)).commits
    write_tars(place / "b", examples(1, first=7), 1)
    calls = run.network_calls
    assert names(both) == {**alone, "b-00000": "pair-007"}
    assert run.network_calls - calls == calls // 2
    # Labels find the files by the same names.
    labelled = relabel_cache(open_cache(str(cache)), open_source(both), Height(), set_name="height", temperature=1.0)
    assert labelled.num_pairs == 3
    # By another pattern, and where one of them has gone.
    assert names(str(place / "b")) == names(f"{place}/[ab]/*.tar") == {**alone, "b-00000": "pair-007"}
    (place / "a" / "00000.tar").rename(tmp_path / "kept.tar")
    assert names(both) == {**alone, "b-00000": "pair-007"}
    assert run.network_calls - calls == calls // 2
    assert before.items() < open_cache(str(cache)).commits.items()
    # A copy is told as one.
    shutil.copytree(place / "b", place / "c")
    run.cache(both, model, cache)
    said = capsys.readouterr().err
    assert "input c-00000 holds what b-00000 held" in said
    assert "Both files are there: stop and leave one of them out" in said


def test_a_file_that_may_be_a_committed_one_is_left_out_and_told(
    pipelines: Callable, examples: Callable, write_tars: Callable, run: Callable, tmp_path: Path, capsys: Any
) -> None:
    """Two files of one name, and neither is what the cache has under it: one may have changed since."""
    model, cache, place = pipelines(), tmp_path / "cache", tmp_path / "pairs"
    write_tars(place / "a", examples(1), 1)
    before = run.cache(f"{place}/**/*.tar", model, cache).commits
    write_tars(place / "a", examples(1, first=3), 1)
    write_tars(place / "b", examples(2, first=7), 1)
    assert run(f"{place}/**/*.tar", model, cache) == 1
    said = capsys.readouterr().err
    for words in ("cannot be told", "a-00000", "b-00000", "input shard 00000 was made from", "put it back as it was"):
        assert words in said
    after = open_cache(str(cache)).commits
    assert [commit.source.input_shard for name, commit in after.items() if name not in before] == ["b-00001"]
    assert before.items() < after.items()
    # Doing as the message says makes the new one.
    write_tars(place / "a", examples(1), 1)
    assert run(f"{place}/**/*.tar", model, cache) == 0
    found = {str(shard.read("pair/id")[0]): shard.commit.source.input_shard for shard in open_cache(str(cache))}
    assert found == {"pair-000": "00000", "pair-007": "b-00000", "pair-008": "b-00001"}
