"""What a source may hold and what becomes of it: odd prompts, many rows, none at all, files that change later."""

import io
import json
import logging
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

from inpo.common.cache import CacheWriter, open_cache
from inpo.common.cache.schema import LevelTables
from inpo.common.errors import CacheMismatch, CacheMissing, DataError, ModelError
from inpo.common.levels import Levels
from inpo.common.log import set_level
from inpo.common.models import open_model
from inpo.common.testing import save_tiny_pipeline
from inpo.inspection.verify import verify
from inpo.precompute.configuration import build_manifest
from inpo.precompute.settings import PrecomputeSettings


def encode(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture
def write_list(tmp_path: Path, examples: Callable) -> Callable[..., str]:
    """write_list([{...}, ...]): a folder with pairs.jsonl; rows get two images unless they name their own."""

    def write(rows: list[dict[str, object]], folder: str = "pairs") -> str:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        (pair,) = examples(1)
        Image.fromarray(pair.win).save(place / "win.png")
        Image.fromarray(pair.lose).save(place / "lose.png")
        lines = [json.dumps({"win": "win.png", "lose": "lose.png", **row}) for row in rows]
        (place / "pairs.jsonl").write_text("".join(line + "\n" for line in lines))
        return str(place)

    return write


def test_empty_long_and_foreign_prompts_are_kept_whole_and_cut_ones_counted(
    pipelines: Callable, write_list: Callable, run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["", "a red cat", "a red cat " * 500, "рыжий кот 赤い猫 🐈", "קט", "  spaces  and\nlines\t"]
    source = write_list([{"prompt": prompt, "id": str(row)} for row, prompt in enumerate(prompts)])
    cache = run.cache(source, pipelines(), tmp_path / "cache")
    (shard,) = cache
    assert shard.prompts().tolist() == prompts
    assert shard.commit.texts[0] == "empty"
    assert shard.read("group/prompt")[0].tolist() == [0, 0]
    tokenizer = CLIPTokenizer.from_pretrained(pipelines() / "tokenizer")
    too_long = [prompt for prompt in prompts if len(tokenizer(prompt)["input_ids"]) > tokenizer.model_max_length]
    assert prompts[2] in too_long
    assert shard.commit.counts["cut_prompt"] == len(too_long) < len(prompts)
    assert f"counted: {len(too_long)} x cut_prompt" in capsys.readouterr().err


def test_a_cache_shard_has_at_most_256_rows(
    pipelines: Callable, write_list: Callable, run: Callable, tmp_path: Path
) -> None:
    """600 rows in one input; all but three are ties, so that little is computed."""
    kept = {0, 255, 256}
    source = write_list(
        [{"prompt": "a cat", "id": str(row), "label": 1.0 if row in kept else 0.5} for row in range(600)]
    )
    cache = run.cache(source, pipelines(), tmp_path / "cache", grid_points=1, timesteps_per_pair=1)
    assert [commit.source.rows for commit in cache.commits.values()] == [(0, 256), (256, 512), (512, 600)]
    assert [commit.num_pairs for commit in cache.commits.values()] == [2, 1, 0]
    assert [commit.skipped for commit in cache.commits.values()] == [{"tie": 254}, {"tie": 255}, {"tie": 88}]


def test_a_source_without_pairs_says_why_and_names_no_training(
    pipelines: Callable, write_list: Callable, run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, object]] = [{"text": "a wrong name"}, {"prompt": "p", "win": "late.png"}]
    source = write_list(rows)
    loudness = set_level(logging.WARNING)  # -q hides what is done, and not why nothing was
    try:
        assert run(source, pipelines(), tmp_path / "cache") == 1
    finally:
        set_level(loudness)
    said = capsys.readouterr().err
    for words in ("1 x missing_prompt", "1 x missing_image", "no pair was kept", f"inpo data check {source}"):
        assert words in said
    assert "not read, for no pair is made of it: field text (1)" in said
    assert "inpo train" not in said
    # No cache is claimed, and an image that comes later is found by the same command.
    with pytest.raises(CacheMissing):
        open_cache(str(tmp_path / "cache"))
    shutil.copy(f"{source}/win.png", f"{source}/late.png")
    assert run.cache(source, pipelines(), tmp_path / "cache").num_pairs == 1


def test_a_second_source_without_pairs_leaves_the_first_alone(
    pipelines: Callable, write_list: Callable, run: Callable, tmp_path: Path
) -> None:
    before = run.cache(write_list([{"prompt": "a cat"}]), pipelines(), tmp_path / "cache")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "none.jsonl").write_text('{"win": "a", "lose": "b", "prompt": "p"}\n')
    assert run(str(tmp_path / "none" / "none.jsonl"), pipelines(), tmp_path / "cache") == 1
    assert open_cache(str(tmp_path / "cache")).commits == before.commits


def test_a_limit_whose_rows_give_no_pair_takes_nothing_back_that_was_there(
    pipelines: Callable, write_list: Callable, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And without an earlier run nothing of it is left, so that the same command looks again."""
    monkeypatch.setattr("inpo.precompute.tasks.MAX_PAIRS_PER_SHARD", 1)
    source = write_list([{"prompt": "a cat", "label": 0.5}, {"prompt": "a dog"}])
    assert run(source, pipelines(), tmp_path / "fresh", limit=1) == 1
    assert not list((tmp_path / "fresh" / "commits").iterdir())
    whole = run.cache(source, pipelines(), tmp_path / "cache")
    assert [commit.num_pairs for commit in whole.commits.values()] == [0, 1]
    assert run(source, pipelines(), tmp_path / "cache", limit=1) == 1
    assert open_cache(str(tmp_path / "cache")).commits == whole.commits


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("pairs.jsonl", "", ["no rows", "inpo data check"]),
        ("pairs.csv", "win,lose,prompt\n", ["no rows"]),
        ("pairs.csv", "win,loser,prompt\na,b,c\n", ["lacks columns", "win, loser, prompt"]),
        ("pairs.csv", "win;lose;prompt\na;b;c\n", ["lacks columns", "separated by commas"]),
        ("pairs.parquet", "PAR1", ["cannot be read", "pairs.parquet"]),
    ],
)
def test_nothing_to_read_is_refused_before_there_is_a_cache(
    pipelines: Callable, run: Callable, tmp_path: Path, name: str, text: str, words: list[str]
) -> None:
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / name).write_text(text)
    with pytest.raises(DataError) as caught:
        run(str(tmp_path / "pairs"), pipelines(), tmp_path / "cache")
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_a_changed_input_under_a_committed_shard_is_reported_and_the_shard_stays(
    pipelines: Callable, write_list: Callable, run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "a cat", "id": "0"}, {"prompt": "a dog", "id": "1"}]
    source = write_list(rows)
    before = run.cache(source, pipelines(), tmp_path / "cache")
    assert "warning" not in capsys.readouterr().err
    assert run(source, pipelines(), tmp_path / "cache") == 0
    assert "warning" not in capsys.readouterr().err
    write_list([rows[0], {"prompt": "a horse", "id": "1"}])
    after = run.cache(source, pipelines(), tmp_path / "cache")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    (name,) = before.commits
    for words in ("input pairs has changed", name, str(tmp_path / "cache" / "commits" / "pairs-????????.json")):
        assert words in line
    assert after.commits == before.commits
    # Doing as the line says makes the shard again.
    (tmp_path / "cache" / "commits" / f"{name}.json").unlink()
    again = run.cache(source, pipelines(), tmp_path / "cache")
    assert "a horse" in again.shards[name].prompts()


def test_a_file_that_changes_between_its_shards_is_left_out(
    pipelines: Callable,
    write_list: Callable,
    run: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One row more before the others moves a row into the second shard that the first one has; one less loses it."""
    monkeypatch.setattr("inpo.precompute.tasks.MAX_PAIRS_PER_SHARD", 2)
    rows = [{"prompt": "a cat", "id": str(number)} for number in range(4)]
    source, place = write_list(rows), tmp_path / "cache"
    before = run.cache(source, pipelines(), place, limit=2)
    for changed in ([{"prompt": "a cat", "id": "new"}, *rows], rows[1:], [*rows, {"prompt": "a cat", "id": "new"}]):
        write_list(changed)
        capsys.readouterr()
        assert run(source, pipelines(), place) == 1
        told = capsys.readouterr().err
        assert "This file has changed since a part of its rows came into the cache" in told
        assert f"move {place / 'commits' / 'pairs-????????.json'} away" in " ".join(told.split())
        assert open_cache(str(place)).commits == before.commits
    # What has come into the cache twice is told as that.
    write_list([{"prompt": "a cat", "id": "new"}, *rows])
    with monkeypatch.context() as patch:
        patch.setattr("inpo.precompute.works.foreign_inputs", lambda *_: {})
        run.cache(source, pipelines(), tmp_path / "cache")
    (found,) = verify(str(place)).findings
    assert "1 pair ids, 1 first, stand in pairs-00000000 too: their file had changed" in found.detail
    # Doing as the error says makes all of it again.
    for commit in (place / "commits").glob("pairs-????????.json"):
        commit.unlink()
    again = run.cache(source, pipelines(), place)
    assert [name for shard in again for name in shard.read("pair/id")] == ["new", "0", "1", "2", "3"]
    assert not verify(str(place)).findings
    # Rows that were added to a shard that is there are in none.
    write_list([{"prompt": "a cat", "id": "new"}, *rows, {"prompt": "a cat", "id": "4"}])
    assert run(source, pipelines(), place) == 0
    assert "the committed shard stays, and 1 rows are in no shard" in " ".join(capsys.readouterr().err.split())


def test_rows_that_were_not_allowed_are_told_where_they_are_now(
    pipelines: Callable, write_list: Callable, run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The committed shard stays, and the run says what to move away."""
    source = write_list([{"prompt": "a cat"}, {"prompt": "a dog", "win": str(tmp_path / "outside.png")}])
    shutil.copy(f"{source}/win.png", tmp_path / "outside.png")
    before = run.cache(source, pipelines(), tmp_path / "cache")
    (name,) = before.commits
    assert before.commits[name].skipped == {"not_allowed": 1}
    run(source, pipelines(), tmp_path / "cache")
    assert "warning" not in capsys.readouterr().err
    assert run.cache(source, pipelines(), tmp_path / "cache", allow_remote=True).commits == before.commits
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    commit = tmp_path / "cache" / "commits" / f"{name}.json"
    for words in (name, "without 1 rows that --allow-remote reads", str(commit)):
        assert words in line
    # Doing as the line says reads them.
    commit.unlink()
    assert run.cache(source, pipelines(), tmp_path / "cache", allow_remote=True).num_pairs == 2
    run(source, pipelines(), tmp_path / "cache", allow_remote=True)
    assert "warning" not in capsys.readouterr().err


def test_the_public_mirrors_tars_give_the_same_cache_as_our_own_layout(
    pipelines: Callable, examples: Callable, write_tars: Callable, run: Callable, tmp_path: Path, by_id: Callable
) -> None:
    """jpg_0, jpg_1, label_0, label_1 and caption as members of one sample, with real images; the second is preferred in
    every other pair, and one row is a tie."""
    pairs = examples(4)
    ours = run.cache(write_tars(tmp_path / "ours", pairs, 4), pipelines(), tmp_path / "from-ours")
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for number, pair in enumerate([*pairs, pairs[0]]):
            first, second = (pair.lose, pair.win) if number % 2 else (pair.win, pair.lose)
            labels = ("0.5", "0.5") if number == 4 else ("0", "1") if number % 2 else ("1", "0")
            members = {
                "caption": pair.prompt.encode(),
                "jpg_0": encode(first),
                "jpg_1": encode(second),
                "label_0": labels[0].encode(),
                "label_1": labels[1].encode(),
                "ranking_id": pair.pair_id.encode(),
            }
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{number:08d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    mirror = run.cache(str(tmp_path / "00000.tar"), pipelines(), tmp_path / "from-mirror")
    assert [commit.skipped for commit in mirror.commits.values()] == [{"tie": 1}]
    for name in ("x0", "x_t", "delta", "target", "timestep", "pair/label"):
        left, right = by_id(ours, name), by_id(mirror, name)
        assert left.keys() == right.keys()
        for pair_id, value in left.items():
            np.testing.assert_array_equal(value, right[pair_id], err_msg=name)


def test_new_input_shards_extend_a_cache(
    pipelines: Callable, examples: Callable, write_tars: Callable, tars: Callable, run: Callable, tmp_path: Path
) -> None:
    source = tars(2, 1)
    before = run.cache(source, pipelines(), tmp_path / "cache")
    calls = run.network_calls
    write_tars(tmp_path / "more", examples(1, first=7), 1)
    shutil.move(tmp_path / "more" / "00000.tar", tmp_path / "pairs" / "00007.tar")
    after = run.cache(source, pipelines(), tmp_path / "cache")
    assert run.network_calls - calls == calls // 2
    assert before.commits.items() < after.commits.items()
    assert after.find("pair-007")[0].commit.source.input_shard == "00007"


def test_a_renamed_input_is_reported_before_its_pairs_come_twice(
    pipelines: Callable, tars: Callable, run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tars(2, 1)
    run.cache(source, pipelines(), tmp_path / "cache")
    assert "warning" not in capsys.readouterr().err
    (tmp_path / "pairs" / "00001.tar").rename(tmp_path / "pairs" / "renamed.tar")
    run.cache(source, pipelines(), tmp_path / "cache")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert "input renamed holds what 00001 held" in line
    assert "twice" in line


def test_a_cache_that_lost_its_manifest_is_no_foreign_folder(
    pipelines: Callable, write_list: Callable, run: Callable, tmp_path: Path
) -> None:
    source = write_list([{"prompt": "a cat"}])
    run.cache(source, pipelines(), tmp_path / "cache")
    (tmp_path / "cache" / "manifest.json").unlink()
    with pytest.raises(CacheMissing, match=r"(?s)lost its manifest.*1 commits.*restore it from a copy"):
        run(source, pipelines(), tmp_path / "cache")


def test_a_first_try_that_failed_says_that_its_cache_may_go(
    pipelines: Callable, write_list: Callable, run: Callable, tmp_path: Path
) -> None:
    broken = save_tiny_pipeline(tmp_path / "broken")
    config = broken / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"cross_attention_dim": 64}))
    source = write_list([{"prompt": "a cat"}])
    with pytest.raises(ModelError, match="unet cannot be loaded"):
        run(source, broken, tmp_path / "cache")
    assert not (tmp_path / "cache" / "manifest.json").exists()
    run(source, pipelines(), tmp_path / "other")
    manifest = json.loads((tmp_path / "other" / "manifest.json").read_text())
    manifest["fingerprints"]["network"] = "0" * 32
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CacheMismatch, match=r"(?s)fingerprints\.network.*nothing is committed here yet"):
        run(source, pipelines(), tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    assert run.cache(source, pipelines(), tmp_path / "cache").num_pairs == 1


def test_shards_are_made_with_the_caches_own_noise_table(
    pipelines: Callable, tars: Callable, run: Callable, tmp_path: Path
) -> None:
    """Another machine's libraries may round the scheduler's table otherwise: what is appended obeys the manifest's."""
    settings = PrecomputeSettings(
        resolution=32, grid_points=3, timesteps_per_pair=3, measure_inversion=0.0, dtype="float32"
    )
    made = build_manifest(settings, open_model(str(pipelines())), device_type="cpu")
    abar = np.array(made.levels.signal) ** 2
    table = abar * (1 - 9e-7)
    levels = LevelTables.of(Levels.from_alphas_cumprod(torch.from_numpy(table)))
    CacheWriter.open(str(tmp_path / "cache"), made.model_copy(update={"levels": levels}))
    run.cache(tars(4, 4), pipelines(), tmp_path / "cache")
    cache = open_cache(str(tmp_path / "cache"))
    (shard,) = cache
    x0, target, x_t = (shard.read(name) for name in ("x0", "target", "x_t"))

    def points(alphas_cumprod: np.ndarray) -> np.ndarray:
        abar = alphas_cumprod[shard.timesteps().astype(int)][..., None, None, None]
        signal = np.sqrt(abar) * x0[:, None].astype(np.float64)
        return (signal + np.sqrt(1 - abar) * target.astype(np.float64)).astype(np.float16)

    assert np.array_equal(points(table), x_t)
    assert not np.array_equal(points(abar), x_t)


def test_an_image_in_place_of_its_name_is_a_skipped_row(
    pipelines: Callable, write_list: Callable, run: Callable, tmp_path: Path
) -> None:
    """What a list of skipped rows quotes of a row is bounded, and names the fault first and last."""
    image = "data:image/png;base64," + "A" * 80_000
    source = write_list([{"prompt": "a cat", "id": "good"}, {"prompt": "a cat", "id": "bad", "win": image}])
    cache = run.cache(source, pipelines(), tmp_path / "cache")
    (commit,) = cache.commits.values()
    assert (commit.num_pairs, commit.skipped) == (1, {"missing_image": 1})
    (line,) = (tmp_path / "cache" / "skipped").glob("*/*.jsonl")
    row = json.loads(line.read_text())
    assert row["pair_id"] == "bad"
    assert row["detail"].startswith("win: ")
    assert len(row["detail"]) < 1100


def test_groups_are_lists_where_a_file_beyond_the_limit_has_rankings(
    pipelines: Callable, examples: Callable, run: Callable, tmp_path: Path
) -> None:
    """Or a limited cache could not be completed."""
    pairs = examples(3)
    images = [encode(pair.win) for pair in pairs]
    tables = {
        "a": [{"prompt": "a cat", "win": images[0], "lose": images[1]}],
        "b": [{"prompt": "a dog", "images": images, "ranks": [1, 2, 3]}],
    }
    (tmp_path / "pairs").mkdir()
    for name, rows in tables.items():
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs" / f"{name}.parquet")
    source = str(tmp_path / "pairs")
    first = run.cache(source, pipelines(), tmp_path / "cache", limit=1)
    assert (first.num_pairs, first.manifest.group) == (1, "list")
    assert run.cache(source, pipelines(), tmp_path / "cache").num_pairs == 4
