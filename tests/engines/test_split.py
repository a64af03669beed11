"""The static split: every shard has exactly one process, whoever asks and however many there are."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from inpo.precompute.tasks import split

shards = st.integers(0, 10_000)
processes = st.integers(1, 1_024)


@given(num_shards=shards, world_size=processes)
@example(num_shards=10_000, world_size=1_024)
@example(num_shards=10_000, world_size=1)
@example(num_shards=1, world_size=1_024)
@example(num_shards=0, world_size=1_024)
def test_disjoint_and_complete(num_shards: int, world_size: int) -> None:
    owners = [0] * num_shards
    for rank in range(world_size):
        for index in split(num_shards, rank, world_size):
            owners[index] += 1
    assert owners == [1] * num_shards


@given(num_shards=shards, world_size=processes)
@example(num_shards=10_000, world_size=1_024)
@example(num_shards=10_000, world_size=1)
@example(num_shards=1, world_size=1_024)
@example(num_shards=0, world_size=1_024)
def test_no_process_has_two_shards_more_than_another(num_shards: int, world_size: int) -> None:
    sizes = [len(split(num_shards, rank, world_size)) for rank in range(world_size)]
    assert max(sizes) - min(sizes) <= 1


@given(num_shards=shards, more=st.integers(0, 10_000), world_size=processes, data=st.data())
def test_appended_shards_leave_the_owners_of_the_others(
    num_shards: int, more: int, world_size: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, world_size - 1))
    before, after = split(num_shards, rank, world_size), split(num_shards + more, rank, world_size)
    assert list(after)[: len(before)] == list(before)


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 4), (4, 4), (0, 0)])
def test_a_rank_outside_of_the_world_is_refused(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match="rank"):
        split(10, rank, world_size)
