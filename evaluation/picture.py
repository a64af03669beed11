"""A picture of models side by side: the images that changed most for the better or worse, and some at random."""

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from inpo.common.fonts import font_names, unknown_signs_are_boxes
from inpo.common.seeding import stable_hash
from inpo.evaluation.compare import Comparison, in_words

COLUMNS = 4
_CELL_INCHES = 3.6
_GROUPS = (("Most improved", "#1a7f37"), ("Most worsened", "#b42318"), ("Random", "#475467"))
_SMALL_PIXELS = 128


def choose_pairs(
    differences: Float[np.ndarray, " pair"], keys: Sequence[tuple[str, int]], columns: int = COLUMNS
) -> list[list[int]]:
    """Indices of the most improved, the most worsened, and random pairs by their differences; none appears twice.

    Only real improvements are shown as improved, and real losses as worsened; so a group may have fewer, or none. The
    random ones are the first by a hash of prompt and seed, the same in every run.
    """
    order = [int(index) for index in np.argsort(-differences, kind="stable")]
    improved = [index for index in order if differences[index] > 0][:columns]
    worsened = [index for index in reversed(order) if differences[index] < 0][:columns]
    taken = {*improved, *worsened}
    rest = [index for index in range(len(keys)) if index not in taken]
    random = sorted(rest, key=lambda index: stable_hash("picture", *keys[index]))[:columns]
    return [improved, worsened, random]


def draw_picture(comparisons: Sequence[Comparison]) -> bytes:
    """The picture as PNG, by the first scorer: rows of prompts, each with A's image at the left and the others' beside
    it, with prompt and scores. With several others their mean decides what has improved.
    """
    first = comparisons[0]
    scored = [comparison.scored[0] for comparison in comparisons]
    keys = [entry.key for entry, _ in first.pairs]
    groups = choose_pairs(np.mean([each.b - each.a for each in scored], axis=0), keys)
    shown = [(title, colour, chosen) for (title, colour), chosen in zip(_GROUPS, groups, strict=True) if chosen]
    columns = max(len(chosen) for _, _, chosen in shown)
    images = 1 + len(comparisons)
    width = _CELL_INCHES * images / 2
    title = _title(comparisons, width=int(columns * width * 11))
    above = 0.25 * (1 + title.count("\n"))
    figure = Figure(figsize=(columns * width + 0.3, len(shown) * 2.75 + 0.5 + above), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(
        title,
        parse_math=False,
        linespacing=1.6,
        x=0.02,
        y=0.985,
        ha="left",
        va="top",
        fontsize=11,
        fontweight="bold",
        color="#101828",
    )
    top = 1 - (0.25 + above) / figure.get_figheight()
    rows = figure.add_gridspec(len(shown), 1, left=0.02, right=0.98, top=top, bottom=0.02, hspace=0.08)
    for row, (group, colour, chosen) in enumerate(shown):
        cells = rows[row].subgridspec(2, columns, height_ratios=(0.12, 1), hspace=0.0, wspace=0.10)
        heading = figure.add_subplot(cells[0, :])
        heading.axis("off")
        heading.text(
            0, 0.4, group, fontsize=12, fontweight="bold", color=colour, va="center", transform=heading.transAxes
        )
        for column, index in enumerate(chosen):
            cell = cells[1, column].subgridspec(2, images, height_ratios=(1.75, 0.62), hspace=0.0, wspace=0.03)
            entry = first.pairs[index][0]
            _show(figure.add_subplot(cell[0, 0]), first.folder_a.open(entry))
            for place, comparison in enumerate(comparisons, start=1):
                _show(figure.add_subplot(cell[0, place]), comparison.folder_b.open(comparison.pairs[index][1]))
            caption = figure.add_subplot(cell[1, :])
            caption.axis("off")
            a, others = float(scored[0].a[index]), [float(each.b[index]) for each in scored]
            change = float(np.mean(others)) - a
            told = f"({change:+.3g})" if len(others) == 1 else f"(mean {change:+.3g})"
            caption.text(
                0,
                0.96,
                f"{a:.3g} → {', '.join(f'{each:.3g}' for each in others)}  {told}",
                fontsize=9.5,
                fontweight="bold",
                va="top",
                color=_GROUPS[0][1] if change > 0 else _GROUPS[1][1] if change < 0 else _GROUPS[2][1],
                transform=caption.transAxes,
            )
            caption.text(
                0,
                0.64,
                _wrapped(entry.prompt, 24 * images),
                parse_math=False,
                fontsize=8.5,
                fontfamily=font_names(entry.prompt),
                va="top",
                color="#344054",
                transform=caption.transAxes,
                linespacing=1.15,
            )
    buffer = io.BytesIO()
    with unknown_signs_are_boxes():
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _show(axes: Any, image: Image.Image) -> None:
    # Small pictures show their pixels; large ones are reduced smoothly, and only as far as the cell needs.
    small = max(image.size) <= _SMALL_PIXELS
    if not small:
        image = image.copy()
        image.thumbnail((512, 512), Image.Resampling.LANCZOS)
    axes.imshow(np.asarray(image), interpolation="nearest" if small else "antialiased")
    axes.set_anchor("S")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#d0d5dd")
        spine.set_linewidth(0.6)


def _title(comparisons: Sequence[Comparison], *, width: int) -> str:
    """What is where, and who wins; lines of at most so many letters."""
    first = comparisons[0]
    if len(comparisons) == 1:
        sides = f"left: {first.name_a}      right: {first.name_b}"
    else:
        names = [first.name_a, *(each.name_b for each in comparisons)]
        sides = f"from left to right: {', '.join(names)}"
    told = "\n".join(textwrap.fill(in_words(each), width) for each in comparisons)
    return f"{sides}      scores: {first.scored[0].scorer}\n{told}"


def _wrapped(prompt: str, width: int) -> str:
    lines = textwrap.wrap(" ".join(prompt.split()), width=width) or ["(empty prompt)"]
    if len(lines) > 2:
        lines = [lines[0], textwrap.shorten(" ".join(lines[1:]), width, placeholder=" ...")]
    return "\n".join(lines)
