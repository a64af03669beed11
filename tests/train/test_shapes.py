"""Caches of different latent shapes are trained on together: a micro-batch has one shape, an epoch has every record."""

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from inpo.common.cache import open_cache
from inpo.train.index import build_index
from inpo.train.order import ShapeOrder
from inpo.train.records import Needs
from inpo.train.stream import RecordStream, held_out_batches
from tests.train.test_stream import index_of, same, stream_of, take


@pytest.fixture(scope="module")
def caches(make_world: Callable, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two caches of one model: 6 pairs of 8 x 8 latents and 2 of 4 x 4, two records each."""
    folder = tmp_path_factory.mktemp("shapes")
    return [
        make_world().cache(folder / "large", shards=(4, 2), side=8),
        make_world().cache(folder / "small", shards=(2,), side=4),
    ]


def test_each_micro_batch_has_one_shape_and_an_epoch_every_record(caches: list[str]) -> None:
    stream = stream_of(index_of(*caches), batch_size=2)
    taken = take(stream, 16)  # 12 + 4 records are 8 micro-batches
    sides = [batch.x_t.shape[-1] for batch in taken]
    assert all(batch.x_t.shape[-2:] == (side, side) for batch, side in zip(taken, sides, strict=True))
    for epoch in (taken[:8], taken[8:]):
        assert Counter(batch.x_t.shape[-1] for batch in epoch) == {8: 6, 4: 2}
        seen = Counter(tuple(row.flatten().tolist()) for batch in epoch for row in batch.target)
        assert set(seen.values()) == {1}
        assert len(seen) == 2 * 16
    assert stream.epoch == 2.0


def test_ranks_take_one_shape_together_and_a_stream_goes_on_where_it_stopped(caches: list[str]) -> None:
    index = index_of(*caches)
    ranks = [
        take(RecordStream(index, Needs(), batch_size=1, window_shards=2, seed=3, rank=r, world_size=2), 8)
        for r in (0, 1)
    ]
    assert [b.x_t.shape for b in ranks[0]] == [b.x_t.shape for b in ranks[1]]
    state = stream_of(index, batch_size=1, seed=3).state_dict() | {"consumed": 5}
    whole = take(stream_of(index, batch_size=1, seed=3), 9)
    resumed = stream_of(index, batch_size=1, seed=3)
    resumed.load_state_dict(state)
    assert all(same(left, right) for left, right in zip(whole[5:], take(resumed, 4), strict=True))


def test_held_out_batches_have_one_shape_each(caches: list[str]) -> None:
    index = build_index([open_cache(each) for each in caches], soft=False, held_out=0.5)
    batches = held_out_batches(index, Needs(), batch_size=3, most_records=100, seed=0)
    assert sum(batch.num_records for batch in batches) == sum(shard.num_records for shard in index.held_out)
    assert {batch.x_t.shape[-1] for batch in batches} == {
        shard.shard.cache.manifest.latent_shape[-1] for shard in index.held_out
    }


@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.integers(1, 30), st.integers(0, 9))
@example(records=[1000, 3], per_turn=8, seed=0)
@example(records=[1, 2, 1], per_turn=64, seed=0)
def test_every_shape_has_its_turns_in_order_and_its_records_equally_often(
    records: list[int], per_turn: int, seed: int
) -> None:
    order = ShapeOrder(records, records_per_turn=per_turn, seed=seed)
    turns = [order.turn(number) for number in range(40 * sum(records) // per_turn)]
    epochs = len(turns) * per_turn / sum(records)
    for shape, number in enumerate(records):
        own = [turn for each, turn in turns if each == shape]
        assert own == list(range(len(own)))
        # Within the epoch that is going on, and half a turn of each shape.
        assert abs(len(own) * per_turn - epochs * number) <= number + per_turn * (len(records) + 1) / 2
    again = ShapeOrder(records, records_per_turn=per_turn, seed=seed)
    assert [again.turn(number) for number in reversed(range(len(turns)))] == turns[::-1]


def test_what_fills_no_whole_turn_waits_for_a_later_epoch(caches: list[str]) -> None:
    taken = take(stream_of(index_of(*caches), batch_size=8), 40)  # 12 and 4 records: 1.5 turns of an epoch, and 0.5
    assert Counter(batch.x_t.shape[-1] for batch in taken) == {8: 30, 4: 10}
    for side in (8, 4):
        seen = Counter(
            tuple(row.flatten().tolist()) for batch in taken if batch.x_t.shape[-1] == side for row in batch.target
        )
        assert set(seen.values()) == {20}
