"""Who gets which shard: dynamic hand-out, deaths, poison, stragglers. No cluster, a clock of our own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inpo.precompute.engines.assignment import Assignment


def joined(names: str, *workers: str) -> Assignment:
    assignment = Assignment(names)
    for worker in workers:
        assignment.join(worker, 0.0)
    return assignment


def take_all(assignment: Assignment, worker: str, now: float = 0.0) -> list[str]:
    taken = []
    while (name := assignment.take(worker, now)) is not None:
        taken.append(name)
    return taken


def test_a_worker_holds_three_shards_and_gets_the_next_when_one_is_done() -> None:
    assignment = joined("abcdefg", "one", "two")
    assert take_all(assignment, "one") == ["a", "b", "c"]
    assert take_all(assignment, "two") == ["d", "e", "f"]
    assert assignment.finished("one", "a", 1.0)
    assert take_all(assignment, "one", 1.0) == ["g"]
    assert assignment.num_unfinished == 6


def test_only_shards_in_flight_are_handed_out_again() -> None:
    assignment = joined("abcdef", "one", "two")
    take_all(assignment, "one")
    assignment.finished("one", "a", 5.0)
    loss = assignment.lost("one", 7.5)
    assert loss.retried == ("b", "c")
    assert loss.given_up == ()
    assert loss.seconds == 2.5


def test_what_died_with_its_worker_is_tried_alone() -> None:
    assignment = joined("abcdef", "one")
    take_all(assignment, "one")
    assignment.lost("one", 1.0)
    assignment.join("two", 2.0)
    for name in "abc":
        assert take_all(assignment, "two", 3.0) == [name]
        assignment.finished("two", name, 4.0)
    assert take_all(assignment, "two", 5.0) == ["d", "e", "f"]


def test_a_shard_that_kills_every_worker_is_given_up_and_takes_no_other_with_it() -> None:
    assignment = joined("abcdefgh")
    deaths = 0
    given_up: list[str] = []
    while assignment.num_unfinished:
        assignment.join("worker", float(deaths))
        while (line := take_all(assignment, "worker", float(deaths))) or assignment.line("worker"):
            line = list(assignment.line("worker"))
            if "b" in line:
                deaths += 1
                given_up += assignment.lost("worker", float(deaths)).given_up
                break
            assignment.finished("worker", line[0], float(deaths))
    assert given_up == ["b"]
    assert deaths == 4


def test_an_idle_worker_takes_what_another_has_not_begun_then_what_takes_too_long() -> None:
    assignment = joined("abcx", "slow", "quick")
    assert take_all(assignment, "slow", 0.0) == ["a", "b", "c"]
    assert assignment.take("quick", 0.0) == "x"
    assignment.finished("quick", "x", 1.0)
    assert take_all(assignment, "quick", 1.0) == ["c"], "one at a time, from the end of the line"
    assignment.finished("quick", "c", 2.0)
    assert assignment.take("quick", 2.0) is None, "two seconds are not twice the usual second"
    assert assignment.take("quick", 2.1) == "a"
    assert assignment.finished("quick", "a", 3.0)
    assert not assignment.finished("slow", "a", 9.0), "the other copy counts no second time"
    assert assignment.take("quick", 9.0) == "b"


def test_at_most_two_workers_have_the_same_shard() -> None:
    assignment = joined("ab", "one", "two", "three")
    assignment.take("one", 0.0)
    assignment.take("two", 0.0)
    assignment.finished("two", "b", 1.0)
    assert assignment.take("two", 50.0) == "a"
    assert assignment.take("three", 99.0) is None


def test_a_shard_that_somebody_else_still_has_is_not_handed_out_again() -> None:
    assignment = joined("ab", "one", "two")
    assignment.take("one", 0.0)
    assignment.take("two", 0.0)
    assignment.finished("two", "b", 1.0)
    assignment.take("two", 50.0)
    assert assignment.lost("one", 51.0).retried == ()
    assert assignment.finished("two", "a", 52.0)
    assert assignment.num_unfinished == 0


@given(st.integers(0, 30), st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["take", "end", "die"]))))
def test_whatever_happens_every_shard_is_finished_once_or_given_up(num: int, events: list[tuple[str, str]]) -> None:
    names = [f"s{index}" for index in range(num)]
    assignment = Assignment(names)
    finished: list[str] = []
    given_up: list[str] = []
    alive: set[str] = set()
    now = 0.0

    def end(worker: str) -> None:
        line = assignment.line(worker)
        if line and assignment.finished(worker, line[0], now):
            finished.append(line[0])

    for worker, event in events:
        now += 1.0
        if worker not in alive:
            assignment.join(worker, now)
            alive.add(worker)
        if event == "take":
            assignment.take(worker, now)
        elif event == "end":
            end(worker)
        else:
            given_up += assignment.lost(worker, now).given_up
            alive.remove(worker)
    for worker in alive:
        given_up += assignment.lost(worker, now).given_up
    assignment.join("last", now)
    while assignment.take("last", now) is not None or assignment.line("last"):
        end("last")
    assert sorted(finished + given_up) == sorted(names)
    assert assignment.num_unfinished == 0


def test_shuffling_loses_no_shard() -> None:
    assignment = joined("abcdefghij", "one")
    assignment.shuffle()
    taken = []
    while name := assignment.take("one", 0.0):
        taken.append(name)
        assignment.finished("one", name, 0.0)
    assert sorted(taken) == list("abcdefghij")


def test_an_unknown_worker_is_a_bug() -> None:
    with pytest.raises(KeyError):
        Assignment("a").take("nobody", 0.0)
