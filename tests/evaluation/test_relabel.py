"""Label sets from a source's images, beside shards that nothing touches."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from inpo.common.cache import open_cache
from inpo.common.cache.labels import LabelSet, read_labels, write_labels
from inpo.common.errors import CacheIncomplete, CacheMismatch, DataError, InpoError, UsageError
from inpo.common.pairs import open_source
from inpo.evaluation.relabel import relabel_cache
from inpo.train.index import build_index
from inpo.train.objectives import OBJECTIVES
from inpo.train.records import Needs
from inpo.train.stream import RecordStream
from tests.evaluation.labelling import REDS, by_name, png, write_cache, write_source

ROOT = Path(__file__).parents[2]


def run(cache: Path, source: Path, scorer, **options: object):
    values = {"set_name": "reds", "temperature": 50.0} | options
    return relabel_cache(open_cache(str(cache)), open_source(str(source)), scorer, **values)


def test_every_committed_pair_gets_scores_and_a_probability(cache: Path, source: Path, counting) -> None:
    before = {file: file.read_bytes() for file in cache.rglob("*") if file.is_file()}
    report = run(cache, source, counting)
    got = by_name(read_labels(open_cache(str(cache)), "reds"))
    expected = {name: 1 / (1 + math.exp(-(win - lose) / 50)) for name, (win, lose) in REDS.items() if name != "fourth"}
    assert got == pytest.approx(expected)
    assert got["second"] < 0.5
    assert (report.num_shards, report.num_pairs, report.num_agreeing, report.num_ties) == (2, 4, 1, 1)
    documents = [json.loads(file.read_text()) for file in (cache / "labels" / "reds").iterdir()]
    scores = [pair["scores"] for document in documents for pair in document["pairs"].values()]
    assert sorted(scores) == sorted([list(map(float, REDS[name])) for name in expected])
    assert {document["scorer"] for document in documents} == {"counting"}
    assert all(file.read_bytes() == data for file, data in before.items())
    assert "a fourth" not in counting.asked
    assert counting.asked.count("a first") == 2


def test_a_stopped_run_goes_on(cache: Path, source: Path, counting) -> None:
    run(cache, source, counting)
    first, _second = sorted((cache / "labels" / "reds").iterdir())
    first.unlink()
    with pytest.raises(CacheIncomplete, match="not complete"):
        read_labels(open_cache(str(cache)), "reds")
    counting.asked.clear()
    run(cache, source, counting)
    assert {*counting.asked} == {"a first", "a second"}
    assert len(by_name(read_labels(open_cache(str(cache)), "reds"))) == 4


KILLED = """
import os, signal, sys
from inpo.common.cache import open_cache
from inpo.common.pairs import open_source
from inpo.evaluation.relabel import relabel_cache

class Dying:
    name = "counting"
    def score(self, images, prompts):
        if "a fifth" in prompts:  # the last pair of the second shard
            os.kill(os.getpid(), signal.SIGKILL)
        return [image.getpixel((0, 0))[0] for image in images]

relabel_cache(open_cache(sys.argv[1]), open_source(sys.argv[2]), Dying(), set_name="reds", temperature=50.0,
              pairs_per_batch=1)
"""


def test_a_killed_run_leaves_whole_shards_and_goes_on(cache: Path, source: Path, counting) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, str(cache), str(source)], env=environment, timeout=200)
    assert done.returncode == -signal.SIGKILL
    (kept,) = (cache / "labels" / "reds").iterdir()
    before = kept.read_bytes()
    with pytest.raises(CacheIncomplete, match=r"none for 1(.|\n)*goes on where it stopped"):
        read_labels(open_cache(str(cache)), "reds")
    run(cache, source, counting)
    assert {*counting.asked} == {"a third", "a fifth"}
    assert kept.read_bytes() == before
    labels = by_name(read_labels(open_cache(str(cache)), "reds"))
    assert labels == pytest.approx(
        {name: 1 / (1 + math.exp((lose - win) / 50)) for name, (win, lose) in REDS.items() if name != "fourth"}
    )


def test_training_swaps_the_sides_of_a_pair_that_the_scorer_turns_round(cache: Path, source: Path, counting) -> None:
    run(cache, source, counting)
    index = build_index([open_cache(str(cache))], soft=False, held_out=0.0, labels="reds")
    assert index.num_pairs == 3  # the tie is left out
    stream = RecordStream(index, Needs(), batch_size=3, window_shards=2, seed=0)
    label = next(iter(stream)).label
    stream.close()
    win, lose = 0.3, 0.7
    error, reference = torch.tensor([[win, lose]] * 3), torch.full((3, 2), 0.5)
    # The model is better than the reference on the side called win: right where the label is above one half.
    margin = OBJECTIVES["inpo"].function(error, reference, label, 10.0).margin
    assert sorted(zip(label.tolist(), margin.tolist(), strict=True)) == [
        (pytest.approx(1 / (1 + math.exp(100 / 50))), pytest.approx(-2.0)),  # second
        (pytest.approx(1 / (1 + math.exp(10 / 50))), pytest.approx(-2.0)),  # fifth
        (pytest.approx(1 / (1 + math.exp(-100 / 50))), pytest.approx(2.0)),  # first
    ]
    soft = build_index([open_cache(str(cache))], soft=True, held_out=0.0, labels="reds")
    assert soft.num_pairs == 4


def test_an_image_lost_or_damaged_since_is_named(cache: Path, source: Path, counting) -> None:
    (source / "third-lose.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"third(.|\n)*to do"):
        run(cache, source, counting)
    (source / "third-lose.png").unlink()
    with pytest.raises(InpoError, match=r"third(.|\n)*to do"):
        run(cache, source, counting)
    # What was labelled before it stays.
    assert len(list((cache / "labels" / "reds").iterdir())) == 1


def test_images_that_were_exchanged_or_replaced_since_are_told(cache: Path, source: Path, counting) -> None:
    """The list of a folder knows them by their names alone."""
    for name, (win, lose) in (("first", (100, 200)), ("second", (50, 151))):
        for side, red in (("win", win), ("lose", lose)):
            (source / f"{name}-{side}.png").write_bytes(png(red))
        wrong = "win" if name == "first" else "lose"
        with pytest.raises(DataError, match=rf"not the one that was inverted(.|\n)*{name}, {wrong}"):
            run(cache, source, counting)
        for side, red in zip(("win", "lose"), REDS[name], strict=True):
            (source / f"{name}-{side}.png").write_bytes(png(red))
    assert run(cache, source, counting).num_pairs == 4


def test_labels_that_were_corrected_in_a_parquet_file_are_told(tmp_path: Path, counting) -> None:
    """Its size and footer are the same."""
    file = tmp_path / "pairs.parquet"

    def write(labels: list[float]) -> None:
        sides = {"jpg_0": [png(10), png(10)], "jpg_1": [png(200), png(200)], "caption": ["p", "q"]}
        pq.write_table(pa.table({**sides, "label_0": labels, "label_1": labels[::-1]}), file)

    write([1.0, 0.0])
    cache = write_cache(tmp_path / "cache", file, rows=[(0, 2)])
    write([0.0, 1.0])
    with pytest.raises(DataError, match=r"not what the cache was made from(.|\n)*unchanged"):
        run(cache, file, counting)


def test_labels_of_other_shards_are_refused_and_made_anew(cache: Path, source: Path, counting, tmp_path: Path) -> None:
    run(cache, source, counting)
    again = write_cache(tmp_path / "again", source)
    (cache / "labels").rename(again / "labels")
    with pytest.raises(CacheMismatch, match="other shards"):
        read_labels(open_cache(str(again)), "reds")
    assert run(again, source, counting).num_replaced == 2
    assert len(by_name(read_labels(open_cache(str(again)), "reds"))) == 4


def test_a_set_has_one_scorer_and_temperature(cache: Path, source: Path, counting) -> None:
    run(cache, source, counting)
    with pytest.raises(UsageError, match="temperature 50"):
        run(cache, source, counting, temperature=1.0)
    run(cache, source, counting, temperature=1.0, set_name="sharp")
    sharp = by_name(read_labels(open_cache(str(cache)), "sharp"))
    assert sharp["first"] > 0.999
    with pytest.raises(CacheIncomplete, match="reds, sharp"):
        read_labels(open_cache(str(cache)), "other")


def test_another_source_is_refused(cache: Path, source: Path, counting, tmp_path: Path) -> None:
    changed = write_source(tmp_path / "changed", {**REDS, "sixth": (1, 2)})
    with pytest.raises(DataError, match="not what the cache was made from"):
        run(cache, changed, counting)
    with pytest.raises(CacheIncomplete):
        read_labels(open_cache(str(cache)), "reds")


def test_one_writer_wins(cache: Path) -> None:
    store = open_cache(str(cache)).store
    labels = LabelSet(attempt="a" * 16, scorer="s", temperature=1.0, source="x", pairs={})
    assert write_labels(store, "set", "shard", labels)
    assert not write_labels(store, "set", "shard", labels)
    with pytest.raises(UsageError, match="name of a label set"):
        write_labels(store, "../set", "shard", labels)
