"""Which records are used and what is made of labels, scores and lists: through the index, the stream and whole runs."""

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from inpo.common.cache import open_cache
from inpo.common.cache.buckets import open_caches
from inpo.common.cache.labels import LabelSet, PairLabel, write_labels
from inpo.common.errors import CacheIncomplete, CacheMismatch, UsageError
from inpo.common.judge import Evaluation, Judge
from inpo.common.levels import Levels
from inpo.train.checkpoint import WEIGHTS
from inpo.train.index import Index, build_index
from inpo.train.loss_space import error_weights
from inpo.train.objectives import OBJECTIVES
from inpo.train.order import GlobalOrder, OrderedShard
from inpo.train.records import Batch, Needs
from inpo.train.requirements import refuse_hard_labels
from inpo.train.stream import RecordStream


def index_of(location: str, **options: Any) -> Index:
    return build_index([open_cache(location)], **({"soft": False, "held_out": 0.0} | options))


def epoch_of(index: Index, batch_size: int = 3) -> list[Batch]:
    stream = RecordStream(index, Needs(), batch_size=batch_size, window_shards=2, seed=0)
    batches = iter(stream)
    taken = [next(batches) for _ in range(index.num_records // batch_size)]
    stream.close()
    return taken


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def chains(world: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five groups of three images, two pairs each: 0 over 1 over 2; scores the other way round."""

    def score(shard: int, arrays: dict[str, np.ndarray]) -> None:
        arrays["image/score"] = np.arange(len(arrays["image/score"]), dtype=np.float32)

    return world.cache(tmp_path_factory.mktemp("chains") / "c", shards=(3, 2), images=3, change=score)


# --- which records ---


def test_an_epoch_has_every_usable_record_once_and_its_slices_each_pair_once() -> None:
    random = np.random.default_rng(0)
    shards = []
    for groups in (5, 3):
        group = np.repeat(np.arange(groups), [1 + number % 2 for number in range(groups)])
        usable = random.random((len(group), 4)) < 0.5
        usable[0, 0] = True
        shards.append(OrderedShard(group=group, num_records=4, usable=usable))
    order = GlobalOrder(shards, window_shards=1, seed=3)
    everything = {(number, *each.tolist()) for number, shard in enumerate(shards) for each in np.argwhere(shard.usable)}
    assert order.num_records == len(everything)
    shuffled = functools.cache(order.shuffled)
    for epoch in range(2):
        places = [order.position(epoch * order.num_records + number) for number in range(order.num_records)]
        met = [(place.key.slice, *shuffled(place.key)[place.offset].tolist()) for place in places]
        assert Counter(each[1:] for each in met) == Counter(everything)
        assert len({each[:3] for each in met}) == len(met)


def test_a_range_of_timesteps_is_all_that_is_met(world: Any, tmp_path: Path) -> None:
    location = world.cache(tmp_path / "c", timesteps_per_pair=3)
    (low, high) = (250, 750)
    expected = Counter(
        step
        for shard in open_cache(location)
        for step in shard.read("timestep")[shard.groups()].ravel().tolist()
        if low <= step < high
    )
    index = index_of(location, timestep_range=(low, high))
    assert index.num_records == sum(expected.values())
    met = Counter(step for batch in epoch_of(index, 1) for step in batch.record_timestep.tolist())
    assert met == expected
    assert index.fingerprint != index_of(location).fingerprint
    with pytest.raises(CacheIncomplete, match="No pair is left"):
        index_of(location, timestep_range=(999_999, 1_000_000))


def test_labels_are_swapped_and_reversed_where_the_caption_was_dropped(world: Any, tmp_path: Path) -> None:
    location = world.cache(tmp_path / "c", shards=(4,), label=lambda pair: 0.9, drop_caption=lambda pair: pair % 2 == 0)
    np.testing.assert_allclose(index_of(location, swap=True).training[0].label, 0.1, rtol=1e-6)
    np.testing.assert_allclose(
        index_of(location, reverse_dropped=True).training[0].label, [0.1, 0.9, 0.1, 0.9], rtol=1e-6
    )
    both = index_of(location, reverse_dropped=True, swap=True).training[0].label
    np.testing.assert_allclose(both, [0.9, 0.1, 0.9, 0.1], rtol=1e-6)


def give(location: str, labels: Callable[[int], PairLabel]) -> None:
    cache = open_cache(location)
    for name, shard in cache.shards.items():
        pairs = {str(pair_id): labels(number) for number, pair_id in enumerate(shard.read("pair/id"))}
        made = LabelSet(attempt=shard.commit.attempt, scorer="s", temperature=2.0, source="x", pairs=pairs)
        assert write_labels(cache.store, "given", name, made)


def test_a_label_may_differ_between_a_pairs_records(world: Any, tmp_path: Path) -> None:
    location = world.cache(tmp_path / "c", shards=(3,))
    give(location, lambda number: PairLabel(scores=None, label=0.6, by_record=(0.2 * number, 0.5)))
    (part,) = index_of(location, labels="given").training
    assert part.num_records == 3  # the second records are ties
    batches = epoch_of(index_of(location, labels="given"), 1)
    assert sorted(float(batch.label) for batch in batches) == pytest.approx([0.0, 0.2, 0.4])
    assert index_of(location, labels="given", soft=True).num_records == 6
    other = world.cache(tmp_path / "other", shards=(3,), timesteps_per_pair=3)
    give(other, lambda number: PairLabel(scores=None, label=0.6, by_record=(0.2, 0.7)))
    with pytest.raises(CacheMismatch, match="another number of labels"):
        index_of(other, labels="given")


def test_a_label_that_float32_has_as_a_tie_is_one(world: Any, tmp_path: Path) -> None:
    """The loss turns a pair by its label in float32, where this one prefers neither side."""
    location = world.cache(tmp_path / "c", shards=(3,))
    give(location, lambda number: PairLabel(scores=None, label=(0.4, 0.49999999, 0.5)[number]))
    (part,) = index_of(location, labels="given").training
    assert part.label.tolist() == pytest.approx([0.4])


def test_labels_that_are_0_or_1_at_every_record_are_hard_whatever_their_mean(
    world: Any, run: Callable[..., Path], tmp_path: Path
) -> None:
    location = world.cache(tmp_path / "c", shards=(3,))
    give(location, lambda number: PairLabel(scores=None, label=0.5, by_record=(1.0, 0.0)))
    with pytest.raises(CacheIncomplete, match="needs soft labels"):
        run(objective="smpo", caches=[location], labels="given")


@pytest.mark.parametrize("objective", ["smpo", "capo"])
@pytest.mark.parametrize("held_out", [0.0, 0.5], ids=["trained on", "held out whole"])
def test_soft_labels_are_asked_of_each_cache(
    world: Any, run: Callable[..., Path], tmp_path: Path, objective: str, held_out: float
) -> None:
    """Soft ones beside them make no others of the hard ones. A folder of buckets is one cache: the labels of a small
    bucket may all be 1 by chance."""
    (tmp_path / "buckets.json").write_text('{"buckets": ["16x16", "8x8"]}')
    soft = world.cache(tmp_path / "16x16", shards=(3,), label=lambda pair: 0.7, side=8)
    hard = world.cache(tmp_path / "8x8", shards=(1,), side=4)  # of a prompt that is held out in half of the cases
    with pytest.raises(CacheIncomplete, match="needs soft labels") as caught:
        run(objective=objective, caches=[soft, hard], held_out=held_out)
    assert caught.value.where == hard
    buckets = open_caches(str(tmp_path))
    index = build_index(buckets, soft=True, held_out=held_out)
    assert [bool(index.of(cache).training) for cache in buckets] == [True, not held_out]
    refuse_hard_labels(index, [buckets], OBJECTIVES[objective])


# --- lists ---


def test_the_widest_list_may_be_held_out(world: Any, cache: str, tmp_path: Path) -> None:
    """FSDP's processes make as many calls of a compiled network only where none has more images than its slots."""
    aside = world.cache(tmp_path / "aside", shards=(1,), images=3, prompts=["prompt 0"] * 7)
    index = build_index([open_cache(cache), open_cache(aside)], soft=False, held_out=0.5, lists=True)
    assert [max(shard.sides.shape[1] for shard in part) for part in (index.training, index.held_out)] == [2, 3]
    assert index.widest == 3


def test_a_list_is_a_groups_images_with_all_that_follows_from_its_pairs(world: Any, tmp_path: Path) -> None:
    location = world.cache(tmp_path / "c", shards=(3, 2), images=3, label=lambda group: 0.0 if group == 1 else 1.0)
    index = index_of(location, lists=True)
    assert (index.num_pairs, index.num_records) == (5, 10)
    first = np.array([[0, 1, 1], [0, 0, 1], [0, 0, 0]], bool)
    assert index.training[0].above is not None
    np.testing.assert_array_equal(index.training[0].above, [first, first.T, first])
    errors = {float(error) for shard in open_cache(location) for error in shard.read("reference_error").ravel()}
    met = []
    for batch in epoch_of(index, 2):
        assert batch.sides.shape == (2, 3)
        assert batch.lists is not None
        assert batch.lists.there.all()
        met += batch.by_side(batch.reference_error).ravel().tolist()
    assert sorted(met) == sorted(errors)


def test_scores_of_the_source_order_a_list_and_a_label_set_goes_before_them(chains: str, tmp_path: Path) -> None:
    (part, _) = index_of(chains, lists=True).training
    assert part.above is not None
    assert part.advantage is not None
    np.testing.assert_array_equal(part.above[0], np.tri(3, k=-1, dtype=bool))  # against the pairs
    share = np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum()
    np.testing.assert_allclose(part.advantage[0], share - 1 / 3, rtol=1e-5)
    (colder, _) = index_of(chains, lists=True, score_temperature=0.5).training
    assert colder.advantage is not None
    assert colder.advantage[0, 2] > part.advantage[0, 2]
    (swapped, _) = index_of(chains, lists=True, swap=True).training
    assert swapped.above is not None
    np.testing.assert_array_equal(swapped.above[0], np.tri(3, k=-1, dtype=bool).T)


def test_win_rates_of_a_group_become_its_labels(chains: str) -> None:
    (part, _) = index_of(chains, soft=True, rates=True).training
    chance = 1 / (1 + np.exp(-(np.arange(3)[:, None] - np.arange(3.0))))
    rate = [(chance[image].sum() - 0.5) / 2 for image in range(3)]
    np.testing.assert_allclose(2 * part.label[:2] - 1, [rate[0] - rate[1], rate[1] - rate[2]], rtol=1e-5)


def test_lists_train_from_what_the_reference_gives(
    world: Any, chains: str, run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = run(objective="listwise", caches=[chains], steps=2, output=tmp_path / "listwise")
    assert lines(output)[0]["loss"] == pytest.approx(math.log(6), abs=1e-4)  # a choice of three, then of two
    said = capsys.readouterr().err
    assert "5 lists, 10 records to train on" in said
    assert "(1.791759 at the reference)" in said
    # Descending lair's loss raises the reward of the image with the highest score.
    output = run(objective="lair", caches=[chains], steps=4, learning_rate=1e-3, output=tmp_path / "lair")
    assert lines(output)[0]["loss"] == pytest.approx(0, abs=1e-4)
    assert lines(output)[-1]["margin"] > 0
    with pytest.raises(CacheIncomplete, match="needs a score"):
        run(objective="lair", output=tmp_path / "without")


def test_lists_of_other_images_of_the_same_groups_are_another_index(world: Any, tmp_path: Path) -> None:
    """One pair of a group's two is left, first over second or second over third: lists of two either way."""
    location = world.cache(tmp_path / "c", shards=(1,), images=3)
    prints = []
    for pair_id in next(iter(open_cache(location))).read("pair/id"):
        (tmp_path / "only").write_text(f"{pair_id}\n")
        index = index_of(location, lists=True, only=tmp_path / "only")
        assert index.training[0].sides.shape == (1, 2)
        prints.append(index.fingerprint)
    assert prints[0] != prints[1]


# --- spaces ---


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_errors_of_every_space_are_multiples_of_each_other(kind: str) -> None:
    """Two predictions at one x_t, each brought to both spaces by its definition."""
    flow = kind == "flow_prediction"
    times = torch.linspace(0.01, 0.98, 7, dtype=torch.float64)
    levels = (
        Levels.from_density("uniform", 1.0, 7) if flow else Levels.from_alphas_cumprod(torch.linspace(0.99, 0.02, 7))
    )
    a, s = levels.signal, levels.noise
    x, noise, other = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def spaces(eps: torch.Tensor) -> dict[str, torch.Tensor]:
        x0 = (x - s * eps) / a
        return {"epsilon": eps, "v_prediction": a * eps - s * x0, "sample": x0, "flow_prediction": eps - x0}

    left, right = spaces(noise), spaces(other)
    square = {name: (left[name] - right[name]).square() for name in left}
    target = square["flow_prediction" if flow else "epsilon"]
    space = "velocity" if flow else "noise"
    wanted = {"own": kind, "noise": "epsilon", "v": "flow_prediction" if flow else "v_prediction"}
    for name, other_kind in wanted.items():
        weight = error_weights(levels, kind, name, space)
        assert torch.allclose(weight * target, square[other_kind], rtol=1e-9), name
    assert len(times) == len(a)


def test_a_v_model_is_trained_in_v_space_unless_told_otherwise(
    make_world: Callable[..., Any], run: Callable[..., Path], tmp_path: Path
) -> None:
    world = make_world("sd2-v")
    location = world.cache(tmp_path / "c", shards=(3,))
    (shard,) = open_cache(location)
    error = shard.read("reference_error")[shard.sides()[:, 0]]
    abar = world.model.levels.signal.numpy()[shard.read("timestep")[shard.groups()]] ** 2
    for space, expected in (("own", (error / abar).mean()), ("noise", error.mean())):
        output = run(
            model=str(world.model.folder),
            caches=[location],
            objective="sft",
            loss_space=space,
            steps=1,
            batch_size=6,
            output=tmp_path / space,
        )
        assert lines(output)[0]["loss"] == pytest.approx(float(expected), rel=1e-3)


# --- refusals, and the judge ---


def test_what_does_not_go_together_is_refused(world: Any, run: Callable[..., Path], tmp_path: Path) -> None:
    for flags, says in (
        ({"objective": "kto", "sdpo": 0.5}, "--sdpo does not go with"),
        ({"objective": "listwise", "sdpo": 0.5}, "--sdpo does not go with"),
        ({"objective": "inversion_dpo", "loss_space": "v"}, "--loss-space does not go with"),
        ({"objective": "inpo", "parameter": 1.0}, "no number of its own"),
        ({"timestep_range": (5, 5)}, "0 <= LOW < HIGH"),
    ):
        with pytest.raises(UsageError, match=says):
            run(**flags)
    with pytest.raises(CacheIncomplete, match="captions were dropped"):
        run(objective="snpo")
    with pytest.raises(CacheIncomplete, match="needs soft labels"):
        run(objective="capo")
    dropped = world.cache(tmp_path / "dropped", shards=(4,), drop_caption=lambda pair: pair == 0, caption_dropout=0.2)
    assert lines(run(objective="snpo", caches=[dropped], steps=1))[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)


def test_an_accuracy_has_turned_when_three_in_a_row_are_clearly_below_the_best() -> None:
    judge = Judge()
    for step, (accuracy, turned) in enumerate(
        [
            (0.5, False),
            (0.7, False),
            (0.66, False),
            (0.65, False),
            (0.69, False),
            (0.6, False),
            (0.6, False),
            (0.6, True),
        ]
    ):
        judge.evaluations.append(Evaluation(step, accuracy, 256))
        assert judge.turned == turned, step
    assert judge.best.step == 1
    few = Judge(evaluations=[Evaluation(step, accuracy, 4) for step, accuracy in enumerate((1.0, 0.9, 0.9, 0.9))])
    assert not few.turned  # four records cannot tell


def test_an_evaluation_is_held_against_those_of_the_same_records() -> None:
    judge = Judge(evaluations=[Evaluation(50, 1.0, 4)])
    judge.evaluations += [Evaluation(100 + step, 0.75 + step / 1000, 256) for step in range(4)]
    assert not judge.turned
    assert judge.best.step == 103
    judge.evaluations += [Evaluation(200 + step, 0.5, 256) for step in range(3)]
    assert judge.turned


def test_a_run_stops_where_the_held_out_accuracy_turned(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Judge, "turned", property(lambda self: len(self.evaluations) > 1))
    options = {"steps": 5, "held_out": 0.5, "evaluate_every": 1, "log_every": 1, "overfitting": "stop"}
    output = run(**options)
    assert [line["step"] for line in lines(output)] == [0, 1, 2]
    assert (output / "pipeline/model_index.json").is_file()
    document = json.loads((output / "checkpoints/step-00000002/run.json").read_text())
    assert [each[0] for each in document["held_out"]] == [1, 2]
    assert "has turned" in capsys.readouterr().err
    run(**options)  # goes on from its checkpoint, which knows, and makes no step
    assert [line["step"] for line in lines(output)] == [0, 1, 2]


@pytest.mark.parametrize("keep_last", [2, 3])
def test_what_is_advised_when_it_turned_is_there_and_can_be_done(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], keep_last: int
) -> None:
    """The save of step 3 removes the first step's checkpoint, if two are kept. Every step is evaluated, few logged."""
    monkeypatch.setattr(Judge, "turned", property(lambda self: len(self.evaluations) > 2))
    monkeypatch.setattr(Judge, "best", property(lambda self: self.evaluations[0]))
    options = {"held_out": 0.5, "evaluate_every": 1, "log_every": 7, "save_every": 1, "keep_last": keep_last}
    output = run(steps=3, schedule="cosine", **options)
    assert [line["step"] for line in lines(output)] == [0, 1, 2, 3]
    said = capsys.readouterr().err
    assert "has turned" in said
    advised = re.search(r"`--resume (\S+) --steps 1` writes the model of then", said)
    assert bool(advised) == (keep_last == 3)
    if advised:
        run(steps=1, schedule="cosine", resume=advised[1], **options)
        trained = UNet2DConditionModel.from_pretrained(output / "pipeline", subfolder="unet").state_dict()
        saved = load_file(Path(advised[1]) / WEIGHTS)
        assert all(torch.equal(saved[name], value) for name, value in trained.items())
