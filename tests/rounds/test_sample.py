"""`inpo sample` as a run: what is counted, resumed, refused, and what other commands do with its outcome."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import inpo.rounds.prompts as prompts_module
from inpo.common.cache import CacheWriter, open_cache
from inpo.common.cache.labels import read_shard_labels
from inpo.common.cache.store import CacheStore
from inpo.common.errors import CacheMismatch, DataError, UsageError
from inpo.common.models import open_model
from inpo.common.pairs import Pair, open_source
from inpo.common.pairs.tars import TarShard
from inpo.common.scorer import load_scorer
from inpo.common.spread import SPREAD_RECORDS
from inpo.evaluation.relabel import relabel_cache
from inpo.inspection.verify import verify
from inpo.precompute.configuration import configure
from inpo.precompute.settings import RayOptions
from inpo.rounds.pictures import SampleTars
from inpo.rounds.sample import configure_sample, run_sample
from inpo.train.run import run_train
from tests.rounds.conftest import PROMPTS, Brightness, Samples
from tests.rounds.test_recorded import pictures


@pytest.mark.parametrize(("guidance", "branches"), [(2.0, 2), (1.0, 1)])
def test_a_record_costs_one_call_beside_the_sampler(
    sample: Samples, pipelines: Callable, tmp_path: Path, guidance: float, branches: int
) -> None:
    cache = sample.cache(pipelines(), tmp_path / "cache", per_prompt=3, pairs_from="best-worst", guidance=guidance)
    made, kept = 3 * len(PROMPTS), 2 * len(PROMPTS)
    assert cache.num_pairs == len(PROMPTS)
    assert sample.network_calls == made * branches * (3 + 1) + kept * 2 + SPREAD_RECORDS


def test_samples_do_not_hang_on_batch_or_shards(
    sample: Samples, pipelines: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sample.cache(pipelines(), tmp_path / "first")
    monkeypatch.setattr(prompts_module, "MAX_IMAGES_PER_SHARD", 2)
    second = sample.cache(pipelines(), tmp_path / "second", batch_size=1)
    assert len(second.commits) == len(PROMPTS)

    def by_pair(cache: Any) -> dict[str, dict[str, np.ndarray]]:
        found = {}
        for shard in cache:
            for pair, (sides, group) in enumerate(zip(shard.sides(), shard.groups(), strict=True)):
                arrays = {name: shard.read(name)[sides] for name in ("x0", "x_t", "target", "reference_error")}
                found[str(shard.read("pair/id")[pair])] = arrays | {"timestep": shard.read("timestep")[group]}
        return found

    left, right = by_pair(first), by_pair(second)
    assert left.keys() == right.keys()
    for name, arrays in left.items():
        np.testing.assert_array_equal(arrays.pop("timestep"), right[name].pop("timestep"))
        for path, values in arrays.items():
            apart = values.astype(float) - right[name][path]
            assert np.sqrt(np.mean(apart**2) / np.mean(values.astype(float) ** 2)) < 4e-3, path


class Killed(BaseException):
    """The end of a process, as far as one process can have it."""


@pytest.mark.parametrize("moment", ["before the commit", "after the commit"])
def test_what_is_committed_is_not_made_again_and_has_its_images(
    sample: Samples, pipelines: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    monkeypatch.setattr(prompts_module, "MAX_IMAGES_PER_SHARD", 2)
    cache = tmp_path / "cache"
    killed = Killed()

    def die(*_: Any) -> None:
        raise killed

    with monkeypatch.context() as patched:
        if moment == "before the commit":
            patched.setattr(CacheWriter, "write", die)
        else:
            patched.setattr(SampleTars, "settle", die)
        with pytest.raises(Killed):
            sample(pipelines(), cache)
    there = dict(open_cache(str(cache), allow_empty=True).commits)
    assert len(there) == (moment == "after the commit")
    sample.components.clear()
    opened = sample.cache(pipelines(), cache)
    left = len(PROMPTS) - len(there)
    assert sample.network_calls == left * (2 * 2 * (3 + 1) + 2 * 2 + SPREAD_RECORDS)
    assert {name: commit.attempt for name, commit in there.items()}.items() <= {
        name: commit.attempt for name, commit in opened.commits.items()
    }.items()
    files = {file.name for file in Path(f"{cache}-images").iterdir()}
    assert files == {f"{name}.tar" for name in opened.commits}
    assert len(pictures(cache)) == opened.num_pairs
    sample.components.clear()
    assert sample(pipelines(), cache) == 0
    assert sample.network_calls == 0


def test_a_shard_that_is_made_again_has_its_own_images(
    sample: Samples, scorer: Brightness, pipelines: Callable, tmp_path: Path
) -> None:
    """Its commit moved away, and made with other scores, as a GPU may make it with other pixels."""
    where = tmp_path / "cache"
    (name,) = sample.cache(pipelines(), where).commits
    (where / "commits" / f"{name}.json").rename(tmp_path / "moved.json")
    scorer.told = lambda prompts: [float(number) for number, _ in enumerate(prompts)]
    (shard,) = sample.cache(pipelines(), where)
    told = pictures(where)
    (tar,) = Path(f"{where}-images").glob("*.tar*")
    assert TarShard(name=name, file=str(tar)).fingerprint() == shard.commit.source.fingerprint
    scores = [[told[pair][f"score_{side}"] for side in ("win", "lose")] for pair in shard.read("pair/id")]
    assert shard.read("image/score")[shard.sides()].tolist() == scores


def test_processes_that_begin_together_claim_the_cache_together(tmp_path: Path) -> None:
    one, other = (SampleTars(CacheStore(str(tmp_path / "cache"), create=True)) for _ in range(2))
    listing = one.store.listing

    def meanwhile(prefix: str) -> dict[str, int]:
        other.claim({"scorer": "brightness"}, has_shards=False)
        (tmp_path / "cache-images" / "first.tar.0").touch()
        return listing(prefix)

    one.store.listing = meanwhile  # type: ignore[method-assign]
    one.claim({"scorer": "brightness"}, has_shards=False)


def test_one_cache_is_one_by_whatever_name(
    sample: Samples, pipelines: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (tmp_path / "link").symlink_to("cache")
    monkeypatch.chdir(cache)
    sample.cache(pipelines(), Path("."))
    assert f"--output {tmp_path / 'cache-run'}" in capsys.readouterr().err
    for name in (Path("."), tmp_path / "link", cache):
        with pytest.raises(CacheMismatch, match="gap"):
            sample(pipelines(), name, gap=0.5)
        assert sample(pipelines(), name) == 0
    assert len(sample.components) == 1, "the samples were made once"
    assert {each.name for each in tmp_path.iterdir() if each.is_dir()} == {"cache", "cache-images", "link"}
    assert not (cache / ".-images").exists()
    shutil.rmtree(tmp_path / "cache-images")
    (tmp_path / "moved").mkdir()
    cache.rename(tmp_path / "moved" / "cache")
    with pytest.raises(CacheMismatch, match="gap"):
        sample(pipelines(), tmp_path / "moved" / "cache", gap=0.5)


def test_what_is_there_is_not_mixed_with_samples(sample: Samples, pipelines: Callable, tmp_path: Path) -> None:
    sample.cache(pipelines(), tmp_path / "cache")
    (tmp_path / "cache" / "sample.json").unlink()  # as it lacks in a cache made --like one of samples
    with pytest.raises(CacheMismatch, match="no samples"):
        sample(pipelines(), tmp_path / "cache")
    (tmp_path / "other-images").mkdir()
    (tmp_path / "other-images" / "mine.txt").touch()
    with pytest.raises(CacheMismatch, match=r"mine\.txt"):
        sample(pipelines(), tmp_path / "other")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="no folder"):
        sample(pipelines(), tmp_path / "file")
    assert not (tmp_path / "file-images").exists()


def test_a_prompt_whose_images_score_alike_gives_no_pair(
    sample: Samples, scorer: Brightness, pipelines: Callable, tmp_path: Path
) -> None:
    scorer.told = lambda prompts: [float(i) * (prompt != PROMPTS[1]) for i, prompt in enumerate(prompts)]
    cache = sample.cache(pipelines(), tmp_path / "cache", gap=0.5)
    (commit,) = cache.commits.values()
    assert (cache.num_pairs, commit.skipped) == (len(PROMPTS) - 1, {"tie": 1})
    assert PROMPTS[1] not in {each["prompt"] for each in pictures(tmp_path / "cache").values()}
    scorer.told = lambda prompts: [0.0] * len(prompts)
    assert sample(pipelines(), tmp_path / "none") == 1
    assert not open_cache(str(tmp_path / "none"), allow_empty=True).commits


def test_a_score_that_is_no_number_names_its_image(
    sample: Samples, scorer: Brightness, pipelines: Callable, tmp_path: Path
) -> None:
    scorer.told = lambda prompts: [float("nan")] * len(prompts)
    with pytest.raises(DataError, match="seed"):
        sample(pipelines(), tmp_path / "cache")


def test_a_limit_of_prompts_is_rounded_up_to_whole_shards() -> None:
    def asked(limit: int | None) -> list[int]:
        prompts = [f"prompt {number}" for number in range(150)]
        source = prompts_module.prompt_source("there", prompts, per_prompt=8, pairs_per_prompt=1, limit=limit)
        return [shard.num_rows for shard in source.shards]

    assert asked(None) == asked(150) == asked(1000) == [64, 64, 22]
    assert asked(65) == [64, 64]
    assert asked(64) == asked(1) == [64]


@pytest.mark.parametrize("profile", ["full", "compact"])
def test_it_is_a_cache_like_any_other(
    sample: Samples, pipelines: Callable, tmp_path: Path, profile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = tmp_path / "cache"
    cache = sample.cache(pipelines(), where, profile=profile, per_prompt=3)
    assert (cache.num_pairs, cache.manifest.group) == (3 * len(PROMPTS), "list")
    (shard,) = cache
    score, sides = shard.read("image/score"), shard.sides()
    assert (score[sides[:, 0]] > score[sides[:, 1]]).all()
    told = pictures(where)
    assert set(told) == set(map(str, shard.read("pair/id")))
    assert sorted(each["prompt"] for each in told.values()) == sorted(3 * PROMPTS)
    assert len({seed for each in told.values() for seed in each["seeds"]}) == 3 * len(PROMPTS)
    found = verify(str(where), model=open_model(str(pipelines())), num_sampled=4)
    assert found.findings == []
    assert not any("belong to no document" in each for each in found.notes)
    steps = {"output": str(tmp_path / "run"), "steps": 1, "batch_size": 2, "tracker": "none", "held_out": 0.0}
    asked = steps | {"objective": "listwise" if profile == "full" else "inpo"}
    assert run_train(None, {"model": str(pipelines())}, [str(where)], asked, resume="never") == 0
    assert "zero-step proof holds" in capsys.readouterr().err
    source = open_source(f"{where}-images")
    (tar,) = source.shards
    rows = list(tar.rows(0, tar.num_rows))
    assert all(isinstance(row, Pair) for row in rows)
    relabel_cache(cache, source, load_scorer("brightness"), set_name="again", temperature=1.0)
    labels = read_shard_labels(cache.store, "again", *cache.commits)
    assert labels is not None
    assert all(pair.label > 0.5 for pair in labels.pairs.values())


def test_what_does_not_go_on_is_refused(
    sample: Samples, pipelines: Callable, tmp_path: Path, scorer: Brightness
) -> None:
    sample.cache(pipelines(), tmp_path / "cache")
    with pytest.raises(CacheMismatch, match="per_prompt"):
        sample(pipelines(), tmp_path / "cache", per_prompt=3)
    with pytest.raises(CacheMismatch, match="guidance"):
        sample(pipelines(), tmp_path / "cache", guidance=3.0)
    sample.prompts.write_text("other prompts\n")
    with pytest.raises(CacheMismatch, match="prompts"):
        sample(pipelines(), tmp_path / "cache")
    for without in ("prompts", "scorer"):
        with pytest.raises(UsageError, match=f"--{without}"):
            sample(pipelines(), tmp_path / "other", **{without: None})
    with pytest.raises(UsageError, match="inverter"):
        configure(None, {}, {}, {"inverter": "recorded"})
    with pytest.raises(UsageError, match="faithful"):
        sample(pipelines(), tmp_path / "other", faithful=True)
    with pytest.raises(UsageError, match=r"--timesteps-per-pair\n.*--inference-steps(?s:.*)raise --inference-steps"):
        sample(pipelines(), tmp_path / "other", timesteps_per_pair=4)
    asked = configure_sample(None, {"model": str(pipelines())}, {"cache": str(tmp_path / "other")}, {})
    with pytest.raises(UsageError, match="--engine"):
        run_sample(asked, None, ray_options=RayOptions(workers=1), dry_run=False)
    assert not (tmp_path / "other").exists()
