"""`inpo toyworld pairs` and `inpo toyworld prompts` through the command line and the files they leave."""

import io
import json
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from inpo.common.durable import remove
from inpo.common.errors import DataError, UsageError
from inpo.common.pairs import open_source
from inpo.toyworld import pairs as pairs_module
from inpo.toyworld.cli import app
from inpo.toyworld.oracle import OracleScorer
from inpo.toyworld.pairs import TIE_MARGIN, PairSettings, make_pairs
from inpo.toyworld.sampling import MODELS, generate
from inpo.toyworld.scenes import captions

NUM_PAIRS = 12


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(autouse=True, scope="module")
def few_steps():
    """No test here asks how good a picture is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs_module, "generate", partial(generate, steps=5))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("pairs") / "made"
    result = run("pairs", "--out", out, "--pairs", NUM_PAIRS, "--flip-labels", 0.3)
    assert result.exit_code == 0
    # A source that exists, and the size of the pictures: the default is one for other models.
    told = f"--pairs {out / 'parquet'} --model toyworld/base --resolution 64 --cache CACHE"
    assert result.output.splitlines()[-1] == f"next: inpo precompute {told}"
    return out


def read_parquet(folder):
    return [row for path in sorted((folder / "parquet").glob("*")) for row in pq.read_table(path).to_pylist()]


def read_tars(folder):
    samples = {}
    for path in sorted((folder / "webdataset").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, role = member.name.partition(".")
                samples.setdefault(key, {})[role] = tar.extractfile(member).read()
    return samples


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_parquet_has_the_published_columns(folder):
    table = pq.read_table(folder / "parquet")
    types = {field.name: str(field.type) for field in table.schema}
    assert types == {
        "jpg_0": "binary",
        "jpg_1": "binary",
        "label_0": "double",
        "label_1": "double",
        "has_label": "bool",
        "caption": "string",
        "ranking_id": "int64",
        "image_0_uid": "string",
        "image_1_uid": "string",
        "best_image_uid": "string",
    }
    rows = read_parquet(folder)
    assert [row["ranking_id"] for row in rows] == list(range(NUM_PAIRS))
    assert len({row[name] for row in rows for name in ("image_0_uid", "image_1_uid")}) == 2 * NUM_PAIRS
    for row in rows:
        assert row["label_0"] + row["label_1"] == 1
        best = {1.0: row["image_0_uid"], 0.0: row["image_1_uid"], 0.5: "tie"}[row["label_0"]]
        assert row["best_image_uid"] == best


def test_parquet_and_tar_hold_the_same_pairs(folder):
    rows, samples = read_parquet(folder), read_tars(folder)
    assert len(rows) == len(samples) == NUM_PAIRS
    for row, (key, sample) in zip(rows, samples.items(), strict=True):
        assert set(sample) == {"win.png", "lose.png", "json"}
        text = json.loads(sample["json"])
        assert int(key) == int(text["id"]) == row["ranking_id"]
        assert text["prompt"] == row["caption"]
        assert text["label"] == max(row["label_0"], row["label_1"])
        first, second = ("lose", "win") if row["label_1"] == 1 else ("win", "lose")
        assert (sample[f"{first}.png"], sample[f"{second}.png"]) == (row["jpg_0"], row["jpg_1"])


def test_pictures_are_lossless_and_differ(folder):
    for row in read_parquet(folder):
        pictures = [Image.open(io.BytesIO(row[name])) for name in ("jpg_0", "jpg_1")]
        assert [(picture.format, picture.mode, picture.size) for picture in pictures] == [("PNG", "RGB", (64, 64))] * 2
        assert not np.array_equal(*pictures)


def test_labels_are_the_oracles_but_for_counted_ties_and_flips(folder):
    record = json.loads((folder / "toyworld.json").read_text())
    ties = flips = 0
    for row in read_parquet(folder):
        pictures = [Image.open(io.BytesIO(row[name])) for name in ("jpg_0", "jpg_1")]
        first, second = OracleScorer().score(pictures, [row["caption"]] * 2)
        if abs(first - second) < TIE_MARGIN:
            assert row["label_0"] == 0.5
            ties += 1
        else:
            assert row["label_0"] in (0.0, 1.0)
            turned = (row["label_0"] == 1) != (first > second)
            assert not (turned and row["ranking_id"] < 8)  # the first pairs are what people look at
            flips += turned
    assert record["complete"] is True
    assert (record["num_pairs"], record["num_ties"], record["num_flipped"]) == (NUM_PAIRS, ties, flips)
    assert flips > 0


def test_captions_come_from_the_split_alone(folder, tmp_path):
    assert {row["caption"] for row in read_parquet(folder)} <= set(captions("train"))
    make_pairs(PairSettings(num_pairs=3, split="test", formats=("parquet",)), tmp_path, quiet=True)
    assert {row["caption"] for row in read_parquet(tmp_path)} <= set(captions("test"))
    assert not (tmp_path / "webdataset").exists()


def test_finished_work_is_not_done_again(folder, monkeypatch):
    def unexpected(settings, start, stop):
        raise AssertionError("made pairs again")

    before = contents(folder)
    monkeypatch.setattr(pairs_module, "make_batch", unexpected)
    assert run("pairs", "--out", folder, "--pairs", NUM_PAIRS, "--flip-labels", 0.3).exit_code == 0
    assert contents(folder) == before


def test_other_settings_and_foreign_folders_are_refused(folder, tmp_path):
    with pytest.raises(UsageError, match=r"pairs of other settings(.|\n)*seed = 1(.|\n)*seed = 0"):
        run("pairs", "--out", folder, "--pairs", NUM_PAIRS, "--flip-labels", 0.3, "--seed", 1)
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="something else"):
        run("pairs", "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_stopped_work_resumes_to_the_same_files(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs_module, "PAIRS_PER_PART", 5)
    monkeypatch.setattr(pairs_module, "PAIRS_PER_BATCH", 5)
    monkeypatch.setattr(pairs_module.os, "sched_getaffinity", lambda _: {0}, raising=False)
    settings = PairSettings(num_pairs=10, flip_labels=0.3)
    make_pairs(settings, tmp_path / "whole", quiet=True)

    real, spans = pairs_module.make_batch, []

    def interrupted(settings, start, stop):
        if start >= 5:
            raise KeyboardInterrupt
        return real(settings, start, stop)

    def counted(settings, start, stop):
        spans.append((start, stop))
        return real(settings, start, stop)

    monkeypatch.setattr(pairs_module, "make_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_pairs(settings, tmp_path / "stopped", quiet=True)
    monkeypatch.setattr(pairs_module, "make_batch", counted)
    make_pairs(settings, tmp_path / "stopped", quiet=True)
    assert spans == [(5, 10)]
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    # A pair depends on (seed, index), not on how many are made or how they are parted.
    pictures = [(row["caption"], row["jpg_0"]) for row in read_parquet(folder)]
    assert [caption for caption, _ in pictures[:10]] == [row["caption"] for row in read_parquet(tmp_path / "whole")]
    for (_, one), row in zip(pictures, read_parquet(tmp_path / "whole"), strict=False):
        difference = np.subtract(Image.open(io.BytesIO(one)), Image.open(io.BytesIO(row["jpg_0"])), dtype=int)
        assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("lost", ["parquet", "webdataset/pairs-00000.tar"])
def test_what_is_lost_is_made_again(tmp_path, lost):
    asked = ["pairs", "--out", tmp_path, "--pairs", 4, "--images", "rendered"]
    assert run(*asked).exit_code == 0
    before = contents(tmp_path)
    remove(tmp_path / lost)
    assert run(*asked).exit_code == 0
    assert contents(tmp_path) == before


@pytest.mark.parametrize("damaged", ['{"settings": {', "[]", "{}", '{"settings": 1, "parts": {}}', "\xff"])
def test_a_damaged_record_is_said(tmp_path, damaged):
    asked = ["pairs", "--out", tmp_path, "--pairs", 2, "--images", "rendered"]
    (tmp_path / "toyworld.json").write_text(damaged, encoding="latin-1")
    with pytest.raises(DataError, match="record of the pairs cannot be read"):
        run(*asked)
    assert contents(tmp_path) == {Path("toyworld.json"): damaged.encode("latin-1")}


def test_what_a_killed_writer_left_is_nothing_else(tmp_path):
    (tmp_path / f".toyworld.json.partial-{'0' * 16}").write_text("{")
    assert run("pairs", "--out", tmp_path, "--pairs", 2, "--images", "rendered").exit_code == 0
    assert not list(tmp_path.glob(".toyworld*"))


@pytest.mark.slow
def test_two_processes_make_the_same_pairs_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs_module, "generate", generate)  # as the other process has it
    settings = PairSettings(num_pairs=34, formats=("webdataset",))
    make_pairs(settings, tmp_path / "some", quiet=True)
    monkeypatch.setattr(pairs_module.os, "sched_getaffinity", lambda _: {0}, raising=False)
    make_pairs(settings, tmp_path / "one", quiet=True)
    assert contents(tmp_path / "some") == contents(tmp_path / "one")


@pytest.mark.parametrize("value", ["jpeg", "parquet,parquet", ""])
def test_unknown_formats_are_refused(tmp_path, value):
    with pytest.raises(UsageError, match="format"):
        run("pairs", "--out", tmp_path / "pairs", "--format", value)
    assert not (tmp_path / "pairs").exists()


def test_prompts_are_the_splits_captions(tmp_path):
    run("prompts", "--out", tmp_path / "all.txt", "--split", "validation")
    run("prompts", "--out", tmp_path / "some.txt", "--split", "validation", "--limit", 7)
    lines = (tmp_path / "all.txt").read_text().splitlines()
    assert lines == list(captions("validation"))
    assert (tmp_path / "some.txt").read_text().splitlines() == lines[:7]
    with pytest.raises(UsageError, match="fewer captions"):
        run("prompts", "--out", tmp_path / "more.txt", "--limit", 100_000)


def test_who_hands_out_the_pairs_does_not_wait_for_diffusers():
    """The processes that make them load the model; the one that was typed does not."""
    code = "import sys, inpo.toyworld.pairs; print('diffusers' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.split() == ["False"]


def test_the_folders_own_record_is_not_taken_for_a_list_of_pairs(tmp_path: Path) -> None:
    make_pairs(PairSettings(num_pairs=2, formats=("webdataset",)), tmp_path / "pairs", quiet=True)
    with pytest.raises(DataError, match="folders in it: webdataset"):
        open_source(str(tmp_path / "pairs"))


def test_a_model_that_was_not_trained_is_told_before_anything_is_written(tmp_path, monkeypatch):
    """Else the folder would be refused once the model is there."""
    monkeypatch.setitem(MODELS, "flow", tmp_path / "flow")
    pairs_module._fingerprint.cache_clear()
    with pytest.raises(UsageError, match=r"(?s)has not been trained.*make toyworld-flow"):
        run("pairs", "--out", tmp_path / "pairs", "--pairs", 2, "--model", "flow")
    assert not (tmp_path / "pairs").exists()


def rendered(folder, **told):
    settings = PairSettings(num_pairs=12, formats=("parquet",), flip_labels=0, images="rendered", **told)
    make_pairs(settings, folder, quiet=True)
    rows = read_parquet(folder)
    return rows, np.stack(
        [np.asarray(Image.open(io.BytesIO(row[n])), float) for row in rows for n in ("jpg_0", "jpg_1")]
    )


def test_rendered_pairs_are_of_mixed_quality_and_as_strange_as_asked_for(tmp_path):
    """The captions of all kinds are alike; a distance changes the look by that much and no attribute's colour."""
    rows, plain = rendered(tmp_path / "0")
    _, one = rendered(tmp_path / "1", distance=1.0)
    again, two = rendered(tmp_path / "2", distance=2.0)
    assert [row["caption"] for row in rows] == [row["caption"] for row in again]
    assert 0 < sum(row["label_0"] == 1 for row in rows) < 12  # neither side is the better one
    near, far = (np.sqrt(np.mean((other - plain) ** 2, axis=(1, 2, 3))) for other in (one, two))
    # A shade of 36 from edge to edge and a hatching of 12, in grey levels: sqrt(36^2 / 12 + 12^2 / 2) = 13.4 where
    # nothing is cut off at black or white.
    assert near.max() < 13.4 * 1.1 < 1.6 * near.mean()
    assert np.all((1.5 * near < far) & (far < 2.1 * near))
    assert np.abs((one - plain).mean((1, 2, 3))).max() < 8


@pytest.mark.parametrize(
    "told",
    [
        ["--images", "painted"],
        ["--images", "rendered", "--distance", 5],
        ["--distance", 1],
        ["--images", "rendered", "--model", "flow"],
    ],
)
def test_images_and_distances_that_are_none_are_refused(tmp_path, told):
    with pytest.raises(UsageError):
        run("pairs", "--out", tmp_path / "pairs", *told)
    assert not (tmp_path / "pairs").exists()
