"""One setting of a grid, in numbers."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One setting of a method's grid on validation captions."""

    learning_rate: float
    strength: float | None
    sureness: float
    """Mean over seeds of the oracle's mean paired improvement over its standard error. The win rate alone would choose
    the most timid steps, since a tiny change for the better wins; the mean alone the most violent."""
    improvement: float
    win_rates: tuple[float, ...]
    """By scorer."""
    seeds: int
