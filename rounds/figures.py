"""What a cache of samples says of the model that made them: how much it was told apart, and how much it varies."""

from dataclasses import dataclass

import numpy as np

from inpo.common.cache import Cache


@dataclass(frozen=True, kw_only=True)
class SampleFigures:
    """Of the images that stand in a pair."""

    num_pairs: int
    num_groups: int
    num_ties: int
    """Rows whose images' scores do not differ, and that are no pair."""
    score: float
    """Mean of the ranker's scores."""
    advantage_norm: float
    """Root mean square of score minus its group's mean: how far the ranker tells a prompt's images apart."""
    diversity: float
    """Root mean square difference of x0 between two images of a group, mean over groups, in units of the spread of all
    x0: falls when a model makes one image of a prompt."""


def sample_figures(cache: Cache) -> SampleFigures:
    """From x0 and the scores alone; no image is decoded."""
    scores, advantages, distances, squares, sums, count = [], [], [], 0.0, 0.0, 0
    for shard in cache:
        group, score = shard.read("image/group"), shard.read("image/score").astype(np.float64)
        x0 = shard.read("x0").astype(np.float64).reshape(len(group), -1)
        scores.append(score)
        squares, sums, count = squares + float((x0**2).sum()), sums + float(x0.sum()), count + x0.size
        for number in np.unique(group):
            inside = group == number
            advantages.append(score[inside] - score[inside].mean())
            x, n = x0[inside], int(inside.sum())
            # Over all ordered pairs, sum |x_i - x_j|^2 is 2 n sum |x_i - mean|^2.
            square = 2 * n * ((x - x.mean(axis=0)) ** 2).sum() / (n * (n - 1)) / x.shape[1]
            distances.append(np.sqrt(square))
    spread = np.sqrt(squares / count - (sums / count) ** 2)
    return SampleFigures(
        num_pairs=cache.num_pairs,
        num_groups=len(distances),
        num_ties=sum(commit.skipped.get("tie", 0) for commit in cache.commits.values()),
        score=float(np.concatenate(scores).mean()),
        advantage_norm=float(np.sqrt(np.mean(np.concatenate(advantages) ** 2))),
        diversity=float(np.mean(distances) / spread),
    )
