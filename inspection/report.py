"""`inpo inspect report`: one self-contained HTML page. It asks the network for nothing and works from file://.

Figures and plots cover every readable pair, the gallery up to MOST_PAIRS of them, and pictures a sample; the page says
how many.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from inpo.common.cache import Cache, open_cache
from inpo.common.cache.commits import SkippedRow, skipped_rows
from inpo.common.errors import CacheError, InpoError, command
from inpo.common.models import Model
from inpo.common.space import human_bytes
from inpo.inspection.leftovers import find_leftovers
from inpo.inspection.pages import render
from inpo.inspection.pair_table import read_pair_table
from inpo.inspection.preview import linear_preview, vae_preview
from inpo.inspection.report_figures import figures_of
from inpo.inspection.report_sample import GROUPS, MOST_TIMESTEPS, PagePair, page_pairs
from inpo.inspection.summary import Summary, summary_of
from inpo.inspection.words import cache_facts, number

_MOST_FREQUENT = 12
_MOST_SKIPPED = 100
"""Skipped rows that the page names, of each reason."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The page and what stands in it."""

    html: str
    num_pairs: int
    num_shown: int
    """Pairs with pictures."""
    unreadable: dict[str, InpoError]
    """Shards that could not be read, whole or in their latents."""


def make_report(
    location: str, *, model: Model | None = None, per_group: int = 40, on_pair: Callable[[], None] = lambda: None
) -> Report:
    """The report of a cache in whatever state it is.

    `per_group` pairs for each reason (GROUPS) have pictures, fewer if these would fill the page. With `model` they are
    decoded by its VAE.

    Raises CacheMissing if there is no cache, CacheSchemaError if its manifest cannot be read.
    """
    bad: dict[str, Any] = {}
    cache = open_cache(location, allow_empty=True, damaged=bad)
    unreadable: dict[str, InpoError] = dict(bad)
    table = read_pair_table(cache, unreadable)
    summary = summary_of(cache, table, find_leftovers(cache.store))
    preview = linear_preview(cache) if model is None else vae_preview(cache, model)
    pairs = page_pairs(cache, table, preview, per_group=per_group, unreadable=unreadable, on_pair=on_pair)
    figures = figures_of(cache, table, summary, unreadable) if len(table) else []
    skipped = _skipped(cache, unreadable)
    prompts = Counter(table.prompt.tolist()).most_common(_MOST_FREQUENT)
    num_drawn = sum(pair.sheet is not None for pair in pairs)
    _, height, width = cache.manifest.latent_shape
    html = render(
        "report.html",
        title=Path(cache.location).name or cache.location,
        location=cache.location,
        facts=cache_facts(cache.manifest),
        unreadable=sorted((name, str(error)) for name, error in unreadable.items()),
        tiles=_tiles(summary),
        settings=[(name, _short(value)) for name, value in summary.identity.items() if value is not None],
        figures=figures,
        prompts=prompts if prompts and prompts[0][1] > 1 else [],
        skipped=skipped,
        skipped_counts=summary.skipped,
        note=_sampling(len(table), summary, pairs),
        groups=[(name, words, sum(name in pair.groups for pair in pairs)) for name, words in GROUPS.items()],
        num_pairs=len(pairs),
        num_drawn=num_drawn,
        footer=_footer(summary),
        data={
            "pairs": [_json(pair) for pair in pairs],
            "note": preview.note,
            "ratio": width / height,
            "sheet_command": command("inspect", "pair", cache.location, "PAIR_ID"),
        },
    )
    return Report(html=html, num_pairs=cache.num_pairs, num_shown=num_drawn, unreadable=unreadable)


def _json(pair: PagePair) -> dict[str, Any]:
    document = asdict(pair)
    return document if pair.sheet is not None else {name: each for name, each in document.items() if name != "sheet"}


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


def _short(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value)[:24]


def _skipped(cache: Cache, unreadable: dict[str, InpoError]) -> list[tuple[str, SkippedRow]]:
    """(shard, row) of the first skipped rows of each reason. A list that cannot be read lands in `unreadable`."""
    names = [name for name, commit in cache.commits.items() if commit.skipped]
    paths = [f"skipped/{name}/{cache.commits[name].attempt}.jsonl" for name in names]
    taken, found = Counter[str](), []
    for name, path, data in zip(names, paths, cache.store.get_many(paths), strict=True):
        try:
            if isinstance(data, CacheError):
                raise data
            rows = [] if data is None else skipped_rows(data, cache.store.path(path))
        except InpoError as error:
            unreadable.setdefault(name, error)
            continue
        for row in rows:
            taken[row.reason] += 1
            if taken[row.reason] <= _MOST_SKIPPED:
                found.append((name, row))
    return sorted(found, key=lambda each: each[1].reason)


def _sampling(num_readable: int, summary: Summary, pairs: list[PagePair]) -> str:
    if not summary.num_pairs:
        what = "No pair" if summary.num_texts else "Nothing"
        return f"{what} is committed yet." + (" A writer seems to be at work." if summary.num_pending else "")
    drawn = [pair for pair in pairs if pair.sheet is not None]
    counts = Counter(group for pair in drawn for group in pair.groups)
    parts = ", ".join(f"{counts[group]} {words}" for group, words in GROUPS.items() if counts[group])
    shown = f"all {len(drawn):,}" if len(drawn) == summary.num_pairs else f"{len(drawn):,} of {num_readable:,}"
    text = f"Pictures of {shown} pairs ({parts}; one may be several)."
    if len(pairs) < num_readable:
        text += f" The gallery lists {len(pairs):,} of them, at random besides."
    full = sum(pair.sheet is not None and bool(pair.sheet.full) for pair in drawn)
    if 0 < full < len(drawn):
        text += f" {full:,} have x0 in full size."
    if summary.identity["timesteps_per_pair"] > MOST_TIMESTEPS:
        text += f" {MOST_TIMESTEPS} of {summary.identity['timesteps_per_pair']} timesteps are shown, evenly spread."
    if summary.identity["profile"] != "full":
        profile = summary.identity["profile"]
        text += f" This {profile} cache stores neither delta nor x0(t); precompute with --profile full to see them."
    return text


def _footer(summary: Summary) -> str:
    written = f"Written {summary.first_commit} to {summary.last_commit}. " if summary.last_commit else ""
    again = command("inspect", "report", summary.location)
    return f"{written}A page of its own: no network, no tracking. {again}"
