"""Paired statistics of two models' scores: win rate, mean and median, each with a 95% interval.

`a` and `b` are scores of the same (prompt, seed); a difference is b - a. Images of one prompt are not independent, so
the bootstrap draws whole prompts, and the sign test that the verdict is of counts prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy.stats
from jaxtyping import Float, Int

from inpo.common.scorer import alike

Interval = tuple[float, float]
CONFIDENCE = 0.95
RESAMPLES = 4000
FEW_PROMPTS = 20
"""With fewer, bootstrap intervals of means hold the truth clearly less often than they say."""


@dataclass(frozen=True, kw_only=True)
class PairedStatistics:
    """Model B against model A under one scorer. Intervals are 95%; None with fewer than two prompts."""

    num_pairs: int
    num_prompts: int
    wins: int
    """Pairs in which B's score is higher."""
    ties: int
    """Pairs whose scores are equal but for float32 rounding."""
    losses: int
    prompt_wins: int
    """Prompts of which B's images win more often than they lose."""
    prompt_losses: int
    win_rate: float
    """(wins + ties / 2) / pairs."""
    win_rate_wilson: Interval
    """Wilson's score interval, with one trial per prompt (a pair, with one image per prompt)."""
    win_rate_bootstrap: Interval | None
    mean_a: float
    mean_b: float
    mean_difference: float
    mean_difference_interval: Interval | None
    median_a: float
    median_b: float
    median_difference: float
    """Median of the differences, which is not the difference of the medians."""
    median_difference_interval: Interval | None

    @property
    def win_rate_interval(self) -> Interval:
        """From the lower to the upper end of both intervals."""
        wilson, bootstrap = self.win_rate_wilson, self.win_rate_bootstrap or self.win_rate_wilson
        return min(wilson[0], bootstrap[0]), max(wilson[1], bootstrap[1])

    @property
    def p_value(self) -> float:
        """Of the exact two-sided sign test over prompts, which is right for any number of them; ties are left out."""
        decided = self.prompt_wins + self.prompt_losses
        return float(scipy.stats.binomtest(self.prompt_wins, decided).pvalue) if decided else 1.0

    @property
    def verdict(self) -> str:
        """In words, by the sign test; says plainly when B does not win."""
        if self.p_value > 1 - CONFIDENCE:
            return "B does not win: no difference shown"
        return "B wins" if self.prompt_wins > self.prompt_losses else "B does not win: it loses"

    def to_json(self) -> dict[str, Any]:
        """Every number, with full precision, and the verdict."""
        shown = {name: getattr(self, name) for name in ("win_rate_interval", "p_value", "verdict")}
        return asdict(self) | shown


def wilson_interval(successes: float | int, trials: int, *, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval for a share (Wilson 1927); `successes` may be fractional, as ties count one half."""
    z = float(scipy.stats.norm.ppf(0.5 + confidence / 2))
    share = successes / trials
    centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * float(np.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2)))
    return max(0.0, centre - half), min(1.0, centre + half)


def compare_scores(
    a: Float[np.ndarray, " pair"], b: Float[np.ndarray, " pair"], prompts: Sequence[str]
) -> PairedStatistics:
    """Statistics of `b` against `a`; `prompts` names each pair's prompt. Equal inputs give equal numbers."""
    differences = b - a
    outcomes = np.where(alike(a, b), 0.5, (differences > 0).astype(float))
    groups = np.unique(np.asarray(prompts, dtype=object).astype(str), return_inverse=True)[1]
    num_prompts = int(groups.max()) + 1
    win_rate = float(outcomes.mean())
    by_prompt = np.bincount(groups, weights=outcomes - 0.5)
    return PairedStatistics(
        num_pairs=len(differences),
        num_prompts=num_prompts,
        wins=int((outcomes == 1).sum()),
        ties=int((outcomes == 0.5).sum()),
        losses=int((outcomes == 0).sum()),
        prompt_wins=int((by_prompt > 0).sum()),
        prompt_losses=int((by_prompt < 0).sum()),
        win_rate=win_rate,
        win_rate_wilson=wilson_interval(win_rate * num_prompts, num_prompts),
        win_rate_bootstrap=bootstrap_interval(outcomes, groups, np.nanmean),
        mean_a=float(a.mean()),
        mean_b=float(b.mean()),
        mean_difference=float(differences.mean()),
        mean_difference_interval=bootstrap_interval(differences, groups, np.nanmean),
        median_a=float(np.median(a)),
        median_b=float(np.median(b)),
        median_difference=float(np.median(differences)),
        median_difference_interval=bootstrap_interval(differences, groups, np.nanmedian),
    )


def bootstrap_interval(
    values: Float[np.ndarray, " pair"],
    groups: Int[np.ndarray, " pair"],
    statistic: Callable[..., np.ndarray],
    *,
    confidence: float = CONFIDENCE,
) -> Interval | None:
    """Percentile bootstrap interval of `statistic`, resampling groups (0, 1, ...) and keeping each one's values
    together. None with fewer than two groups. The draws have a fixed seed.
    """
    num_groups = int(groups.max()) + 1
    if num_groups < 2:
        return None
    sizes = np.bincount(groups)
    table = np.full((num_groups, sizes.max()), np.nan)
    order = np.argsort(groups, kind="stable")
    columns = np.concatenate([np.arange(size) for size in sizes])
    table[groups[order], columns] = values[order]

    def of_groups(drawn: np.ndarray, axis: int) -> np.ndarray:
        rows = table[np.moveaxis(drawn, axis, -1)]
        return statistic(rows.reshape(*rows.shape[:-2], -1), axis=-1)

    result = scipy.stats.bootstrap(
        (np.arange(num_groups),),
        of_groups,
        n_resamples=RESAMPLES,
        batch=max(1, 4_000_000 // table.size),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(result.low), float(result.high)
