"""Which runs there are, and the settings that grids chose for them."""

import itertools
import json
from dataclasses import replace
from functools import cache
from typing import Any

from benchmarks.evidence import conditions as c
from benchmarks.evidence import results as r
from benchmarks.evidence.caches import network_calls
from benchmarks.evidence.cell import Cell
from benchmarks.evidence.conditions import Run


def grid(row: c.Row, seed: int = c.GRID_SEEDS[0]) -> list[Run]:
    """Every setting with one seed."""
    return [
        Run(
            method=row.method,
            pairs=row.pairs,
            learning_rate=rate,
            strength=strength,
            seed=seed,
            flips=row.flips,
            online=row.online,
        )
        for rate, strength in itertools.product(c.length.learning_rates, row.strengths)
    ]


def finalists(row: c.Row) -> list[Run]:
    """The best settings with the second seed; of a wider grid all."""
    best = sorted(grid(row), key=lambda run: _cell([run]).sureness, reverse=True)
    return [replace(run, seed=c.GRID_SEEDS[1]) for run in best[: c.FINALISTS if row.turned is None else None]]


def wanting(rows: list[c.Row]) -> list[c.Row]:
    """Rows of whose grid nothing is known."""
    return [row for row in rows if row.title not in known_grids()]


@cache
def known_grids() -> dict[str, list[Cell]]:
    """The grids of the document, if their settings are to be taken."""
    if c.length.own_grids or not c.length.document.exists():
        return {}
    found = json.loads(c.length.document.read_text())["grid"]
    return {
        name: [Cell(**{**each, "win_rates": tuple(each["win_rates"])}) for each in row] for name, row in found.items()
    }


def cells(row: c.Row) -> list[Cell]:
    """The grid in numbers, the document's or that of finished runs; those with both seeds come first, the best of all
    first.
    """
    if (known := known_grids().get(row.title)) is not None:
        return known
    both = [_cell([replace(run, seed=c.GRID_SEEDS[0]), run]) for run in finalists(row)]
    seen = {(cell.learning_rate, cell.strength) for cell in both}
    rest = [_cell([run]) for run in grid(row) if (run.learning_rate, run.strength) not in seen]
    return [*sorted(both, key=lambda cell: -cell.sureness), *sorted(rest, key=lambda cell: -cell.sureness)]


def _cell(runs: list[Run]) -> Cell:
    found = [r.read_comparison(run.images("validation")) for run in runs]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def sureness(oracle: dict[str, Any]) -> float:
        low, high = oracle["mean_difference_interval"]
        return float(oracle["mean_difference"] / ((high - low) / (2 * 1.96)))

    return Cell(
        learning_rate=runs[0].learning_rate,
        strength=runs[0].strength,
        sureness=mean([sureness(each[c.SCORERS[0]]) for each in found]),
        improvement=mean([each[c.SCORERS[0]]["mean_difference"] for each in found]),
        win_rates=tuple(mean([each[name]["win_rate"] for each in found]) for name in c.SCORERS),
        seeds=len(runs),
    )


def tested(row: c.Row) -> list[Run]:
    """The chosen setting with every test seed."""
    best = cells(row)[0]
    return [
        replace(run, seed=seed)
        for seed in c.length.seeds
        for run in grid(row)
        if (run.learning_rate, run.strength) == (best.learning_rate, best.strength)
    ]


def tested_everywhere(method: c.Method, pairs: c.Pairs) -> list[Run]:
    """The same of a row of the main tables, with the seeds that all tables have."""
    return [run for run in tested(c.Row(method=method, pairs=pairs)) if run.seed in c.SEEDS]


def same_calls(pairs: c.Pairs) -> dict[str, list[Run]]:
    """InPO's runs, and finished ones of other methods prolonged to the network calls of its cache and training.

    Caches cost what `inpo plan` counts for them. A trained record costs three calls for each of its images, a backward
    pass counts as two; SFT trains one side.
    """
    images = 2 * c.NUM_PAIRS
    saved = images * (_calls(c.CLEAN, pairs) - _calls(c.NOISE, pairs))
    rest = saved + c.length.steps * c.length.batch * 2 * 3
    found = {f"{c.INPO.name}, {c.length.steps} steps": tested_everywhere(c.INPO, pairs)}
    for method in c.SAME_CALLS:
        steps = int(rest / (c.length.batch * (1 if method is c.SFT else 2) * 3))
        runs = tested_everywhere(method, pairs)
        found[f"{method.name}, {steps} steps"] = [replace(run, longer=steps) for run in runs]
    return found


def _calls(cache: c.Cache, pairs: c.Pairs) -> float:
    return network_calls(cache.folder(pairs), c.length.base)


def points() -> dict[str, list[Run]]:
    """Few pairs with many points or many pairs with few, own pairs, with the setting of plain InPO."""
    found = tested_everywhere(c.INPO, c.OWN)
    return {method.name: [replace(run, method=method) for run in found] for method in c.POINTS}


def wider(row: c.Row) -> list[Run]:
    """The choice of a wider grid, with all seeds of the main tables."""
    return [replace(tested(row)[0], seed=seed) for seed in (*c.SEEDS, *c.MORE_SEEDS)]


def online(row: c.Row) -> dict[str, list[Run]]:
    """A loop without a cache, with every share of turned labels that it is tried with."""
    assert row.online is not None
    return {
        f"{row.online.name} | {row.pairs.name} | {flips}": [replace(run, flips=flips) for run in tested(row)]
        for flips in row.online.flips
    }


def answer() -> dict[str, list[Run]]:
    """Few methods on every kind of pairs, on some with more turned labels, with the setting of a main table."""
    return {
        f"{method.name} | {pairs.name} | {flips}": [
            replace(run, pairs=pairs, flips=flips) for run in tested_everywhere(method, c.tuned_on(pairs))
        ]
        for pairs in c.KINDS
        for flips in (c.FLIPS if pairs in c.TURNED else c.FLIPS[:1])
        for method in c.ANSWER
        if method in c.methods(c.OWN)
    }


def dpo_of(run: Run) -> Run:
    """DPO's run that this one is compared with: the same pairs, labels and seed, by the setting of its own grid."""
    theirs = tested(c.Row(method=c.DPO, pairs=c.tuned_on(run.pairs)))[0]
    return replace(theirs, pairs=run.pairs, flips=run.flips, seed=run.seed)


def wider_dpo_of(run: Run) -> Run:
    """The same by the wider grid for just these pairs and labels."""
    return replace(wider(c.Row(method=c.DPO, pairs=run.pairs, turned=run.flips))[0], seed=run.seed)
