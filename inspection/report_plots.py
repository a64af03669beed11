"""The report's plots as inline SVG: no script, no font, no picture to load; colours come from the page's CSS."""

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from jaxtyping import Float
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 20, 14, 44


class _Axes:
    """Data coordinates to the drawing's, with ticks at round numbers."""

    def __init__(self, x: tuple[float, float], y_top: float) -> None:
        self.x, self.y_top = x, y_top or 1.0

    def px(self, value: float) -> float:
        low, high = self.x
        return _LEFT + (value - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def py(self, value: float) -> float:
        return HEIGHT - _BOTTOM - min(value / self.y_top, 1.0) * (HEIGHT - _TOP - _BOTTOM)

    def frame(self, x_label: str, y_label: str) -> str:
        parts = []
        for value in _ticks(0.0, self.y_top):
            y = self.py(value)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
        for value in _ticks(*self.x):
            x, y = self.px(value), HEIGHT - _BOTTOM + 16
            parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{_number(value)}</text>')
        middle = (_LEFT + WIDTH - _RIGHT) / 2
        parts.append(f'<text class="name" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
        parts.append(
            f'<text class="name" transform="translate(12 {(_TOP + HEIGHT - _BOTTOM) / 2}) rotate(-90)" '
            f'text-anchor="middle">{escape(y_label)}</text>'
        )
        base = HEIGHT - _BOTTOM
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
        return "".join(parts)


def histogram(
    values: Float[np.ndarray, " value"],
    edges: Float[np.ndarray, " edge"],
    *,
    x_label: str,
    y_label: str,
    mark: float | None = None,
    mark_label: str = "",
) -> str:
    """Counts per bin. Values outside the edges fall into the outer bins. `mark`: a dashed line at this value."""
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)
    axes = _Axes((float(edges[0]), float(edges[-1])), _round_up(float(counts.max())))
    bars = []
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        x, y = axes.px(low), axes.py(float(count))
        bars.append(
            f'<rect class="bar" x="{x + 0.5:.1f}" y="{y:.1f}" width="{max(axes.px(high) - x - 1, 0.5):.1f}" '
            f'height="{HEIGHT - _BOTTOM - y:.1f}"><title>{_number(low)} to {_number(high)}: {count:,}</title></rect>'
        )
    marked = ""
    if mark is not None and edges[0] <= mark <= edges[-1]:
        x = axes.px(mark)
        side, anchor = (5, "start") if x < 0.6 * WIDTH else (-5, "end")
        marked = (
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>'
            f'<text class="mark-name" x="{x + side:.1f}" y="{_TOP + 10}" '
            f'text-anchor="{anchor}">{escape(mark_label)}</text>'
        )
    return _svg(axes.frame(x_label, y_label) + "".join(bars) + marked, f"{x_label}: histogram")


def curves(
    x: Sequence[float],
    series: Mapping[str, Sequence[float | None]],
    *,
    x_range: tuple[float, float],
    x_label: str,
    y_label: str,
    mark: float | None = None,
) -> str:
    """Lines with points, one per series; None breaks a line. Series names are CSS classes: win, lose, both."""
    present = [value for values in series.values() for value in values if value is not None]
    top = max([*present, *([] if mark is None else [mark])], default=1.0)
    axes = _Axes(x_range, _round_up(top))
    parts = []
    if mark is not None:
        y = axes.py(mark)
        parts.append(f'<line class="mark" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for name, values in series.items():
        run: list[str] = []
        for at, value in zip(x, values, strict=True):
            if value is None:
                parts.append(_polyline(name, run))
                run = []
                continue
            px, py = axes.px(at), axes.py(value)
            run.append(f"{px:.1f},{py:.1f}")
            parts.append(
                f'<circle class="{name}" cx="{px:.1f}" cy="{py:.1f}" r="3.2"><title>{name}, t ≈ {at:.0f}: {value:.4g}'
                "</title></circle>"
            )
        parts.append(_polyline(name, run))
    key = "".join(
        f'<g transform="translate({WIDTH - _RIGHT - 58 * (len(series) - index)} {_TOP + 2})">'
        f'<circle class="{name}" r="4"/><text x="9" y="4">{name}</text></g>'
        for index, name in enumerate(series)
        if len(series) > 1
    )
    return _svg(axes.frame(x_label, y_label) + "".join(parts) + key, f"{y_label} by {x_label}")


def _polyline(name: str, points: list[str]) -> str:
    return f'<polyline class="{name}" points="{" ".join(points)}"/>' if len(points) > 1 else ""


def _svg(content: str, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{content}</svg>'


def _ticks(low: float, high: float) -> list[float]:
    ticks = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(tick) for tick in ticks if low <= tick <= high * (1 + 1e-9)]


def _round_up(value: float) -> float:
    """A little room above the highest value."""
    return value * 1.08 if value > 0 else 1.0


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
