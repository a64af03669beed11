"""What lies beside the shards of a hostile cache: label sets, lists of skipped rows, configurations."""

import json
import math
import shutil

import pytest
from typer.testing import CliRunner

from inpo.common.cache import open_cache
from inpo.common.cache.labels import LabelSet, PairLabel, read_labels, write_labels
from inpo.common.errors import CacheError
from inpo.inspection.cli import app
from inpo.inspection.verify import quarantine, verify
from tests.cache.forging import DEEP, RANDOM, edit, verified

LABELS = {
    "an attempt elsewhere": ("attempt", DEEP),
    "a label above one": ("pairs.a.label", 1.5),
    "a score that is none": ("pairs.a.scores", [math.nan, 0.0]),
    "a temperature of nothing": ("temperature", 0.0),
    "a temperature without end": ("temperature", math.inf),
    "a scorer without end": ("scorer", "x" * 10_000),
    "more pairs than a shard has": ("pairs", {str(row): {"scores": [1, 0], "label": 1} for row in range(257)}),
}


@pytest.mark.parametrize("name", LABELS)
def test_a_forged_label_set_is_refused(folder, name):
    field, value = LABELS[name]
    cache = open_cache(str(folder))
    labels = LabelSet(
        attempt=cache.shards["s0"].commit.attempt,
        scorer="eye",
        temperature=1.0,
        source="/pairs",
        pairs={"a": PairLabel(scores=(1.0, 0.0), label=0.7)},
    )
    assert write_labels(cache.store, "mine", "s0", labels)
    file = folder / "labels" / "mine" / "s0.json"
    document = json.loads(file.read_text())
    edit(document, field, value)
    text = json.dumps({**document, "checksum": ""})
    file.write_text(text)
    with pytest.raises(CacheError) as caught:
        read_labels(cache, "mine")
    assert str(file) in str(caught.value)
    findings = [finding for finding in verified(folder) if finding.check == "labels"]
    assert any(finding.shard == "s0" for finding in findings)


def test_a_set_whose_name_is_a_path_is_no_set(folder):
    (folder / "labels" / "..x").mkdir(parents=True)
    (folder / "labels" / "..x" / "s0.json").write_text("{}")
    assert json.loads(CliRunner().invoke(app, ["summary", str(folder), "--json"]).output)["label_sets"] == []


SKIPPED = {
    "another reason": lambda text: text.replace("tie", "bad_label"),
    "another id": lambda text: text.replace('"pair_id": "tie"', '"pair_id": "tie2"'),
    "a line more": lambda text: text + text,
    "cut": lambda text: text[:-9],
    "empty": lambda text: "",
    "no text": lambda text: "\0\0",
}


@pytest.mark.parametrize("name", SKIPPED)
def test_a_changed_list_of_skipped_rows_is_found_and_can_be_made_again(folder, name):
    (file,) = (folder / "skipped" / "s0").iterdir()
    file.write_text(SKIPPED[name](file.read_text()))
    verification = verify(str(folder))
    (finding,) = (each for each in verification.findings if each.check not in RANDOM)
    assert (finding.shard, finding.check) == ("s0", "skipped")
    assert str(file) in finding.detail
    assert "s0" in quarantine(str(folder), verification)


def test_a_list_that_is_lost_and_one_that_nothing_counts_are_found(folder):
    (file,) = (folder / "skipped" / "s0").iterdir()
    (attempt,) = (folder / "shards" / "s1").iterdir()
    (folder / "skipped" / "s1").mkdir()
    shutil.move(file, folder / "skipped" / "s1" / f"{attempt.name}.jsonl")
    assert [(each.shard, each.check) for each in verified(folder)] == [("s0", "skipped"), ("s1", "skipped")]


def test_a_changed_configuration_is_found(folder):
    assert verified(folder) == []
    (file,) = (folder / "configurations").iterdir()
    file.write_text(file.read_text().replace('"x"', '"y"'))
    (finding,) = verified(folder)
    assert (finding.check, finding.remake) == ("configurations", False)


def test_a_removed_commit_is_told_where_something_tells_it(folder):
    cache = open_cache(str(folder))
    pairs = {str(each): PairLabel(scores=(1.0, 0.0), label=0.7) for each in cache.shards["s0"].read("pair/id")}
    labels = LabelSet(
        attempt=cache.shards["s0"].commit.attempt, scorer="eye", temperature=1.0, source="/pairs", pairs=pairs
    )
    assert write_labels(cache.store, "mine", "s0", labels)
    (folder / "commits" / "s0.json").unlink()
    (folder / "surprise").write_text("")
    found = verify(str(folder))
    (finding,) = verified(folder)
    assert (finding.shard, finding.check) == ("s0", "labels")
    assert "no commit" in finding.detail
    notes = "\n".join(found.notes)
    for words in ("1 shards have an attempt and no commit (s0)", "surprise", "not known from here"):
        assert words in notes
