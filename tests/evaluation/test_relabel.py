"""Label sets from a source's images, beside shards that nothing touches."""

import hashlib
import io
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer import Typer
from typer.testing import CliRunner, Result

from inpo.common.cache import CacheWriter, InverterIdentity, Manifest, ShardData, ShardSource, TextData, open_cache
from inpo.common.cache.labels import LabelSet, read_labels, read_shard_labels, write_labels
from inpo.common.cache.schema import ConditionSpec, LevelTables
from inpo.common.errors import CacheIncomplete, CacheMismatch, DataError, InpoError, UsageError
from inpo.common.levels import Levels
from inpo.common.pairs import Pair, open_source
from inpo.evaluation.cli import relabel
from inpo.evaluation.combine import combine_sets
from inpo.evaluation.relabel import relabel_cache
from inpo.inspection.cli import app as inspect
from inpo.train.index import build_index
from inpo.train.objectives import OBJECTIVES
from inpo.train.records import Needs
from inpo.train.stream import RecordStream

ROOT = Path(__file__).parents[2]

REDS = {"first": (200, 100), "second": (50, 150), "third": (80, 80), "fourth": (255, 0), "fifth": (10, 20)}
"""Red values of (win, lose) by pair id."""


def png(red: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (red, 0, 0)).save(stream, format="PNG")
    return stream.getvalue()


def write_source(folder: Path, reds: dict[str, tuple[int, int]] = REDS) -> Path:
    folder.mkdir()
    lines = []
    for name, sides in reds.items():
        for side, red in zip(("win", "lose"), sides, strict=True):
            (folder / f"{name}-{side}.png").write_bytes(png(red))
        row = {"prompt": f"a {name}", "win": f"{name}-win.png", "lose": f"{name}-lose.png", "id": name}
        lines.append(json.dumps(row) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))
    return folder


def write_cache(location: Path, source: Path, *, rows: Sequence[tuple[int, int]] = ((0, 2), (2, 5))) -> Path:
    """A cache with the contract's arrays, as precompute would commit it for these rows, one pair of them left out."""
    manifest = Manifest(
        latent_shape=(1, 2, 2),
        family="sd",
        levels=LevelTables.of(Levels.from_alphas_cumprod(torch.tensor([0.9 - 0.05 * i for i in range(10)]))),
        conditions={"embedding": ConditionSpec(dtype="float16", axes=("token", "width"), per="prompt")},
        profile="lean",
        seed=0,
        timesteps_per_pair=1,
        group="pair",
        resolution=(8, 8),
        crop="center",
        flip=False,
        vae_latent="mean",
        vae_dtype="float32",
        network_dtype="float32",
        inverter=InverterIdentity(name="ddim", grid_points=5, timestep_range=(0, 10)),
        fingerprints={"network": "0" * 32},
    )
    writer = CacheWriter.open(str(location), manifest)
    (input_shard,) = open_source(str(source)).shards
    texts = {"text": np.array([""], dtype=object), "embedding": np.zeros((1, 2, 2), np.float16)}
    assert writer.write_texts("empty", TextData(arrays=texts)) is not None
    for start, stop in rows:
        pairs = [item for item in input_shard.rows(start, stop) if "fourth" not in item.pair_id]
        assert all(isinstance(pair, Pair) for pair in pairs)
        ids, count = [pair.pair_id for pair in pairs], len(pairs)
        files = [hashlib.blake2b(data, digest_size=16).hexdigest() for pair in pairs for data in (pair.win, pair.lose)]
        images = np.arange(2 * count, dtype=np.int32)
        arrays = {
            "x0": np.zeros((2 * count, 1, 2, 2), np.float16),
            "target": np.zeros((2 * count, 1, 1, 2, 2), np.float16),
            "reference_error": np.zeros((2 * count, 1), np.float32),
            "inversion_error": np.zeros(2 * count, np.float32),
            "timestep": np.zeros((count, 1), np.int16),
            "image/id": np.array(files, dtype=object),
            "image/group": images // 2,
            "image/score": np.full(2 * count, np.nan, np.float32),
            "group/id": np.array(ids, dtype=object),
            "group/prompt": np.zeros((count, 2), np.int32),
            "group/caption_dropped": np.zeros(count, bool),
            "pair/id": np.array(ids, dtype=object),
            "pair/win": images[0::2],
            "pair/lose": images[1::2],
            "pair/label": np.ones(count, np.float32),
        }
        made_from = ShardSource(
            location=str(source),
            input_shard=input_shard.name,
            rows=(start, stop),
            fingerprint=input_shard.fingerprint(),
        )
        assert (
            writer.write(
                f"{input_shard.name}-{start:08d}", ShardData(arrays=arrays, source=made_from, texts=("empty",))
            )
            is not None
        )
    return location


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "pairs")


@pytest.fixture
def cache(tmp_path: Path, source: Path) -> Path:
    return write_cache(tmp_path / "cache", source)


def run(cache: Path, source: Path, scorer, **options: object):
    values = {"set_name": "reds", "temperature": 50.0} | options
    return relabel_cache(open_cache(str(cache)), open_source(str(source)), scorer, **values)


def by_name(labels: dict[str, dict[str, float]]) -> dict[str, float]:
    """Labels by the name in the pair id, whatever a source makes ids of."""
    flat = {pair_id: value for shard in labels.values() for pair_id, value in shard.items()}
    return {name: value for name in REDS for pair_id, value in flat.items() if name in pair_id}


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
    done = command(cache, "--pairs", source, *SCORERS, "--combine", "vote", "--set", "voted")
    assert done.exit_code == 0, done.output
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
    for line, says in (
        (json.dumps({"pair_id": ids[0], "label": 1.5}), "line 1"),
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
