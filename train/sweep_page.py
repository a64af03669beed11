"""What came of a sweep's runs: one row for each, as Markdown, JSON and a page that asks no network for anything."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from inpo.common.judge import Evaluation, Judge
from inpo.train.objectives import beta_of, parameter_of
from inpo.train.run import Resolved
from inpo.train.sweep_samples import SampleScore, last_sample

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
    def read(cls, name: str, run: Resolved, *, failed: str | None) -> "SweepRow":
        """From what the run left behind."""
        file, settings = run.output / "metrics.jsonl", run.settings
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
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


def page(rows: Sequence[SweepRow]) -> str:
    """The table, the held-out curves and each run's last samples."""
    scorers = _scorers(rows)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in each.cells(scorers))}</tr>" for each in rows)
    heads = "".join(f"<th>{escape(head)}</th>" for head in _heads(scorers))
    parts = [f"<table><tr>{heads}</tr>{body}</table>", f"<p>{escape(_ALIKE)}</p>"]
    if any(each.held_out for each in rows):
        parts.append(f'<img alt="held-out accuracy by step" src="{_picture(_curves(rows))}">')
    for each in rows:
        file = last_sample(each.output)
        if file is not None:
            parts.append(f"<h2>{escape(each.name)}, {file.stem}</h2>")
            parts.append(f'<img alt="samples of {escape(each.name)}" src="{_picture(file.read_bytes())}">')
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Sweep</title><style>'
        "body{font:15px system-ui;margin:2em;max-width:100em}table{border-collapse:collapse;font-size:13px}"
        "td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left}img{max-width:100%}"
        f"</style><h1>Sweep</h1>{''.join(parts)}</html>\n"
    )


def _picture(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _curves(rows: Sequence[SweepRow]) -> bytes:
    """Held-out accuracy by step, with one standard error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for each in rows:
        if each.held_out:
            axes.errorbar(
                [point.step for point in each.held_out],
                [point.accuracy for point in each.held_out],
                [point.standard_error for point in each.held_out],
                marker="o",
                capsize=2,
                label=each.name,
            )
    axes.set(xlabel="step", ylabel="held-out accuracy")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()
