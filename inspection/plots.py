"""Plots for pages as numbers: where bars, lines and ticks lie in a drawing of WIDTH x HEIGHT. assets/plot.html draws
them as inline SVG: no script, no font, no picture to load; colours come from the page's CSS."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 380.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 14.0, 12.0, 42.0
_MOST_POINTS = 200
"""Of a line; more are averaged in so many groups."""
_MOST_DOTS = 60
"""A line of more points has no dots to hover over."""
_LARGEST = 1e100
"""Values beyond it are left out: differences of such numbers are not finite."""


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A value of an axis, and where it lies."""

    at: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bin of a histogram, [low, high), its place and what it says."""

    x: float
    y: float
    width: float
    height: float
    low: float
    high: float
    title: str


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A point of a line; `top` and `bottom` are the ends of its interval, if it has one."""

    x: float
    y: float
    title: str
    top: float | None = None
    bottom: float | None = None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One series as drawn: pieces between missing values, as points of SVG."""

    name: str
    style: str
    pieces: list[str]
    dots: list[Dot]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A dashed line at one value."""

    x1: float
    x2: float
    y1: float
    y2: float
    label: str = ""
    anchor: str = "start"


@dataclass(frozen=True, kw_only=True)
class Plot:
    """What assets/plot.html draws."""

    label: str
    """The drawing in words."""
    x_label: str
    y_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    bars: list[Bar] = field(default_factory=list)
    lines: list[Curve] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    column: str | None = None
    """What a bar chooses pairs by, where it does."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A plot with its words."""

    title: str
    plot: Plot
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line's values. `style` is a CSS class; None breaks the line."""

    name: str
    style: str
    points: Sequence[tuple[float, float | None]]
    half_widths: Sequence[float] = ()
    """Of each point's interval."""


class _Axis:
    """Values to the share 0..1 of an axis' length."""

    def __init__(self, low: float, high: float, *, log: bool = False) -> None:
        if not high > low:
            room = 0.1 * abs(low) or 0.5
            low, high = (low / 2, low * 2) if log else (low - room, low + room)
        self.low, self.high, self.log = low, high, log

    def share(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return min(max((value - low) / (high - low), 0.0), 1.0)

    def x(self, value: float) -> float:
        return round(LEFT + self.share(value) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - self.share(value) * (HEIGHT - TOP - BOTTOM), 1)

    def ticks(self) -> list[float]:
        if self.log:
            return list(self._log_ticks())
        values = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        room = 1e-9 * (self.high - self.low)
        return [float(value) for value in values if self.low - room <= value <= self.high + room]

    def _log_ticks(self) -> Iterator[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for decade in decades:
            for step in (1, 2, 5) if len(decades) <= 4 else (1,):
                if self.low <= step * 10.0**decade <= self.high:
                    yield step * 10.0**decade


def histogram(
    values: Float[np.ndarray, " value"],
    edges: Float[np.ndarray, " edge"],
    *,
    x_label: str,
    y_label: str,
    mark: float | None = None,
    mark_label: str = "",
    column: str | None = None,
) -> Plot:
    """Counts per bin. Values outside the edges fall into the outer bins. `mark`: a dashed line at this value."""
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)
    x, y = _Axis(float(edges[0]), float(edges[-1])), _Axis(0.0, 1.08 * float(counts.max()))
    bars = [
        Bar(
            x=x.x(low) + 0.5,
            y=y.y(float(count)),
            width=max(round(x.x(high) - x.x(low) - 1, 1), 0.5),
            height=round(HEIGHT - BOTTOM - y.y(float(count)), 1),
            low=low,
            high=high,
            title=f"{number(low)} to {number(high)}: {count:,} {y_label}",
        )
        for low, high, count in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
    ]
    marks = []
    if mark is not None and edges[0] <= mark <= edges[-1]:
        at = x.x(mark)
        anchor = "start" if at < 0.6 * WIDTH else "end"
        marks.append(Mark(x1=at, x2=at, y1=TOP, y2=HEIGHT - BOTTOM, label=mark_label, anchor=anchor))
    return Plot(
        label=f"{x_label}: histogram",
        x_label=x_label,
        y_label=y_label,
        x_ticks=[Tick(at=x.x(value), label=number(value)) for value in x.ticks()],
        y_ticks=[Tick(at=y.y(value), label=number(value)) for value in y.ticks()],
        bars=bars,
        marks=marks,
        column=column,
    )


def curves(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] | None = None,
    mark: float | None = None,
    log: bool = False,
) -> Plot | None:
    """Lines by x. `mark`: a dashed level, which lies within the axis. `log`: values are above 0, or left out.

    None if there is no value to draw.
    """
    lines = [_thinned(_drawable(each, log=log)) for each in series]
    spans = [
        (x, value - half, value + half)
        for each in lines
        for (x, value), half in zip(each.points, _halves(each), strict=True)
        if value is not None
    ]
    if not spans:
        return None
    level = [] if mark is None else [mark]
    low, high = min([low for _, low, _ in spans] + level), max([high for *_, high in spans] + level)
    room = 0.0 if log else 0.06 * (high - low)
    x = _Axis(*(x_range or (min(at for at, *_ in spans), max(at for at, *_ in spans))))
    y = _Axis(low / 1.1, high * 1.1, log=True) if log else _Axis(low - room, high + room)
    return Plot(
        label=f"{y_label} by {x_label}",
        x_label=x_label,
        y_label=y_label,
        x_ticks=[Tick(at=x.x(value), label=number(value)) for value in x.ticks()],
        y_ticks=[Tick(at=y.y(value), label=number(value)) for value in y.ticks()],
        lines=[_line(each, x, y) for each in lines],
        marks=[Mark(x1=LEFT, x2=WIDTH - RIGHT, y1=y.y(value), y2=y.y(value)) for value in level],
    )


def number(value: float) -> str:
    """For a tick or a title: whole thousands, else three digits, short where the value is small."""
    if 0 < abs(value) < 1e-3:
        return f"{value:.2e}".replace("e-0", "e-")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _halves(series: Series) -> Sequence[float]:
    return series.half_widths or [0.0] * len(series.points)


def _thinned(series: Series) -> Series:
    """At most _MOST_POINTS points, means of as many values in a row; the last x of each. Intervals are not averaged."""
    count = len(series.points)
    if count <= _MOST_POINTS or series.half_widths:
        return series
    points: list[tuple[float, float | None]] = []
    for part in np.array_split(np.arange(count), _MOST_POINTS):
        values = [value for index in part.tolist() if (value := series.points[index][1]) is not None]
        points.append((series.points[int(part[-1])][0], sum(values) / len(values) if values else None))
    return replace(series, points=points)


def _drawable(series: Series, *, log: bool) -> Series:
    """Without values that have no place in the drawing."""
    low = 0.0 if log else -_LARGEST
    points = [(x, value if value is not None and low < value < _LARGEST else None) for x, value in series.points]
    return replace(series, points=points)


def _line(series: Series, x: _Axis, y: _Axis) -> Curve:
    pieces: list[list[str]] = [[]]
    dots = []
    for (at, value), half in zip(series.points, _halves(series), strict=True):
        if value is None:
            pieces.append([])
            continue
        pieces[-1].append(f"{x.x(at)},{y.y(value)}")
        interval = f" ± {half:.2g}" if half else ""
        dots.append(
            Dot(
                x=x.x(at),
                y=y.y(value),
                title=f"{series.name}, {number(at)}: {value:.4g}{interval}",
                top=y.y(value + half) if half else None,
                bottom=y.y(value - half) if half else None,
            )
        )
    return Curve(
        name=series.name,
        style=series.style,
        pieces=[" ".join(piece) for piece in pieces if len(piece) > 1],
        dots=dots if len(dots) <= _MOST_DOTS else [],
    )
