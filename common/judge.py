"""Has the held-out accuracy turned? What says that a run has begun to learn its pairs by heart."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_IN_A_ROW = 3
"""Evaluations that must lie below the best."""


class Evaluation(NamedTuple):
    """A held-out evaluation."""

    step: int
    accuracy: float
    num_records: int

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Evaluation | None":
        """What a line of metrics says of held-out records; None if it says nothing, or no finite number."""
        accuracy, parts = values.get("held_out_implicit_accuracy"), values.get("held_out_by_timestep")
        if accuracy is None or not math.isfinite(accuracy) or not parts:
            return None
        return cls(values["step"], accuracy, sum(part["records"] for part in parts))

    @property
    def standard_error(self) -> float:
        """Of the accuracy; never 0, because a few records that are all told right are no certainty."""
        share = (self.accuracy * self.num_records + 1) / (self.num_records + 2)
        return math.sqrt(share * (1 - share) / self.num_records)


@dataclass(kw_only=True)
class Judge:
    """The evaluations of a run, in order. Those of other records than the last is of say nothing beside it: a run may
    go on with another number of them."""

    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def _alike(self) -> list[Evaluation]:
        """Those of as many records as the last, which are then the same ones."""
        return [each for each in self.evaluations if each.num_records == self.evaluations[-1].num_records]

    @property
    def best(self) -> Evaluation:
        """The first of the highest accuracy."""
        return max(self._alike, key=lambda each: (each.accuracy, -each.step))

    @property
    def turned(self) -> bool:
        """The last three are worse than the best by more than its standard error."""
        alike = self._alike
        if len(alike) <= _IN_A_ROW:
            return False
        limit, last = self.best.accuracy - self.best.standard_error, alike[-_IN_A_ROW:]
        return all(each.accuracy < limit for each in last)
