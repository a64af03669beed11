"""The report's plots. Bars of a plot that names a column choose the gallery's pairs by it (assets/report.js)."""

import numpy as np
from jaxtyping import Float

from inpo.common.cache import Cache
from inpo.common.cache.labels import label_sets, read_shard_labels
from inpo.common.errors import InpoError
from inpo.inspection.pair_table import PairTable
from inpo.inspection.plots import Figure, Series, curves, histogram
from inpo.inspection.reinvert import choose_pairs
from inpo.inspection.summary import Summary, timestep_ranges

_NORM_PAIRS = 200


def figures_of(cache: Cache, table: PairTable, summary: Summary, unreadable: dict[str, InpoError]) -> list[Figure]:
    """Every plot of a cache that has pairs. What cannot be read lands in `unreadable`."""
    total = cache.manifest.num_train_timesteps
    bins = [((each.low + each.high) / 2, each) for each in summary.timesteps]
    errors = curves(
        [
            Series(name="win", style="win", points=[(at, each.reference_error_win) for at, each in bins]),
            Series(name="lose", style="lose", points=[(at, each.reference_error_lose) for at, each in bins]),
        ],
        x_range=(0.0, float(total)),
        x_label="timestep",
        y_label="mean E_ref",
        log=True,
    )
    found = []
    if errors is not None:
        found.append(
            Figure(
                title="Reference error by timestep",
                plot=errors,
                caption="How far the frozen model is from each side's target; training starts from the gap between "
                "them. The axis is logarithmic.",
            )
        )
    found.append(
        Figure(
            title="Timesteps",
            plot=histogram(
                table.timestep.ravel().astype(np.float64),
                np.linspace(0, total, min(total, 40) + 1),
                x_label="timestep",
                y_label="records",
                column="timesteps",
            ),
            caption="Every timestep of the range should be covered about equally.",
        )
    )
    for title, values, x_label, column, caption, include in (
        ("Reference error", table.mean_reference_error, "mean E_ref of the pair", "reference_error", "", None),
        (
            "Win/lose gap",
            table.gap,
            "E_ref of win minus E_ref of lose",
            "gap",
            "Right of 0 the frozen model explains the preferred image worse than the other.",
            0.0,
        ),
    ):
        finite = values[np.isfinite(values)]
        if len(finite):
            plot = histogram(
                finite, _edges(finite, include), x_label=x_label, y_label="pairs", mark=include, column=column
            )
            found.append(Figure(title=title, plot=plot, caption=caption))
    found += _inversion_figures(table, total)
    norms = _noise_norms(cache, table, unreadable)
    if len(norms):
        name = "delta" if cache.manifest.profile == "full" else "target"
        is_noise = name == "delta" or cache.levels.space == "noise"
        found.append(
            Figure(
                title=f"Size of {name}",
                plot=histogram(
                    norms,
                    _edges(norms, 1.0 if is_noise else None),
                    x_label=f"RMS of {name}",
                    y_label="latents",
                    mark=1.0 if is_noise else None,
                    mark_label="unit Gaussian" if is_noise else "",
                ),
                caption=f"{len(norms):,} latents of up to {_NORM_PAIRS} random pairs. "
                + ("The noise a diffusion model expects has RMS 1." if is_noise else "The target is noise - x0."),
            )
        )
    found.append(
        Figure(
            title="Labels",
            plot=histogram(
                table.label.astype(np.float64),
                np.linspace(0, 1, 21),
                x_label="P(win preferred)",
                y_label="pairs",
                column="label",
            ),
            caption="From the source of the pairs; hard labels are 1.",
        )
    )
    return found + _label_set_figures(cache, unreadable)


def _inversion_figures(table: PairTable, total: int) -> list[Figure]:
    """Round trips by size, and by the pair's last timestep, from which they start."""
    measured = table.measured
    values = table.inversion_error[measured].astype(np.float64)
    if not len(values):
        return []
    last = np.repeat(table.timestep[:, -1:], 2, axis=1)[measured]
    inside = [(low, high, values[(last >= low) & (last < high)]) for low, high in timestep_ranges(total)]
    found = [
        Figure(
            title="Inversion error",
            plot=histogram(
                values,
                _edges(values, 0.0),
                x_label="relative RMS of the round trip",
                y_label="images",
                column="inversion_errors",
            ),
            caption=f"From the last x_t back to x0 by DDIM, against x0; {len(values):,} images measured.",
        )
    ]
    medians = [((low + high) / 2, float(np.median(part)) if len(part) else None) for low, high, part in inside]
    plot = curves(
        [Series(name="both", style="both", points=medians)],
        x_range=(0.0, float(total)),
        x_label="last timestep of the pair",
        y_label="median round trip",
    )
    if plot is not None:
        found.append(
            Figure(title="Inversion error by timestep", plot=plot, caption="The longer the way, the more is lost.")
        )
    return found


def _edges(values: Float[np.ndarray, " value"], include: float | None) -> Float[np.ndarray, " edge"]:
    """30 bins from the smallest to the largest value, `include` among them; outliers beyond 99.5% in the last one, and
    of values on both sides of 0 in the first one."""
    low = float(np.quantile(values, 0.005)) if values.min() < 0 else float(values.min())
    high = float(np.quantile(values, 0.995))
    if include is not None:
        low, high = min(low, include), max(high, include)
    return np.linspace(low, high if high > low else low + 1.0, 31)


def _label_set_figures(cache: Cache, unreadable: dict[str, InpoError]) -> list[Figure]:
    """P(win preferred) of every label set made later, over the shards it has. One that cannot be read lands in
    `unreadable`.
    """
    figures = []
    for name in label_sets(cache.store):
        labels, margins = [], []
        for shard in cache:
            try:
                found = read_shard_labels(cache.store, name, shard.name)
            except InpoError as error:
                unreadable.setdefault(shard.name, error)
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
            Figure(
                title=f"Scores of label set {name}",
                plot=histogram(
                    spread,
                    np.linspace(-edge, edge, 31),
                    x_label="score of win minus score of lose",
                    y_label="pairs",
                    mark=0.0,
                ),
                caption=f"The scorer agrees with the source on {np.mean(spread > 0):.0%} of {len(labels):,} pairs; "
                f"mean P(win preferred) {np.mean(labels):.3f}. Without scores: P(win) - P(lose).",
            )
        )
    return figures


def _noise_norms(cache: Cache, table: PairTable, unreadable: dict[str, InpoError]) -> Float[np.ndarray, " value"]:
    """RMS of delta (of the target, where no delta is stored) over a random sample, one value per image and record."""
    path = "delta" if cache.manifest.profile == "full" else "target"
    found = [np.zeros(0)]
    for index in np.unique(table.shard[(rows := choose_pairs(table, _NORM_PAIRS))]):
        shard = cache.shards[table.shard_names[index]]
        if shard.name in unreadable:
            continue
        try:
            images = np.unique(table.image[rows[table.shard[rows] == index]])
            values = shard.read(path, images).astype(np.float32)
        except InpoError as error:
            unreadable[shard.name] = error
            continue
        found.append(np.sqrt((values**2).mean((-3, -2, -1), dtype=np.float64)).ravel())
    return np.concatenate(found)
