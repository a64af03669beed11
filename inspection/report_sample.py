"""Which pairs a report shows, and their pictures: one small WebP per pair with every cell of its sheet."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from PIL import Image

from inpo.common.cache import Cache
from inpo.common.errors import InpoError
from inpo.common.seeding import stable_hash
from inpo.inspection.pair_table import PairTable
from inpo.inspection.pair_view import PairView, view_pair
from inpo.inspection.preview import Preview
from inpo.inspection.reinvert import choose_pairs
from inpo.inspection.sheet import DELTA_COLOURS, ERROR_COLOURS, coloured

GROUPS = {"inversion": "worst inversion", "error": "largest reference error", "random": "random"}
"""Why a pair was taken, and in which words."""
MOST_TIMESTEPS = 10
MOST_PICTURE_BYTES = 14_000_000
"""Of all pictures together, as they stand in the page: keeps it well below 20 MB."""
_CELL = 64
_DELTA_TOP = 2.0


@dataclass(frozen=True, kw_only=True)
class SampledPair:
    """One card of the gallery, as the page's script reads it."""

    pair_id: str
    prompt: str
    shard: str
    groups: list[str]
    caption_dropped: bool
    label: float
    reference_error: float
    """Mean over all timesteps and sides."""
    inversion_error: float | None
    """The larger of both sides."""
    timesteps: list[int]
    errors: list[tuple[float, float]]
    """(win, lose) for each shown timestep."""
    columns: list[str]
    """Names of the pictures of one timestep."""
    error_top: float | None
    """Upper end of the colour scale of target - delta."""
    shuffled: int
    """Position in a random order."""
    sprite: str
    """data: URI. Two rows, win and lose; first column x0, then `columns` for each timestep."""


def choose(table: PairTable, per_group: int) -> dict[int, list[str]]:
    """{row of the table: groups}: the worst by either error, and as many by the hash of their ids."""
    chosen: dict[int, list[str]] = {}
    inversion = table.worst_inversion_error
    measured = np.flatnonzero(np.isfinite(inversion))
    ranked = {
        "inversion": measured[np.argsort(-inversion[measured], kind="stable")],
        "error": np.argsort(-table.mean_reference_error, kind="stable"),
        "random": choose_pairs(table, per_group),
    }
    for group, rows in ranked.items():
        for row in rows[:per_group].tolist():
            chosen.setdefault(row, []).append(group)
    return chosen


def sample_pairs(
    cache: Cache,
    table: PairTable,
    preview: Preview,
    *,
    per_group: int,
    damaged: dict[str, InpoError],
    on_pair: Callable[[], None] = lambda: None,
) -> list[SampledPair]:
    """Draw the chosen pairs, random ones first, until all are there or their pictures fill the page's share.

    A shard with damaged latents lands in `damaged`; its pairs are left out.
    """
    chosen = choose(table, per_group)
    order = sorted(chosen, key=lambda row: ("random" not in chosen[row], row))
    sampled: list[SampledPair] = []
    num_bytes = 0
    for row in order:
        shard = cache.shards[table.shard_names[table.shard[row]]]
        on_pair()
        if shard.name in damaged:
            continue
        try:
            view = view_pair(cache, shard, int(table.row[row]))
        except InpoError as error:
            damaged[shard.name] = error
            continue
        drawn = _draw(view, preview, shard.name, chosen[row], table, row)
        num_bytes += len(drawn.sprite)
        if num_bytes > MOST_PICTURE_BYTES:
            break
        sampled.append(drawn)
    return sampled


def _draw(view: PairView, preview: Preview, shard: str, groups: list[str], table: PairTable, row: int) -> SampledPair:
    records = _shown_records(len(view.timestep))
    inversion = float(table.worst_inversion_error[row])
    columns, cells = _cells(view, preview, records)
    return SampledPair(
        pair_id=view.pair_id,
        prompt=view.prompt,
        shard=shard,
        groups=groups,
        caption_dropped=view.caption_dropped,
        label=round(view.label, 4),
        reference_error=round(float(table.mean_reference_error[row]), 6),
        inversion_error=round(inversion, 6) if np.isfinite(inversion) else None,
        timesteps=view.timestep[records].tolist(),
        errors=[(round(float(win), 6), round(float(lose), 6)) for win, lose in view.reference_error[:, records].T],
        columns=columns,
        error_top=None if view.error_map is None else float(f"{_error_top(view):.3g}"),
        shuffled=stable_hash("report", view.pair_id) % 2**32,
        sprite=_sprite(cells),
    )


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
    columns = ["x0(t)", "x_t", "|delta|", "target - delta"] if full else ["x_t", "|target|"]
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
    data = io.BytesIO()
    sprite.save(data, "WEBP", lossless=width <= 32, quality=78, method=4)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()
