"""The pairs of a report's gallery, and the pictures of some: one small WebP with every cell of a pair's sheet."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from inpo.common.cache import Cache
from inpo.common.errors import InpoError
from inpo.common.pages import data_uri
from inpo.common.seeding import stable_hash
from inpo.inspection.pair_table import PairTable, is_listable
from inpo.inspection.pair_view import PairView, view_pair
from inpo.inspection.preview import Preview
from inpo.inspection.reinvert import choose_pairs
from inpo.inspection.sheet import DELTA_COLOURS, ERROR_COLOURS, coloured

GROUPS = {
    "inversion": "worst inversion",
    "error": "largest reference error",
    "gap": "widest win/lose gap",
    "random": "random",
}
"""Why a pair was taken, and in which words."""
MOST_TIMESTEPS = 10
MOST_PAIRS = 20_000
"""That the gallery lists, beside those with pictures."""
MOST_PICTURE_BYTES = 14_000_000
"""Of all pictures together, as they stand in the page: keeps it well below 20 MB."""
_CELL = 64
_DELTA_TOP = 2.0


@dataclass(frozen=True, kw_only=True)
class PageSheet:
    """The pictures of a pair."""

    timesteps: list[int]
    """Those that are shown."""
    errors: list[tuple[float | None, float | None]]
    """(win, lose) for each of them."""
    columns: list[str]
    """Names of the pictures of one timestep."""
    error_top: float | None
    """Upper end of the colour scale of target - prediction."""
    sprite: str
    """data: URI. Two rows, win and lose; first column x0, then `columns` for each timestep."""
    full: tuple[str, ...]
    """data: URIs of x0 in full size, win and lose, where the sprite's are smaller and the page has room for them."""


@dataclass(frozen=True, kw_only=True)
class PagePair:
    """One card of the gallery, as the page's script reads it. Numbers that are not measured or not finite are None."""

    pair_id: str
    prompt: str
    shard: str
    groups: list[str]
    """Why it has pictures."""
    caption_dropped: bool
    label: float | None
    reference_error: float | None
    """Mean over all timesteps and sides."""
    gap: float | None
    """The win's reference error minus the lose's, means over all timesteps."""
    inversion_errors: tuple[float | None, float | None]
    """Win, lose."""
    timesteps: list[int]
    shuffled: int
    """Position in a random order."""
    listable: bool
    """Whether a list of ids can hold the id: `inpo train --except`."""
    sheet: PageSheet | None


def choose(table: PairTable, per_group: int) -> dict[int, list[str]]:
    """{row of the table: groups}: the worst by either error or by the gap, and as many by the hash of their ids."""
    inversion = table.worst_inversion_error
    measured = np.flatnonzero(np.isfinite(inversion))
    ranked = {
        "inversion": measured[np.argsort(-inversion[measured], kind="stable")],
        "error": np.argsort(-table.mean_reference_error, kind="stable"),
        "gap": np.argsort(-against_label(table), kind="stable"),
        "random": choose_pairs(table, per_group),
    }
    chosen: dict[int, list[str]] = {}
    for group, rows in ranked.items():
        for row in rows[:per_group].tolist():
            chosen.setdefault(row, []).append(group)
    return chosen


def against_label(table: PairTable) -> Float[np.ndarray, " pair"]:
    """The gap from the preferred side's view: of a label below 0.5 the lose is preferred."""
    return np.where(table.label < 0.5, -table.gap, table.gap)


def page_pairs(
    cache: Cache,
    table: PairTable,
    preview: Preview,
    *,
    per_group: int,
    unreadable: dict[str, InpoError],
    on_pair: Callable[[], None] = lambda: None,
) -> list[PagePair]:
    """The gallery's pairs, in the table's order: all, or the chosen ones and random others up to MOST_PAIRS.

    The chosen ones have pictures, drawn random ones first until these fill the page's share; then x0 in full size. A
    shard with unreadable latents lands in `unreadable`, and its pairs have none.
    """
    chosen = choose(table, per_group)
    sheets: dict[int, PageSheet] = {}
    large: dict[int, tuple[str, ...]] = {}
    num_bytes = 0
    for row in sorted(chosen, key=lambda row: ("random" not in chosen[row], row)):
        shard = cache.shards[table.shard_names[table.shard[row]]]
        on_pair()
        if shard.name in unreadable:
            continue
        try:
            view = view_pair(cache, shard, int(table.row[row]))
        except InpoError as error:
            unreadable[shard.name] = error
            continue
        sheet, full = _draw(view, preview)
        num_bytes += len(sheet.sprite)
        if num_bytes > MOST_PICTURE_BYTES:
            break
        sheets[row], large[row] = sheet, full
    for row, full in large.items():
        num_bytes += sum(map(len, full))
        if num_bytes > MOST_PICTURE_BYTES:
            break
        sheets[row] = replace(sheets[row], full=full)
    listed = sorted({*sheets, *choose_pairs(table, MOST_PAIRS).tolist()})
    gap, mean = table.gap, table.mean_reference_error
    return [_page_pair(table, row, chosen.get(row, []), sheets.get(row), gap[row], mean[row]) for row in listed]


def _page_pair(
    table: PairTable, row: int, groups: list[str], sheet: PageSheet | None, gap: float, error: float
) -> PagePair:
    pair_id = str(table.pair_id[row])
    win, lose = table.inversion_error[row].tolist()
    return PagePair(
        pair_id=pair_id,
        prompt=str(table.prompt[row]),
        shard=table.shard_names[table.shard[row]],
        groups=groups if sheet is not None else [],
        caption_dropped=bool(table.caption_dropped[row]),
        label=_finite(table.label[row]),
        reference_error=_finite(error),
        gap=_finite(gap),
        inversion_errors=(_finite(win), _finite(lose)),
        timesteps=table.timestep[row].tolist(),
        shuffled=stable_hash("report", pair_id) % 2**32,
        listable=is_listable(pair_id),
        sheet=sheet,
    )


def _finite(value: float | np.floating) -> float | None:
    """With as many digits as a float32 has; JSON has no NaN."""
    return float(f"{value:.9g}") if np.isfinite(value) else None


def _draw(view: PairView, preview: Preview) -> tuple[PageSheet, tuple[str, ...]]:
    """(the sheet, x0 in full size if the sheet's is smaller)."""
    records = _shown_records(len(view.timestep))
    columns, cells = _cells(view, preview, records)
    sheet = PageSheet(
        timesteps=view.timestep[records].tolist(),
        errors=[(_finite(win), _finite(lose)) for win, lose in view.reference_error[:, records].T],
        columns=columns,
        error_top=None if view.error_map is None else _finite(_error_top(view)),
        sprite=_sprite(cells),
        full=(),
    )
    clean = [Image.fromarray(picture) for picture in cells[0]]
    return sheet, tuple(data_uri(picture) for picture in clean if picture.width > _CELL)


def _shown_records(count: int) -> Int[np.ndarray, " shown"]:
    """All of them, or so many evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, MOST_TIMESTEPS)).round().astype(int))


def _cells(
    view: PairView, preview: Preview, records: Int[np.ndarray, " shown"]
) -> tuple[list[str], list[tuple[np.ndarray, np.ndarray]]]:
    """(names of the columns of one timestep, (win, lose) pictures from left to right)."""

    def both(latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pictures = preview(latents)
        return pictures[0], pictures[1]

    def maps(values: np.ndarray, top: float, colours: str) -> tuple[np.ndarray, np.ndarray]:
        return coloured(values[0], top, colours), coloured(values[1], top, colours)

    full = view.delta_map is not None and view.error_map is not None and view.x0_t is not None
    is_noise = view.space == "noise"
    error, size = ("target - delta", "|target|") if is_noise else ("target - (delta - x0(t))", "|noise - x0|")
    columns = ["x0(t)", "x_t", "|delta|", error] if full else ["x_t", size]
    cells = [both(view.x0)]
    for record in records.tolist():
        if view.delta_map is not None and view.error_map is not None and view.x0_t is not None:
            cells.append(both(view.x0_t[:, record]))
            cells.append(both(view.x_t[:, record]))
            cells.append(maps(view.delta_map[:, record], _DELTA_TOP, DELTA_COLOURS))
            cells.append(maps(view.error_map[:, record], _error_top(view), ERROR_COLOURS))
        else:
            cells.append(both(view.x_t[:, record]))
            cells.append(maps(view.target_map[:, record], _DELTA_TOP, DELTA_COLOURS))
    return columns, cells


def _error_top(view: PairView) -> float:
    """One scale for all timesteps of a pair."""
    return 1.0 if view.error_map is None else max(float(np.quantile(view.error_map, 0.995)), 1e-6)


def _sprite(cells: list[tuple[np.ndarray, np.ndarray]]) -> str:
    """Every cell (RGB, 8 bits, any size) at x0's size, side by side.

    Small latents keep their pixels, large pictures shrink.
    """
    height, width = cells[0][0].shape[:2]
    width, height = (width, height) if width <= _CELL else (_CELL, max(1, round(_CELL * height / width)))
    sprite = Image.new("RGB", (width * len(cells), 2 * height))
    for column, sides in enumerate(cells):
        for side, picture in enumerate(sides):
            image = Image.fromarray(picture)
            if image.size != (width, height):
                smooth = Image.Resampling.LANCZOS if image.width > width else Image.Resampling.NEAREST
                image = image.resize((width, height), smooth)
            sprite.paste(image, (column * width, side * height))
    return data_uri(sprite, lossless=width <= 32)
