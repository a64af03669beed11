"""The contact sheet: one cached pair on one page. Drawn with matplotlib, on white, in pixels from the upper left."""

from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from PIL import Image

from inpo.common.fonts import font_names, unknown_signs_are_boxes
from inpo.inspection.pair_view import PairView
from inpo.inspection.preview import Preview

INK, GREY, RULE, PAPER = "#1c1e21", "#6b7177", "#d9dcdf", "#ffffff"
WIN, LOSE = "#1f7a4d", "#b4472e"
DELTA_COLOURS, ERROR_COLOURS = "viridis", "magma"
_MARGIN, _GAP, _BLOCK_GAP, _ROW_LABEL = 40, 8, 36, 44
_CAPTION, _BLOCK_HEAD, _LINE_GAP = 24, 58, 26
_TILE, _MAX_WIDTH = 160, 2000
_DPI = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Column:
    """Pictures of one kind at one timestep: win and lose, with a caption under each."""

    head: str
    tiles: tuple[Image.Image, Image.Image]
    captions: tuple[str, str] = ("", "")


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Upper ends of the two colour scales; both start at 0 and hold for the whole sheet."""

    delta: float
    error: float | None

    @classmethod
    def of(cls, view: PairView) -> "Scales":
        if view.delta_map is None or view.error_map is None:
            return cls(delta=_nice(float(np.quantile(view.target_map, 0.995)), least=2.0), error=None)
        return cls(
            delta=_nice(float(np.quantile(view.delta_map, 0.995)), least=2.0),
            error=_nice(float(np.quantile(view.error_map, 0.995)), least=0.0),
        )


class _Page:
    """A white page to draw on."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        # A power of two, so that pixels over dots per inch times dots per inch are the same number of pixels.
        self._figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor=PAPER)
        self._canvas = FigureCanvasAgg(self._figure)

    def text(
        self, corner: tuple[int | float, int | float], text: str, size: int, colour: str = INK, **how: Any
    ) -> None:
        """`corner`: the text's upper left, unless `how` has matplotlib's ha, va or rotation."""
        x, y = corner
        font = _font(text, size, bold=how.pop("bold", False))
        place = (x / self.width, 1 - y / self.height)
        self._figure.text(*place, text, color=colour, font=font, parse_math=False, **{"va": "top"} | how)

    def image(self, corner: tuple[int, int], pixels: UInt8[np.ndarray, "h w 3"]) -> None:
        """Pixel by pixel, `corner` its upper left."""
        x, y = corner
        self._figure.figimage(pixels, xo=x, yo=self.height - y - pixels.shape[0], origin="upper")

    def line(
        self,
        start: tuple[int | float, int | float],
        end: tuple[int | float, int | float],
        width: int,
        colour: str = RULE,
    ) -> None:
        xs, ys = ([start[axis], end[axis]] for axis in (0, 1))
        shares = [x / self.width for x in xs], [1 - y / self.height for y in ys]
        points = width * 72 / _DPI
        self._figure.add_artist(Line2D(*shares, color=colour, linewidth=points, solid_capstyle="butt"))

    def drawn(self) -> Image.Image:
        with unknown_signs_are_boxes():
            self._canvas.draw()
        return Image.fromarray(np.asarray(self._canvas.buffer_rgba())[..., :3].copy())


def draw_sheet(view: PairView, preview: Preview, *, facts: str) -> Image.Image:
    """The sheet of one pair. `facts` is a line about the cache under the prompt."""
    scales = Scales.of(view)
    clean, blocks = _columns(view, preview, scales)
    tile, tile_height = clean.tiles[0].size
    block_width = len(blocks[0]) * (tile + _GAP) - _GAP
    left = _MARGIN + _ROW_LABEL
    per_line = max(1, min(len(blocks), (_MAX_WIDTH - left - tile - _MARGIN) // (block_width + _BLOCK_GAP)))
    width = max(left + tile + per_line * (_BLOCK_GAP + block_width) + _MARGIN, 900)
    title = _wrap(_title(view), 26, width - 2 * _MARGIN, most=3, bold=True)
    head = _MARGIN + len(title) * 36 + 58
    line_height = _BLOCK_HEAD + 2 * (tile_height + _CAPTION) + 6
    num_lines = -(-len(blocks) // per_line)
    legend = _legend_lines(view, preview)
    height = head + num_lines * line_height + (num_lines - 1) * _LINE_GAP + 110 + 22 * len(legend) + _MARGIN
    page = _Page(width, height)
    for index, text in enumerate(title):
        page.text((_MARGIN, _MARGIN - 6 + 36 * index), text, 26, bold=True)
    page.text((_MARGIN, _MARGIN + 36 * len(title) + 4), _cut(facts, 15, width - 2 * _MARGIN), 15, GREY)
    y = head
    for line in range(num_lines):
        _draw_line(page, clean, blocks[line * per_line : (line + 1) * per_line], view, line * per_line, (left, y))
        y += line_height + _LINE_GAP
    _draw_legend(page, (_MARGIN, y), scales, legend, _error_name(view))
    return page.drawn()


def _title(view: PairView) -> str:
    return view.prompt if view.prompt.strip() else "(empty prompt)"


def _columns(view: PairView, preview: Preview, scales: Scales) -> tuple[Column, list[list[Column]]]:
    """The column of x0 and, per timestep, the columns that the cache allows."""
    latents = [view.x0[:, None], *([] if view.x0_t is None else [view.x0_t]), view.x_t]
    places = np.cumsum([0, *(part.shape[1] for part in latents)])
    shape = view.x0.shape[1:]
    pictures = preview(np.concatenate(latents, axis=1).reshape(-1, *shape))
    tile = tile_size(*pictures.shape[1:3])
    shown = [fit(Image.fromarray(picture), tile) for picture in pictures]

    def both(place: int) -> tuple[Image.Image, Image.Image]:
        return shown[place], shown[place + int(places[-1])]

    measured = [f"round trip {value:.3g}" if np.isfinite(value) else "" for value in view.inversion_error]
    clean = Column(head="x₀", tiles=both(0), captions=(measured[0], measured[1]))
    blocks: list[list[Column]] = []
    for record in range(len(view.timestep)):
        block: list[Column] = []
        if view.x0_t is not None:
            block.append(Column(head="x₀(t)", tiles=both(1 + record)))
        block.append(Column(head="xₜ", tiles=both(int(places[-2]) + record)))
        errors = tuple(f"E_ref {value:.4f}" for value in view.reference_error[:, record])
        if view.delta_map is None or view.error_map is None or scales.error is None:
            block.append(_map_column("|τ|", view.target_map[:, record], scales.delta, DELTA_COLOURS, tile, errors))
        else:
            delta, error = view.delta_map[:, record], view.error_map[:, record]
            rms = tuple(f"rms {value:.3f}" for value in np.sqrt((delta**2).mean((1, 2))))
            block.append(_map_column("|δ|", delta, scales.delta, DELTA_COLOURS, tile, rms))
            block.append(_map_column(_error_name(view), error, scales.error, ERROR_COLOURS, tile, errors))
        blocks.append(block)
    return clean, blocks


def _error_name(view: PairView) -> str:
    return "|τ − δ|" if view.space == "noise" else "|τ − v|"


def _map_column(
    head: str,
    maps: Float[np.ndarray, "side h w"],
    top: float,
    colours: str,
    tile: tuple[int, int],
    captions: tuple[str, ...],
) -> Column:
    tiles = [fit(Image.fromarray(coloured(each, top, colours)), tile) for each in maps]
    return Column(head=head, tiles=(tiles[0], tiles[1]), captions=(captions[0], captions[1]))


def coloured(values: Float[np.ndarray, "h w"], top: float, colours: str) -> UInt8[np.ndarray, "h w 3"]:
    """Values 0..top through a perceptually uniform colour map; errors on a square-root scale.

    The error at a late timestep is a tenth of an early one's, and one scale must show both.
    """
    share = np.clip(values / top, 0, 1)
    rgba = matplotlib.colormaps[colours](np.sqrt(share) if colours == ERROR_COLOURS else share, bytes=True)
    return rgba[..., :3]


def tile_size(height: int, width: int) -> tuple[int, int]:
    """(width, height) of a tile for such pictures, of their shape: whole multiples while narrow, else a fixed width."""
    tile = width * max(1, _TILE // width) if width <= _TILE else 192
    return tile, max(1, round(tile * height / width))


def fit(picture: Image.Image, tile: tuple[int, int]) -> Image.Image:
    """Enlarged pixel by pixel, shrunk smoothly."""
    if picture.size == tile:
        return picture
    smooth = Image.Resampling.LANCZOS if picture.width > tile[0] else Image.Resampling.NEAREST
    return picture.resize(tile, smooth)


def _draw_line(
    page: _Page, clean: Column, blocks: list[list[Column]], view: PairView, first: int, corner: tuple[int, int]
) -> None:
    """One line of blocks: x0 at the left for comparison, then timesteps in ascending order."""
    left, top = corner
    tile, tile_height = clean.tiles[0].size
    rows = [top + _BLOCK_HEAD, top + _BLOCK_HEAD + tile_height + _CAPTION + 6]
    for name, colour, y in (("win", WIN, rows[0]), ("lose", LOSE, rows[1])):
        page.line((left - 10, y), (left - 10, y + tile_height), 4, colour)
        middle = (left - 27, y + tile_height / 2)
        page.text(middle, name, 16, colour, bold=True, rotation=90, ha="center", va="center")
    _draw_column(page, clean, left, rows, head_y=top + 34)
    for index, block in enumerate(blocks):
        record = first + index
        x = left + tile + _BLOCK_GAP + index * (len(block) * (tile + _GAP) - _GAP + _BLOCK_GAP)
        end = x + len(block) * (tile + _GAP) - _GAP
        page.text((x, top), f"t = {view.timestep[record]}", 18, bold=True)
        page.text((end, top + 3), f"{view.a[record]:.3f} x₀ + {view.s[record]:.3f} τ", 14, GREY, ha="right")
        page.line((x, top + 27), (end, top + 27), 1)
        for position, column in enumerate(block):
            _draw_column(page, column, x + position * (tile + _GAP), rows, head_y=top + 34)


def _draw_column(page: _Page, column: Column, x: int, rows: list[int], *, head_y: int) -> None:
    page.text((x, head_y), column.head, 15)
    for tile, caption, y in zip(column.tiles, column.captions, rows, strict=True):
        page.image((x, y), np.asarray(tile))
        page.text((x, y + tile.height + 4), caption, 14, GREY)


def _legend_lines(view: PairView, preview: Preview) -> list[tuple[str, str]]:
    lines = [("x₀", f"clean latent; {preview.note}")]
    if view.x0_t is not None:
        lines.append(("x₀(t)", "the clean latent that the inverting model sees in xₜ"))
    mixture = "a x₀ + s τ" if view.space == "noise" else "x₀ + s τ"
    lines.append(("xₜ", f"the inverted latent that is trained on, {mixture}"))
    if view.delta is None:
        size = "; a unit Gaussian gives about 1" if view.space == "noise" else ": noise − x₀"
        lines.append(("|τ|", f"target, RMS over channels{size}"))
        lines.append(("no δ", "this cache stores no δ and no x₀(t); precompute with --profile full to see them"))
    else:
        lines += [
            ("|δ|", "the inverting model's noise at xₜ, RMS over channels; a unit Gaussian gives about 1"),
            (
                _error_name(view),
                f"target minus prediction{'' if view.space == 'noise' else ' v = δ − x₀(t)'}, RMS over channels; where "
                "the reference inverts under the caption, the mean of its square is E_ref; square-root scale",
            ),
        ]
    if np.isfinite(view.inversion_error).any():
        lines.append(("round trip", "relative RMS between x₀ and where DDIM lands from the last xₜ"))
    return lines


def _draw_legend(
    page: _Page, corner: tuple[int, int], scales: Scales, lines: list[tuple[str, str]], error_name: str
) -> None:
    x, y = corner
    page.line((x, y), (page.width - _MARGIN, y), 1)
    y += 20
    at = x
    bars = [("|δ|" if scales.error is not None else "|τ|", scales.delta, DELTA_COLOURS)]
    if scales.error is not None:
        bars.append((error_name, scales.error, ERROR_COLOURS))
    aligned: tuple[tuple[float, Literal["left", "center", "right"]], ...]
    aligned = ((0.0, "left"), (0.5, "center"), (1.0, "right"))
    for name, top, colours in bars:
        along = np.linspace(0, 1, 220)
        ramp = coloured(np.tile(top * (along**2 if colours == ERROR_COLOURS else along), (14, 1)), top, colours)
        label_width = round(_width(name, 15)) + 14
        page.text((at, y + 7), name, 15, va="center")
        page.image((at + label_width, y), ramp)
        for share, align in aligned:
            value = top * (share**2 if colours == ERROR_COLOURS else share)
            page.text((at + label_width + share * 219, y + 19), f"{value:g}", 13, GREY, ha=align)
        at += label_width + 220 + 48
    y += 54
    indent = round(max(_width(name, 14, bold=True) for name, _ in lines)) + 18
    for name, text in lines:
        page.text((x, y), name, 14, bold=True)
        page.text((x + indent, y), _cut(text, 14, page.width - 2 * _MARGIN - indent), 14, GREY)
        y += 22


def _nice(value: float, *, least: float) -> float:
    """The next 1, 2, 4 or 8 times a power of ten, at least `least`: a quarter of it is short to write too."""
    value = max(value, least, 1e-6)
    power = 10.0 ** np.floor(np.log10(value) + 1e-9)
    return float(next(step * power for step in (1, 2, 4, 8, 10) if step * power >= value * (1 - 1e-9)))


def _font(text: str, size: int, *, bold: bool = False) -> FontProperties:
    """A font of `size` pixels that has the signs of `text`, where the machine has one."""
    return FontProperties(family=font_names(text), weight="bold" if bold else "normal", size=size * 72 / _DPI)


def _width(text: str, size: int, *, bold: bool = False) -> float:
    """In pixels."""
    renderer = FigureCanvasAgg(Figure(dpi=_DPI)).get_renderer()
    with unknown_signs_are_boxes():
        width, _, _ = renderer.get_text_width_height_descent(text, _font(text, size, bold=bold), False)
    return float(width)


def _wrap(text: str, size: int, width: int, *, most: int, bold: bool = False) -> list[str]:
    """Lines of at most `width` pixels; what does not fit into `most` lines is cut with an ellipsis."""
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < most:
        line = words.pop(0)
        while words and _width(f"{line} {words[0]}", size, bold=bold) <= width:
            line = f"{line} {words.pop(0)}"
        lines.append(_cut(line, size, width, bold=bold))
    if words:
        lines[-1] = _cut(f"{lines[-1]} {' '.join(words)}", size, width, bold=bold)
    return lines


def _cut(text: str, size: int, width: int, *, bold: bool = False) -> str:
    if _width(text, size, bold=bold) <= width:
        return text
    # Halving: a prompt may have thousands of signs.
    fits, beyond = 0, len(text)
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        short = _width(text[:middle].rstrip() + "…", size, bold=bold) <= width
        fits, beyond = (middle, beyond) if short else (fits, middle)
    return text[:fits].rstrip() + "…"
