"""The tables and plots of docs/inversion.md, from the rows that benchmarks.inversion measures."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib


@dataclass(frozen=True, kw_only=True)
class Row:
    """One inverter at one n, means over all images."""

    name: str
    steps: int
    network_calls: float
    """Per image; the measured round trip not counted."""
    calls_with_records: float
    inversion_error: float
    """NaN for a rival."""
    tau_error: float
    """RMS of (target - exact target) over all records; NaN for noise, which approximates no ODE."""
    noise_correlation: float
    noise_distance: float
    """RMS."""
    reference_error: tuple[float, ...]
    """Mean in the bins of timesteps; NaN where no record falls, and for a rival."""
    tau_error_by_bin: tuple[float, ...]


def by_calls(groups: Mapping[int, Sequence[Row]]) -> str:
    """Markdown, ordered by network calls; of each number of them the best is bold."""
    lines = _head("calls", "inverter", "n", "with records", "tau error", "correlation", "distance", "round trip")
    for calls, rows in groups.items():
        best = (min(row.tau_error for row in rows), max(row.noise_correlation for row in rows))
        least = min(row.noise_distance for row in rows)
        for row in rows:
            lines.append(
                _line(
                    str(calls),
                    row.name,
                    str(row.steps),
                    f"{row.calls_with_records:.0f}",
                    _shown(row.tau_error, 3, bold=row.tau_error == best[0]),
                    _shown(row.noise_correlation, 3, bold=row.noise_correlation == best[1]),
                    _shown(row.noise_distance, 3, bold=row.noise_distance == least),
                    _shown(row.inversion_error, 3),
                )
            )
    return "\n".join(lines)


def by_timestep(rows: Sequence[Row], bins: Sequence[int]) -> str:
    """Markdown."""
    spans = [f"E_ref {low}-{high}" for low, high in itertools.pairwise(bins)]
    lines = _head("inverter", "n", "calls", "tau error", "round trip", *spans)
    for row in rows:
        lines.append(
            _line(
                row.name,
                str(row.steps),
                f"{row.network_calls:.1f}",
                _shown(row.tau_error, 3),
                _shown(row.inversion_error, 3),
                *[_shown(value, 4) for value in row.reference_error],
            )
        )
    return "\n".join(lines)


def write_between(document: Path, name: str, text: str) -> None:
    """Put `text` between `<!-- tables of NAME` and `<!-- end of NAME -->`, each on a line of its own."""
    old = document.read_text()
    head, begin, rest = old.partition(f"<!-- tables of {name}:")
    mark, _, rest = rest.partition("\n")
    _, end, tail = rest.partition(f"<!-- end of {name} -->")
    if not (begin and end):
        raise SystemExit(
            f"{document} has no marks of {name}: `<!-- tables of {name}: ... -->`, `<!-- end of {name} -->`"
        )
    document.write_text(f"{head}{begin}{mark}\n{text}\n{end}{tail}")


def plot(groups: Mapping[int, Sequence[Row]], ours: Sequence[Row], bins: Sequence[int], path: Path) -> None:
    """Left: target's error against calls. Middle: distance from known noise against calls. Right: E_ref by timestep."""
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for name in dict.fromkeys(row.name for rows in groups.values() for row in rows):
        mine = [row for rows in groups.values() for row in rows if row.name == name]
        calls, line = [row.network_calls for row in mine], "o-" if math.isfinite(mine[0].inversion_error) else "x--"
        left.loglog(calls, [row.tau_error for row in mine], line, label=name)
        middle.loglog(calls, [row.noise_distance for row in mine], line, label=name)
    middles = [(low + high) / 2 for low, high in itertools.pairwise(bins)]
    for row in ours:
        right.semilogy(middles, row.reference_error, "o-", label=row.name)
    left.set(xlabel="network calls per image", ylabel="RMS error of the target", title="against the exact ODE")
    middle.set(xlabel="network calls per image", ylabel="RMS distance", title="from known noise")
    right.set(xlabel="timestep", ylabel="E_ref", title=f"reference error, n = {ours[0].steps}")
    for axes in (left, right):
        axes.legend(fontsize=7)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    for axis in (left.xaxis, left.yaxis, middle.xaxis, middle.yaxis, right.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _head(*names: str) -> list[str]:
    return [_line(*names), "|" + "|".join("---" if name == "inverter" else "---:" for name in names) + "|"]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _shown(value: float, digits: int, *, bold: bool = False) -> str:
    text = "-" if math.isnan(value) else f"{value:.{digits}f}"
    return f"**{text}**" if bold else text
