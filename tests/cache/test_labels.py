"""Label sets lie outside zarr and its checksums: their own seal tells every damaged byte."""

import json
from pathlib import Path

import pytest

from inpo.common.cache import open_cache
from inpo.common.cache.labels import LabelSet, PairLabel, read_labels, write_labels
from inpo.common.errors import CacheCorrupt, CacheSchemaError
from inpo.inspection.verify import verify


@pytest.fixture
def labelled(tmp_path, build) -> Path:
    """A cache of two shards with the label set `mine`; the file of the first shard's labels."""
    build.cache(tmp_path, pairs=(2, 1), profile="lean")
    cache = open_cache(str(tmp_path))
    for name, shard in cache.shards.items():
        pairs = {
            str(pair_id): PairLabel(scores=(0.5, 0.25 * row), label=0.75)
            for row, pair_id in enumerate(shard.read("pair/id"))
        }
        labels = LabelSet(attempt=shard.commit.attempt, scorer="eye", temperature=1.0, source="/pairs", pairs=pairs)
        assert write_labels(cache.store, "mine", name, labels)
    return tmp_path / "labels" / "mine" / "s0.json"


def read(file: Path) -> dict[str, dict[str, float]]:
    return read_labels(open_cache(str(file.parents[2])), "mine")


def test_a_whole_set_is_read_and_verified(labelled):
    assert read(labelled)["s0"] == {"pair-0-0 ä": 0.75, "pair-0-1 ä": 0.75}
    found = verify(str(labelled.parents[2]))
    assert found.findings == []
    assert found.num_checked["labels"] == 3


def test_every_flipped_byte_is_detected_or_changes_nothing(labelled):
    before = labelled.read_bytes()
    whole = LabelSet.from_json(before, str(labelled))
    messages: list[str] = []
    for position in range(len(before)):
        after = bytearray(before)
        after[position] ^= 0x02
        try:
            assert LabelSet.from_json(bytes(after), str(labelled)) == whole
            # White space may take another form.
            assert json.loads(bytes(after)) == json.loads(before)
        except (CacheCorrupt, CacheSchemaError) as error:
            messages.append(str(error))
    print(f"label set: {len(messages)} of {len(before)} flipped bytes detected, the others are white space")
    assert len(messages) > 0.5 * len(before)
    assert all(str(labelled) in message and "inpo relabel" in message for message in messages)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("0.75", "0.25", 1),
        lambda text: text.replace('"scorer": "eye"', '"scorer": "ear"'),
        lambda text: text.replace("pair-0-1", "pair-0-7"),
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
    ],
    ids=["a label", "the scorer", "a pair", "cut", "empty", "no object"],
)
def test_an_edited_set_is_refused_and_verify_names_it(labelled, change):
    text = labelled.read_text()
    assert change(text) != text
    labelled.write_text(change(text))
    with pytest.raises((CacheCorrupt, CacheSchemaError), match="relabel"):
        read(labelled)
    (finding,) = verify(str(labelled.parents[2])).findings
    assert (finding.shard, finding.check, finding.remake) == ("s0", "labels", False)
    assert str(labelled) in finding.detail
    assert "set mine" in finding.detail


def test_labels_of_another_attempt_are_found_by_verify(labelled):
    other = LabelSet.from_json(labelled.read_bytes(), "here").model_copy(update={"attempt": "feedfeedfeedfeed"})
    labelled.write_bytes(other.to_json())
    (finding,) = verify(str(labelled.parents[2])).findings
    assert "not the labels of the committed pairs" in finding.detail


def test_a_set_without_its_seal_is_refused(labelled):
    """Or whoever edits one would have to remove a line to be believed."""
    document = json.loads(labelled.read_text())
    del document["checksum"]
    labelled.write_text(json.dumps(document))
    with pytest.raises(CacheCorrupt, match="none in the file"):
        read(labelled)
