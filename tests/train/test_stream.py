"""Which records come, in which order, with which numbers."""

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inpo.common.cache import CacheWriter, Manifest, ShardData, TextData, open_cache
from inpo.common.cache.committed import CommittedArrays
from inpo.common.cache.labels import LabelSet, PairLabel, write_labels
from inpo.common.cache.reader import Shard
from inpo.common.errors import CacheCorrupt, CacheIncomplete, CacheMismatch, TrainingError, UsageError
from inpo.train.index import Index, build_index
from inpo.train.order import GlobalOrder, OrderedShard, WindowKey
from inpo.train.records import Batch, Needs
from inpo.train.stream import RecordStream, held_out_batches


def index_of(*locations: str, **options: Any) -> Index:
    return build_index([open_cache(location) for location in locations], **({"soft": False, "held_out": 0.0} | options))


def stream_of(index: Index, **options: Any) -> RecordStream:
    return RecordStream(index, Needs(), **({"batch_size": 2, "window_shards": 2, "seed": 0} | options))


def take(stream: RecordStream, count: int) -> list[Batch]:
    batches = iter(stream)
    taken = [next(batches) for _ in range(count)]
    stream.close()
    return taken


def same(left: Batch, right: Batch) -> bool:
    return all(
        torch.equal(getattr(left, name), getattr(right, name))
        for name in ("x_t", "target", "reference_error", "timestep", "sides", "label")
    ) and torch.equal(left.condition["embedding"], right.condition["embedding"])


def ordered(groups: int, most: int, records: int) -> OrderedShard:
    """A shard of so many groups, of 1 to `most` pairs in turn."""
    return OrderedShard(
        group=np.repeat(np.arange(groups), [1 + number % most for number in range(groups)]), num_records=records
    )


@given(
    shards=st.lists(
        st.builds(ordered, st.integers(1, 6), st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=5
    ),
    window=st.integers(1, 4),
    seed=st.integers(0, 99),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 4),
)
@settings(max_examples=30)
def test_every_epoch_uses_every_record_once_whatever_the_ranks(
    shards: list[OrderedShard], window: int, seed: int, batch_size: int, world_size: int
) -> None:
    """The ranks' micro-batches, dealt round, are one sequence; cut at the epochs it is a permutation each time, and
    cut into an epoch's slices it has every pair once."""
    order = GlobalOrder(shards, window_shards=window, seed=seed)
    total = sum(shard.num_pairs * shard.num_records for shard in shards)
    assert order.num_records == total
    needed = -(-3 * total // batch_size)
    turns = -(-needed // world_size)
    dealt = [
        order.micro_batch(turn * world_size + rank, batch_size) for turn in range(turns) for rank in range(world_size)
    ]
    records, shuffled = [], functools.cache(order.shuffled)
    for each in [position for micro_batch in dealt for position in micro_batch][: 3 * total]:
        records.append((each.key, *shuffled(each.key)[each.offset].tolist()))
    everything = {
        (number, pair, record)
        for number, shard in enumerate(shards)
        for pair in range(shard.num_pairs)
        for record in range(shard.num_records)
    }
    for epoch in range(3):
        part = records[epoch * total : (epoch + 1) * total]
        assert {key.epoch for key, *_ in part} == {epoch}
        assert Counter((shard, pair, record) for _, shard, pair, record in part) == Counter(everything)
        slices = [key.slice for key, *_ in part]
        assert slices == sorted(slices)
        for number in set(slices):
            met = [(shard, pair) for key, shard, pair, _ in part if key.slice == number]
            assert len(met) == len(set(met)), "a slice visits a pair once"


def test_a_groups_pairs_follow_each_other_at_one_record() -> None:
    shards = [ordered(groups=20, most=4, records=3), ordered(groups=9, most=2, records=3)]
    order = GlobalOrder(shards, window_shards=2, seed=5)
    for number in range(3):
        key = order.position(number * sum(shard.num_pairs for shard in shards)).key
        runs = []
        for shard, pair, record in order.shuffled(key).tolist():
            each = (shard, int(shards[shard].group[pair]), record)
            if runs[-1:] != [each]:
                runs.append(each)
        assert len(runs) == 29
    first, second = (order.shuffled(WindowKey(epoch=0, slice=number, window=0)) for number in (0, 1))
    assert [row[:2] for row in first.tolist()] != [row[:2] for row in second.tolist()], "another order in each slice"


def test_epochs_and_seeds_differ_and_windows_mix_shards() -> None:
    def sequence(seed: int, epoch: int) -> list[list[int]]:
        order = GlobalOrder([ordered(40, 1, 1)] * 6, window_shards=3, seed=seed)
        shuffled = functools.cache(order.shuffled)
        return [shuffled(each.key)[each.offset].tolist() for each in order.micro_batch(epoch, 240)]

    assert sequence(0, 0) == sequence(0, 0)
    assert sequence(0, 0) != sequence(0, 1)
    assert sequence(0, 0) != sequence(1, 0)
    first_window = sequence(0, 0)[:120]
    assert len({shard for shard, _, _ in first_window}) == 3
    assert len({shard for shard, _, _ in first_window[:20]}) == 3


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_batches_hold_what_the_shards_hold(make_world: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    """Found by their reference error, which is distinct, every record's tensors equal the shard's own arrays."""
    cache = make_world(kind).cache(
        tmp_path / "c", label=lambda pair: 0.6 + pair / 100, drop_caption=lambda pair: pair % 3 == 0
    )
    opened = open_cache(cache)
    texts = {shard.name: shard for shard in opened.texts}
    rows: dict[float, tuple[Shard, int, int]] = {}
    for shard in opened:
        for pair, win in enumerate(shard.read("pair/win").tolist()):
            for record, error in enumerate(shard.read("reference_error")[win].tolist()):
                rows[error] = (shard, pair, record)
    batches = take(stream_of(index_of(cache), batch_size=4), 5)
    seen = set()
    for batch in batches:
        for number, slots in enumerate(batch.sides.tolist()):
            key = float(batch.reference_error[slots[0]])
            shard, pair, record = rows[key]
            seen.add(key)
            images = [int(shard.read(f"pair/{side}")[pair]) for side in ("win", "lose")]
            assert float(batch.label[number]) == shard.read("pair/label")[pair]
            group = int(shard.read("image/group")[images[0]])
            place, row = shard.read("group/prompt")[group].tolist()
            name, row = ("empty", 0) if shard.read("group/caption_dropped")[group] else (shard.commit.texts[place], row)
            for slot, image in zip(slots, images, strict=True):
                assert np.array_equal(batch.x_t[slot], shard.read("x_t")[image, record])
                assert np.array_equal(batch.target[slot], shard.read("target")[image, record])
                assert float(batch.reference_error[slot]) == shard.read("reference_error")[image, record]
                assert int(batch.timestep[slot]) == shard.read("timestep")[group, record]
                for prompts in batch.prompts:
                    expected = texts[name].read_stored(prompts)[row]
                    assert np.array_equal(batch.condition[prompts][slot], expected)
                if kind == "sdxl":
                    assert np.array_equal(batch.condition["time_ids"][slot], shard.read("image/time_ids")[image])
    assert seen == set(rows)


def lean_copy(location: str, to: Path) -> str:
    """The same numbers without what a lean cache leaves out."""
    full = open_cache(location)
    writer = CacheWriter.open(str(to), Manifest(**full.manifest.model_dump() | {"profile": "lean"}))
    for shard in full:
        arrays = {path: shard.read(path) for path in writer.manifest.specs}
        data = ShardData(arrays=arrays, source=shard.commit.source, texts=shard.commit.texts)
        assert writer.write(shard.name, data) is not None
    for text in full.texts:
        arrays = {path: text.read_stored(path) for path in writer.manifest.text_specs}
        assert writer.write_texts(text.name, TextData(arrays=arrays)) is not None
    return str(to)


def test_a_lean_cache_gives_the_same_bits(cache: str, tmp_path: Path) -> None:
    lean = lean_copy(cache, tmp_path / "lean")
    full_batches, lean_batches = take(stream_of(index_of(cache)), 9), take(stream_of(index_of(lean)), 9)
    assert all(same(left, right) for left, right in zip(full_batches, lean_batches, strict=True))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_one_sequence(cache: str, world_size: int) -> None:
    index = index_of(cache)
    alone = take(stream_of(index), 12)
    ranks = [take(stream_of(index, rank=rank, world_size=world_size), 12 // world_size) for rank in range(world_size)]
    for number, batch in enumerate(alone):
        assert same(batch, ranks[number % world_size][number // world_size])


@given(cut=st.integers(0, 20), window=st.integers(1, 2))
@settings(max_examples=5)
def test_a_resumed_stream_goes_on_where_it_stopped(cache: str, cut: int, window: int) -> None:
    index = index_of(cache)
    whole = take(stream_of(index, window_shards=window), cut + 3)
    first = stream_of(index, window_shards=window)
    take(first, cut)
    second = stream_of(index, window_shards=window)
    second.load_state_dict(first.state_dict())
    assert all(same(left, right) for left, right in zip(take(second, 3), whole[cut:], strict=True))


def test_peeking_does_not_consume(cache: str) -> None:
    stream = stream_of(index_of(cache))
    peeked = stream.peek()
    assert stream.state_dict()["consumed"] == 0
    assert same(peeked, take(stream, 1)[0])


def test_a_state_of_another_order_is_refused(cache: str) -> None:
    stream = stream_of(index_of(cache))
    with pytest.raises(TrainingError, match="another version"):
        stream.load_state_dict(stream.state_dict() | {"version": 0})


def test_held_out_prompts_are_never_trained_on(cache: str) -> None:
    index = index_of(cache, held_out=0.4)

    def prompts(shards: Any) -> set[str]:
        return {str(prompt) for part in shards for prompt in part.shard.prompts()[part.group]}

    assert prompts(index.training)
    assert prompts(index.held_out)
    assert not prompts(index.training) & prompts(index.held_out)
    batches = held_out_batches(index, Needs(), batch_size=2, most_records=5, seed=0)
    assert [batch.num_records for batch in batches] == [2, 2, 1]


def test_lists_choose_pairs(cache: str, tmp_path: Path) -> None:
    chosen = tmp_path / "list"
    chosen.write_text("pair-0001\n\n# a comment\npair-0007\n")
    assert index_of(cache, only=chosen).num_pairs == 2
    assert index_of(cache, excluded=chosen).num_pairs == 7
    chosen.write_text("".join(f"pair-{number:04d}\n" for number in range(9)))
    with pytest.raises(CacheIncomplete, match="No pair is left to train on"):
        index_of(cache, excluded=chosen)
    with pytest.raises(UsageError, match="--only"):
        index_of(cache, only=tmp_path / "nothing")


def test_labels_of_one_half_are_dropped_by_hard_objectives_only(world: Any, tmp_path: Path) -> None:
    location = world.cache(tmp_path / "c", shards=(4,), label=lambda pair: [1.0, 0.5, 0.2, 0.5][pair])
    assert index_of(location).num_pairs == 2
    assert index_of(location, soft=True).num_pairs == 4


def test_a_label_set_replaces_the_sources_labels(world: Any, tmp_path: Path) -> None:
    location = world.cache(tmp_path / "c", shards=(3,))
    cache = open_cache(location)
    with pytest.raises(CacheIncomplete, match="relabel"):
        index_of(location, labels="soft")
    given_labels = {f"pair-{pair:04d}": 0.1 + pair / 10 for pair in range(3)}
    (shard,) = cache
    write_labels(
        cache.store,
        "soft",
        shard.name,
        LabelSet(
            attempt=shard.commit.attempt,
            scorer="s",
            temperature=1.0,
            source="x",
            pairs={name: PairLabel(scores=(0.0, 0.0), label=label) for name, label in given_labels.items()},
        ),
    )
    (part,) = index_of(location, labels="soft", soft=True).training
    np.testing.assert_allclose(part.label, list(given_labels.values()), rtol=1e-6)


def test_several_caches_are_one_table(world: Any, cache: str, tmp_path: Path) -> None:
    other = world.cache(tmp_path / "other", shards=(3,), timesteps_per_pair=3, seed=1)
    index = index_of(cache, other)
    assert index.num_records == 9 * 2 + 3 * 3
    batches = take(stream_of(index, batch_size=3, window_shards=3), 9)
    assert len({float(value) for batch in batches for value in batch.by_side(batch.reference_error)[:, 0]}) == 27


def test_caches_of_two_models_are_refused(make_world: Callable[..., Any], cache: str, tmp_path: Path) -> None:
    other = make_world(seed=1).cache(tmp_path / "other", shards=(2,))
    with pytest.raises(CacheMismatch, match="not made by the same reference"):
        index_of(cache, other)


@pytest.mark.parametrize(("name", "where"), [("target", (3, 0, 0, 2, 3)), ("reference_error", (2, 1))])
def test_a_number_that_is_not_finite_is_refused_by_name(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, where: tuple[int, ...]
) -> None:
    """Our own writer refuses such a shard; here another one wrote it."""
    monkeypatch.setattr(CacheWriter, "_check", lambda self, name, data: None)

    def spoil(shard: int, arrays: dict[str, np.ndarray]) -> None:
        if shard == 1:
            arrays[name][where] = np.nan

    location = world.cache(tmp_path / "c", change=spoil)
    with pytest.raises(CacheCorrupt) as caught:
        take(stream_of(index_of(location)), 9)
    message = str(caught.value)
    assert name in message
    assert "shard-001" in message
    assert "pair-0006" in message
    assert "--except" in message
    (tmp_path / "list").write_text("pair-0006\n")
    assert len(take(stream_of(index_of(location, excluded=tmp_path / "list")), 9)) == 9


def test_only_the_arrays_that_are_needed_are_read(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index = index_of(cache)
    read: set[str] = set()
    for name in ("read_stored", "read_chunks"):
        original = getattr(CommittedArrays, name)

        def spy(self: CommittedArrays, path: str, *args: Any, _original: Any = original, **options: Any) -> np.ndarray:
            read.add(path)
            return _original(self, path, *args, **options)

        monkeypatch.setattr(CommittedArrays, name, spy)
    take(stream_of(index), 3)
    assert read == {
        "x_t",
        "target",
        "timestep",
        "reference_error",
        "image/group",
        "group/caption_dropped",
        "group/prompt",
        "embedding",
    }
