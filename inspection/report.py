"""`inpo inspect report`: one self-contained HTML page. It asks the network for nothing and works from file://.

Figures and plots cover every committed pair; the gallery and the norms of delta a sample, as the page says.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from jaxtyping import Float

from inpo.common.cache import Cache, open_cache
from inpo.common.cache.labels import label_sets, read_shard_labels
from inpo.common.errors import InpoError
from inpo.common.models import Model
from inpo.common.space import human_bytes
from inpo.inspection.leftovers import find_leftovers
from inpo.inspection.pair_table import PairTable, read_pair_table
from inpo.inspection.preview import linear_preview, vae_preview
from inpo.inspection.reinvert import choose_pairs
from inpo.inspection.report_plots import curves, histogram
from inpo.inspection.report_sample import GROUPS, MOST_TIMESTEPS, SampledPair, sample_pairs
from inpo.inspection.summary import Summary, summary_of, timestep_ranges
from inpo.inspection.summary_view import number
from inpo.inspection.words import cache_facts

ASSETS = Path(__file__).parent / "assets"
_NORM_PAIRS = 200
_MOST_FREQUENT = 12


@dataclass(frozen=True, kw_only=True)
class Report:
    """The page and what stands in it."""

    html: str
    num_pairs: int
    num_shown: int
    damaged: dict[str, InpoError]
    """Shards that could not be read, whole or in their latents."""


def make_report(
    location: str, *, model: Model | None = None, per_group: int = 40, on_pair: Callable[[], None] = lambda: None
) -> Report:
    """The report of a cache in whatever state it is.

    `per_group` pairs each by worst inversion, by largest reference error and at random stand in the gallery, fewer
    if their pictures would fill the page. With `model` they are decoded by its VAE.

    Raises CacheMissing if there is no cache, CacheSchemaError if its manifest cannot be read.
    """
    bad: dict[str, Any] = {}
    cache = open_cache(location, allow_empty=True, damaged=bad)
    damaged: dict[str, InpoError] = dict(bad)
    table = read_pair_table(cache, damaged)
    summary = summary_of(cache, table, find_leftovers(cache.store))
    preview = linear_preview(cache) if model is None else vae_preview(cache, model)
    sampled = sample_pairs(cache, table, preview, per_group=per_group, damaged=damaged, on_pair=on_pair)
    plots = _plots(cache, table, summary, damaged) if len(table) else ""
    _, height, width = cache.manifest.latent_shape
    data = {"pairs": [asdict(pair) for pair in sampled], "note": preview.note, "ratio": width / height}
    page = Template((ASSETS / "report.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"InPO cache: {Path(cache.location).name}"),
        css=(ASSETS / "report.css").read_text(encoding="utf-8"),
        js=(ASSETS / "report.js").read_text(encoding="utf-8"),
        location=escape(cache.location),
        facts=escape(cache_facts(cache.manifest)),
        damaged=_damaged(damaged),
        tiles="".join(_tile(*tile) for tile in _tiles(summary)),
        settings=_settings(summary),
        plots=plots,
        sampling=escape(_sampling(len(table), summary, sampled)),
        groups=_group_options(sampled),
        footer=escape(_footer(summary)),
        data=_script_json(data),
    )
    return Report(html=page, num_pairs=cache.num_pairs, num_shown=len(sampled), damaged=damaged)


def _script_json(data: dict[str, Any]) -> str:
    """JSON that no prompt can end: inside <script> only "<" is special."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _tiles(summary: Summary) -> list[tuple[str, str, str]]:
    error = summary.inversion_error
    skipped = sum(summary.skipped.values())
    tiles = [
        ("pairs", f"{summary.num_pairs:,}", f"{summary.num_records:,} records"),
        ("images", f"{summary.num_images:,}", f"{summary.num_groups:,} groups"),
        ("shards", f"{summary.num_shards:,}", f"{summary.num_empty_shards:,} without a pair"),
        ("bytes", human_bytes(summary.total_bytes), f"profile {summary.identity['profile']}"),
        ("prompts", f"{summary.num_prompts:,}", f"captions dropped: {summary.num_captions_dropped:,}"),
        ("text shards", f"{summary.num_texts:,}", human_bytes(summary.text_bytes)),
        ("skipped pairs", f"{skipped:,}", ", ".join(list(summary.skipped)[:2]) or "none"),
        (
            "inversion error",
            number(error.median),
            f"median of {error.num_measured:,} images" if error.num_measured else "not measured",
        ),
        ("NaN or infinity", f"{sum(summary.num_nan.values()):,}", "in the small arrays"),
    ]
    if summary.num_pending:
        tiles.append(("being written", f"{summary.num_pending:,}", human_bytes(summary.pending_bytes)))
    if summary.num_orphaned:
        tiles.append(("orphaned", f"{summary.num_orphaned:,}", human_bytes(summary.orphaned_bytes)))
    return tiles


def _tile(name: str, value: str, detail: str) -> str:
    return f"<div><dt>{escape(name)}</dt><dd>{escape(value)} <small>{escape(detail)}</small></dd></div>"


def _settings(summary: Summary) -> str:
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(_short(value))}</dd></div>"
        for name, value in summary.identity.items()
        if value is not None
    )


def _short(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value)[:24]


def _damaged(damaged: dict[str, InpoError]) -> str:
    if not damaged:
        return ""
    named = "".join(f"<pre>{escape(name)}\n{escape(str(error))}</pre>" for name, error in sorted(damaged.items()))
    return (
        f'<section class="damaged" role="alert"><h2>{len(damaged)} damaged shard{"s" if len(damaged) > 1 else ""}, '
        f"left out where unreadable</h2>{named}</section>\n"
    )


def _plots(cache: Cache, table: PairTable, summary: Summary, damaged: dict[str, InpoError]) -> str:
    norms = _noise_norms(cache, table, damaged)
    total = cache.manifest.num_train_timesteps
    bins = summary.timesteps
    middles = [(each.low + each.high) / 2 for each in bins]
    figures = [
        _figure(
            "Reference error by timestep",
            curves(
                middles,
                {
                    "win": [each.reference_error_win for each in bins],
                    "lose": [each.reference_error_lose for each in bins],
                },
                x_range=(0.0, float(total)),
                x_label="timestep",
                y_label="mean E_ref",
            ),
            "How far the frozen model is from each side's target; training starts from the gap between them.",
        ),
        _figure(
            "Timesteps",
            histogram(
                table.timestep.ravel().astype(np.float64),
                np.linspace(0, total, min(total, 40) + 1),
                x_label="timestep",
                y_label="records",
            ),
            "Every timestep of the range should be covered about equally.",
        ),
        *_inversion_figures(table, total),
    ]
    if len(norms):
        name = "delta" if cache.manifest.profile == "full" else "target"
        figures.append(
            _figure(
                f"Size of {name}",
                histogram(
                    norms,
                    _edges(norms, 1.0),
                    x_label=f"RMS of {name}",
                    y_label="latents",
                    mark=1.0,
                    mark_label="unit Gaussian",
                ),
                f"{len(norms):,} latents of up to {_NORM_PAIRS} random pairs. The noise a diffusion model "
                f"expects has RMS 1.",
            )
        )
    figures.append(
        _figure(
            "Labels",
            histogram(
                table.label.astype(np.float64), np.linspace(0, 1, 21), x_label="P(win preferred)", y_label="pairs"
            ),
            "From the source of the pairs; hard labels are 1.",
        )
    )
    figures += _label_set_figures(cache, damaged)
    prompts = Counter(table.prompt.tolist()).most_common(_MOST_FREQUENT)
    figures.append(_figure("Most frequent prompts", _ranks([(text or "(empty prompt)", n) for text, n in prompts]), ""))
    if summary.skipped:
        figures.append(
            _figure("Skipped pairs", _ranks(list(summary.skipped.items())), "By reason; CACHE/skipped names each pair.")
        )
    return f'<h2>In figures</h2><div class="plots">{"".join(figures)}</div>'


def _inversion_figures(table: PairTable, total: int) -> list[str]:
    """Round trips by size, and by the pair's last timestep, from which they start."""
    measured = table.measured
    values = table.inversion_error[measured].astype(np.float64)
    if not len(values):
        return []
    last = np.repeat(table.timestep[:, -1:], 2, axis=1)[measured]
    inside = [(low, high, values[(last >= low) & (last < high)]) for low, high in timestep_ranges(total)]
    return [
        _figure(
            "Inversion error",
            histogram(values, _edges(values, 0.0), x_label="relative RMS of the round trip", y_label="images"),
            f"From the last x_t back to x0 by DDIM, against x0; {len(values):,} images measured.",
        ),
        _figure(
            "Inversion error by timestep",
            curves(
                [float(low + high) / 2 for low, high, _ in inside],
                {"both": [float(np.median(part)) if len(part) else None for *_, part in inside]},
                x_range=(0.0, float(total)),
                x_label="last timestep of the pair",
                y_label="median round trip",
            ),
            "The longer the way, the more is lost.",
        ),
    ]


def _edges(values: Float[np.ndarray, " value"], include: float) -> Float[np.ndarray, " edge"]:
    """30 bins from the smallest to the largest value, `include` among them; outliers beyond 99.5% in the last one."""
    low, high = min(float(values.min()), include), max(float(np.quantile(values, 0.995)), include)
    return np.linspace(low, high if high > low else low + 1.0, 31)


def _label_set_figures(cache: Cache, damaged: dict[str, InpoError]) -> list[str]:
    """P(win preferred) of every label set made later, over the shards it has. One that cannot be read lands in
    `damaged`.
    """
    figures = []
    for name in label_sets(cache.store):
        labels, margins = [], []
        for shard in cache:
            try:
                found = read_shard_labels(cache.store, name, shard.name)
            except InpoError as error:
                damaged.setdefault(shard.name, error)
                continue
            for pair in found.pairs.values() if found is not None and found.attempt == shard.commit.attempt else ():
                labels.append(pair.label)
                # Labels that a file gave have no scores.
                margins.append(pair.scores[0] - pair.scores[1] if pair.scores else 2 * pair.label - 1)
        if not labels:
            continue
        spread = np.array(margins)
        edge = max(float(np.quantile(np.abs(spread), 0.99)), 1e-9)
        figures.append(
            _figure(
                f"Scores of label set {name}",
                histogram(
                    spread,
                    np.linspace(-edge, edge, 31),
                    x_label="score of win minus score of lose (without scores P(win) - P(lose))",
                    y_label="pairs",
                    mark=0.0,
                ),
                f"The scorer agrees with the source on {np.mean(spread > 0):.0%} of {len(labels):,} pairs; "
                f"mean P(win preferred) {np.mean(labels):.3f}.",
            )
        )
    return figures


def _noise_norms(cache: Cache, table: PairTable, damaged: dict[str, InpoError]) -> Float[np.ndarray, " value"]:
    """RMS of delta (of the target, where no delta is stored) over a random sample, one value per image and record."""
    path = "delta" if cache.manifest.profile == "full" else "target"
    found = [np.zeros(0)]
    for index in np.unique(table.shard[(rows := choose_pairs(table, _NORM_PAIRS))]):
        shard = cache.shards[table.shard_names[index]]
        if shard.name in damaged:
            continue
        try:
            images = np.unique(table.image[rows[table.shard[rows] == index]])
            values = shard.read(path, images).astype(np.float32)
        except InpoError as error:
            damaged[shard.name] = error
            continue
        found.append(np.sqrt((values**2).mean((-3, -2, -1), dtype=np.float64)).ravel())
    return np.concatenate(found)


def _figure(title: str, content: str, caption: str) -> str:
    note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure><h3>{escape(title)}</h3>{content}{note}</figure>"


def _ranks(items: list[tuple[str, int]]) -> str:
    most = max(count for _, count in items)
    return (
        '<ol class="ranks">'
        + "".join(
            f'<li><i style="width:{100 * count / most:.1f}%"></i><span>{escape(text)}</span><b>{count:,}</b></li>'
            for text, count in items
        )
        + "</ol>"
    )


def _sampling(num_readable: int, summary: Summary, sampled: list[SampledPair]) -> str:
    if not summary.num_pairs:
        what = "No pair" if summary.num_texts else "Nothing"
        return f"{what} is committed yet." + (" A writer seems to be at work." if summary.num_pending else "")
    counts = Counter(group for pair in sampled for group in pair.groups)
    parts = ", ".join(f"{counts[group]} {words}" for group, words in GROUPS.items() if counts[group])
    shown = f"all {len(sampled):,}" if len(sampled) == summary.num_pairs else f"{len(sampled):,} of {num_readable:,}"
    text = f"Pictures of {shown} pairs ({parts}; one may be several). Figures and plots above cover all readable pairs."
    if summary.identity["timesteps_per_pair"] > MOST_TIMESTEPS:
        text += f" {MOST_TIMESTEPS} of {summary.identity['timesteps_per_pair']} timesteps are shown, evenly spread."
    if summary.identity["profile"] != "full":
        profile = summary.identity["profile"]
        text += f" This {profile} cache stores neither delta nor x0(t); precompute with --profile full to see them."
    return text + " Open one with a click or Enter; arrow keys go on, Escape closes."


def _group_options(sampled: list[SampledPair]) -> str:
    counts = Counter(group for pair in sampled for group in pair.groups)
    options = [("all", f"all ({len(sampled)})", True)]
    options += [(group, f"{words} ({counts[group]})", bool(counts[group])) for group, words in GROUPS.items()]
    return "".join(
        f'<option value="{value}"{"" if enabled else " disabled"}>{escape(words)}</option>'
        for value, words, enabled in options
    )


def _footer(summary: Summary) -> str:
    written = f"Written {summary.first_commit} to {summary.last_commit}. " if summary.last_commit else ""
    return written + f"A page of its own: no network, no tracking. inpo inspect report {summary.location}"
