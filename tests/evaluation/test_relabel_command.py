"""`inpo relabel`: its options, several scorers, labels from a file."""

import json
import shutil
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner, Result

from inpo.common.cache import open_cache
from inpo.common.cache.labels import read_labels, read_shard_labels
from inpo.common.errors import DataError, UsageError
from inpo.evaluation.cli import relabel
from inpo.evaluation.combine import combine_sets
from inpo.inspection.cli import app as inspect
from tests.evaluation.labelling import REDS, by_name


@pytest.mark.usefixtures("plugin")
def test_the_command(cache: Path, source: Path) -> None:
    app = Typer()
    app.command()(relabel)
    result = CliRunner().invoke(app, [str(cache), "--pairs", str(source), "--scorer", "red"])
    assert result.exit_code == 0, result.output
    assert "label set red: 4 pairs in 2 shards, temperature 50" in result.output
    assert "25.0% of them, and neither in 1" in result.output
    assert len(by_name(read_labels(open_cache(str(cache)), "red"))) == 4
    for temperature in ("0", "-1", "nan", "inf"):
        bad = CliRunner().invoke(
            app, [str(cache), "--pairs", str(source), "--scorer", "red", "--temperature", temperature]
        )
        assert isinstance(bad.exception, UsageError)
        assert "--temperature" in str(bad.exception)


def command(*words: object) -> Result:
    app = Typer()
    app.command()(relabel)
    return CliRunner().invoke(app, list(map(str, words)))


SCORERS = ("--scorer", "red", "--scorer", "dark", "--scorer", "coarse")
"""Of first, second, third, fifth: red W L - L, dark L W - W, coarse W L - -."""


@pytest.mark.usefixtures("plugin")
def test_several_scorers_are_combined_and_agree(cache: Path, source: Path, tmp_path: Path) -> None:
    combined = ("--pairs", source, *SCORERS, "--combine", "vote", "--set", "voted")
    assert command(cache, "--pairs", source, "--scorer", "red", "--temperature", 7).exit_code == 0
    refused = command(cache, *combined).exception
    assert isinstance(refused, UsageError)
    assert f"for --combine, which labels by each scorer at its own temperature, give {cache}/labels/red" in refused.fix
    (cache / "labels/red").rename(cache / "labels/seven")
    done = command(cache, *combined)
    assert done.exit_code == 0, done.output
    assert read_labels(open_cache(str(cache)), "seven").keys() == read_labels(open_cache(str(cache)), "red").keys()
    shutil.rmtree(cache / "labels/seven")
    assert "the vote of red, dark, coarse prefers the source's win in 25.0% of them, and neither in 2" in done.output
    opened = open_cache(str(cache))
    votes = by_name(read_labels(opened, "voted"))
    assert votes == pytest.approx({"first": 2 / 3, "second": 1 / 3, "third": 0.5, "fifth": 0.5})
    # Votes are of pairs: an image of several pairs has no number of its own that a list could be ordered by.
    labelled = [labels for shard in opened if (labels := read_shard_labels(opened.store, "voted", shard.name))]
    assert {pair.scores for labels in labelled for pair in labels.pairs.values()} == {None}
    combine_sets(opened, ("red", "dark", "coarse"), how="mean", set_name="meant")
    own = [by_name(read_labels(opened, name)) for name in ("red", "dark", "coarse")]
    assert by_name(read_labels(opened, "meant")) == pytest.approx(
        {name: sum(each[name] for each in own) / 3 for name in votes}
    )
    # The same command again says the same; a set of another kind under its name is refused.
    assert command(cache, "--pairs", source, *SCORERS, "--combine", "vote", "--set", "voted").exit_code == 0
    with pytest.raises(UsageError, match="there already"):
        combine_sets(opened, ("red", "dark"), how="vote", set_name="voted")
    # Also one that is not complete: it is not filled with labels of another kind before it is refused.
    first, *others = sorted((cache / "labels/voted").iterdir())
    first.unlink()
    with pytest.raises(UsageError, match="there already"):
        combine_sets(opened, ("red", "dark"), how="vote", set_name="voted")
    assert sorted((cache / "labels/voted").iterdir()) == others != []
    # Consensus: combined sets are not scorers, a tie prefers no side.
    out = tmp_path / "agreed"
    for agree, names in (("2/3", ["first", "second"]), ("1/3", ["first", "second", "fifth"]), ("3/3", [])):
        listed = CliRunner().invoke(inspect, ["filter", str(cache), "--agree", agree, "--out", str(out)])
        assert listed.exit_code == 0, listed.output
        assert [name for name in REDS if name in out.read_text()] == names
        out.unlink()
    both = ("--agree", "2/2", "--labels", "red", "--labels", "coarse", "--where", "label > 0.5")
    listed = CliRunner().invoke(inspect, ["filter", str(cache), *both])
    assert [name for name in REDS if name in listed.stdout] == ["first", "second"]
    # Without a condition every pair is listed, once for each of its points.
    every = CliRunner().invoke(inspect, ["filter", str(cache)])
    assert every.exit_code == 0, every.output
    assert all(name in every.stdout for name in votes)
    for wrong in (
        ("--agree", "4/5"),
        ("--agree", "3/2"),
        ("--agree", "most"),
        ("--agree", "2/2", "--labels", "red"),
        ("--agree", "1/2", "--labels", "red", "--labels", "meant"),
        ("--where", "label > 0.5", "--labels", "red"),
    ):
        with pytest.raises(UsageError):
            raise CliRunner().invoke(inspect, ["filter", str(cache), *wrong]).exception or AssertionError(wrong)


@pytest.mark.usefixtures("plugin")
def test_options_that_do_not_go_together_are_refused(cache: Path, source: Path, tmp_path: Path) -> None:
    for words in (
        (),
        ("--scorer", "red"),
        ("--pairs", source, "--scorer", "red", "--scorer", "dark"),
        ("--pairs", source, "--scorer", "red", "--combine", "vote"),
        ("--pairs", source, *SCORERS, "--combine", "vote"),
        ("--pairs", source, *SCORERS, "--combine", "vote", "--set", "red"),
        ("--pairs", source, *SCORERS, "--combine", "vote", "--set", "x", "--temperature", 1),
        ("--pairs", source, "--scorer", "red", "--smpo"),
        ("--from", tmp_path / "labels.jsonl"),
        ("--from", tmp_path / "labels.jsonl", "--scorer", "red", "--set", "x"),
        ("--from", tmp_path / "labels.jsonl", "--set", "x", "--temperature", 1),
        ("--from", tmp_path / "labels.jsonl", "--set", "x", "--pairs", source),
        ("--from", tmp_path / "labels.jsonl", "--set", "x", "--batch-size", 999),
        ("--from", tmp_path / "labels.jsonl", "--set", "x", "--columns", "win=a,lose=b"),
    ):
        assert isinstance(command(cache, *words).exception, UsageError), words


def test_labels_come_from_a_file_too(cache: Path, tmp_path: Path) -> None:
    opened = open_cache(str(cache))
    ids = [str(pair_id) for shard in opened for pair_id in shard.read("pair/id")]
    rows = [{"pair_id": pair_id, "label": label} for pair_id, label in zip(ids, (0.2, 1, [0.7], 0.5), strict=True)]
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert command(cache, "--from", file, "--set", "mine").exit_code == 0
    found = {pair_id: label for shard in read_labels(opened, "mine").values() for pair_id, label in shard.items()}
    assert found == pytest.approx(dict(zip(ids, (0.2, 1, 0.7, 0.5), strict=True)))
    file.write_text(file.read_text().replace("0.2", "0.3"))
    with pytest.raises(UsageError, match=f"the labels of file from {file} that are there\n.*other labels of file"):
        raise command(cache, "--from", file, "--set", "mine").exception or AssertionError
    for line, says in (
        (json.dumps({"pair_id": ids[0], "label": 1.5}), '"label": 1.5}'),
        (json.dumps({"pair_id": ids[0], "label": float("nan")}), '"label": NaN}'),
        (json.dumps({"pair_id": ids[0], "label": True}), '"label": true}'),
        (json.dumps({"pair_id": ids[0], "label": "0.9"}), '"label": "0.9"}'),
        (json.dumps({"pair_id": ids[0], "label": [0.1, 0.2]}), "2 labels"),
        (json.dumps(rows[0]) + "\n" + json.dumps(rows[0]), "again"),
        (json.dumps(rows[0]), "no label for a committed pair"),
        ("[" * 100_000, "line 1"),
        ("nothing", "line 1"),
    ):
        file.write_text(line)
        failed = command(cache, "--from", file, "--set", "other").exception
        assert isinstance(failed, DataError)
        assert says in str(failed)
    assert not (cache / "labels/other").exists()
