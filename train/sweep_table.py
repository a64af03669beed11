"""What came of a sweep's runs: one row for each, as Markdown and JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from inpo.common.errors import StorageError
from inpo.common.judge import Evaluation, Judge
from inpo.train.configuration import Resolved
from inpo.train.metrics import METRICS, read_metrics
from inpo.train.objectives import beta_of, parameter_of
from inpo.train.sweep_samples import SampleScore

_ALIKE = "Margins, losses and advantages compare only between runs of one beta and one space."


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One run of a sweep."""

    name: str
    output: Path
    settings: dict[str, Any]
    """Objective, beta, parameter, learning_rate, steps."""
    last: dict[str, Any] = field(default_factory=dict)
    """The last line of its metrics."""
    held_out: tuple[Evaluation, ...] = ()
    failed: str | None = None
    scores: Mapping[str, SampleScore] = field(default_factory=dict)

    @classmethod
    def read(cls, name: str, run: Resolved, *, failed: str | None, measured: bool) -> "SweepRow":
        """From what the run left behind; not `measured`: the metrics in its folder are not its own, and it has none."""
        settings = run.settings
        try:
            lines = read_metrics(run.output / METRICS) if measured else []
        except StorageError as error:
            lines, failed = [], failed or error.what
        held_out = tuple(found for line in lines if (found := Evaluation.of(line)) is not None)
        told = {"objective": settings.objective, "beta": beta_of(settings), "parameter": parameter_of(settings)}
        told |= {"learning_rate": settings.learning_rate, "steps": settings.steps}
        last = {name: value for name, value in (lines[-1] if lines else {}).items() if not isinstance(value, list)}
        return cls(name=name, output=run.output, settings=told, last=last, held_out=held_out, failed=failed)

    def to_json(self) -> dict[str, Any]:
        scores = {name: asdict(each) for name, each in self.scores.items()}
        held_out = [each._asdict() for each in self.held_out]
        return asdict(self) | {"output": str(self.output), "held_out": held_out, "scores": scores}

    def cells(self, scorers: Sequence[str]) -> list[str]:
        """Its row."""
        told, last = self.settings, self.last
        cells = [self.name, told["objective"], _number(told["beta"]), _number(told["parameter"])]
        cells += [_number(told["learning_rate"]), str(last.get("step", 0))]
        cells += [_number(last.get(name)) for name in ("loss", "implicit_accuracy")]
        if self.held_out:
            now, best = self.held_out[-1], Judge(evaluations=list(self.held_out)).best
            cells += [f"{now.accuracy:.3f} ± {now.standard_error:.3f}", f"{best.accuracy:.3f} at {best.step}"]
        else:
            cells += ["-", "-"]
        cells += [_number(last.get(f"held_out_{name}")) for name in ("margin", "win_advantage", "lose_advantage")]
        for scorer in scorers:
            found = self.scores.get(scorer)
            cells.append("-" if found is None else f"{found.win_rate:.2f} of {found.num_prompts}")
        return [*cells, self.failed or "done"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _scorers(rows: Sequence[SweepRow]) -> list[str]:
    return list(dict.fromkeys(name for each in rows for name in each.scores))


def _heads(scorers: Sequence[str]) -> list[str]:
    return [
        *("run", "objective", "beta", "parameter", "rate", "steps", "loss", "accuracy", "held-out accuracy", "best"),
        *("held-out margin", "win advantage", "lose advantage"),
        *(f"{name}: wins over the reference" for name in scorers),
        "outcome",
    ]


def markdown(rows: Sequence[SweepRow]) -> str:
    """The table, and what it does not compare."""
    scorers = _scorers(rows)
    heads = _heads(scorers)
    cells = [heads, ["---"] * len(heads), *(each.cells(scorers) for each in rows)]
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in cells]
    return "\n".join([*lines, "", _ALIKE, ""])
