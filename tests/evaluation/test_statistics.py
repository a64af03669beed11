"""Statistics against scipy's own."""

import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from inpo.evaluation.statistics import compare_scores, wilson_interval


@given(st.integers(1, 3000).flatmap(lambda trials: st.tuples(st.integers(0, trials), st.just(trials))))
def test_wilson_is_scipys(counts: tuple[int, int]) -> None:
    successes, trials = counts
    expected = scipy.stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.fixture(scope="module")
def scores() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    a = rng.normal(size=120)
    return a, a + rng.gamma(2.0, 0.3, size=120) - 0.4


def test_plain_numbers(scores: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = scores
    a[:6] = b[:6]
    got = compare_scores(a, b, [str(index) for index in range(120)])
    assert (got.wins, got.ties, got.losses) == (int((b > a).sum()), 6, int((b < a).sum()))
    assert got.win_rate == pytest.approx((got.wins + 3) / 120)
    assert got.mean_difference == pytest.approx(got.mean_b - got.mean_a)
    assert got.median_difference == np.median(b - a)
    assert (got.median_a, got.median_b) == (np.median(a), np.median(b))
    # Wilson's interval with ties as halves is scipy's at the next whole count, 6 ties being 3 wins.
    expected = scipy.stats.binomtest(got.wins + 3, 120).proportion_ci(method="wilson")
    assert got.win_rate_wilson == pytest.approx((expected.low, expected.high))


def test_what_float32_rounds_is_a_tie() -> None:
    """Scores that stand 4 steps of float32 apart, as another batch size leaves them, and 1e-4 of their size."""
    a = np.array([-8.911572, -0.4945376, 0.2731, 4.415461, -2.5, -1e-4] * 2)
    steps = np.array([4, -4, 1, -4, 2, 0])
    near = np.concatenate([a[:6] + steps * np.spacing(np.abs(a[:6]).astype(np.float32)).astype(float), a[6:]])
    near[5] += 1e-7  # a sum of what was rounded at the size of the others
    got = compare_scores(a, near, [str(index) for index in range(12)])
    assert (got.wins, got.ties, got.losses, got.win_rate) == (0, 12, 0, 0.5)
    apart = a + 1e-4 * np.abs(a) * np.array([1, -1, 1, 1, -1, 1] * 2)
    apart[5::6] = a[5::6] + 1e-3
    for size in (1e-6, 1.0, 1e6):  # whatever a scorer's unit is
        got = compare_scores(size * a, size * apart, [str(index) for index in range(12)])
        assert (got.wins, got.ties, got.losses) == (8, 0, 4)


def test_one_image_per_prompt_is_the_ordinary_bootstrap(scores: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = scores
    got = compare_scores(a, b, [f"p{index}" for index in range(120)])
    for interval, statistic in ((got.mean_difference_interval, np.mean), (got.median_difference_interval, np.median)):
        expected = scipy.stats.bootstrap(
            (b - a,), statistic, n_resamples=8000, method="percentile", rng=np.random.default_rng(7)
        ).confidence_interval
        # Other draws: the ends agree within their Monte Carlo error.
        assert interval == pytest.approx((expected.low, expected.high), abs=0.02)


def test_images_of_one_prompt_do_not_count_as_independent(scores: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = scores
    prompts = [f"p{index}" for index in range(120)]
    once = compare_scores(a, b, prompts)
    # Every image eight times over: no new knowledge, so no narrower interval; order of rows must not matter either.
    order = np.random.default_rng(0).permutation(960)
    eight = compare_scores(np.tile(a, 8)[order], np.tile(b, 8)[order], [(prompts * 8)[index] for index in order])
    assert eight.num_pairs == 960
    assert eight.num_prompts == 120
    assert eight.win_rate_wilson == pytest.approx(once.win_rate_wilson)
    assert (eight.prompt_wins, eight.prompt_losses, eight.p_value) == (once.wins, once.losses, once.p_value)
    assert eight.mean_difference_interval == pytest.approx(once.mean_difference_interval, abs=0.02)
    assert eight.win_rate_bootstrap == pytest.approx(once.win_rate_bootstrap, abs=0.02)


def test_prompts_with_unequal_numbers_of_images_weigh_by_image() -> None:
    a, b = np.zeros(5), np.array([1.0, 1.0, 1.0, -1.0, 3.0])
    got = compare_scores(a, b, ["x", "x", "x", "y", "y"])
    assert got.mean_difference == 1.0
    # Two prompts: the resamples are xx, xy and yy, with means 1, 1 and 1.
    assert got.mean_difference_interval == (1.0, 1.0)
    assert got.win_rate == 0.8


@pytest.mark.parametrize(
    ("wins", "losses", "ties", "verdict"),
    [
        (90, 10, 0, "B wins"),
        (10, 90, 0, "B does not win: it loses"),
        (52, 48, 0, "B does not win: no difference shown"),
        (0, 0, 100, "B does not win: no difference shown"),
        (1, 0, 0, "B does not win: no difference shown"),
    ],
)
def test_the_verdict_is_plain(wins: int, losses: int, ties: int, verdict: str) -> None:
    b = np.array([1.0] * wins + [-1.0] * losses + [0.0] * ties)
    assert compare_scores(np.zeros(len(b)), b, [str(index) for index in range(len(b))]).verdict == verdict


@pytest.mark.parametrize("num_prompts", [2, 3, 4, 5, 6, 8, 12, 20])
def test_a_coin_wins_or_loses_in_one_of_twenty_comparisons_at_most(num_prompts: int) -> None:
    """Every outcome that equal models can have, by its probability; and one win less than it takes would be too few."""
    share = [Fraction(math.comb(num_prompts, wins), 2**num_prompts) for wins in range(num_prompts + 1)]
    prompts = [str(index) for index in range(num_prompts)]
    verdicts = [
        compare_scores(np.zeros(num_prompts), np.where(np.arange(num_prompts) < wins, 1.0, -1.0), prompts).verdict
        for wins in range(num_prompts + 1)
    ]
    won = [wins for wins, verdict in enumerate(verdicts) if verdict == "B wins"]
    lost = [wins for wins, verdict in enumerate(verdicts) if verdict == "B does not win: it loses"]
    assert lost == [num_prompts - wins for wins in reversed(won)]
    alarms = sum(share[wins] for wins in won + lost)
    least = min(won, default=num_prompts + 1)
    assert alarms <= Fraction(1, 20) < alarms + 2 * share[least - 1]


def test_one_prompt_gives_no_bootstrap_interval() -> None:
    got = compare_scores(np.zeros(3), np.ones(3), ["same"] * 3)
    assert got.mean_difference_interval is None
    assert got.win_rate == 1.0


def test_equal_input_gives_equal_numbers(scores: tuple[np.ndarray, np.ndarray]) -> None:
    prompts = [str(index) for index in range(120)]
    assert compare_scores(*scores, prompts) == compare_scores(*scores, prompts)
