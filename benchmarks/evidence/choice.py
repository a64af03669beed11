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


def grid(method: c.Method, pairs: c.Pairs, seed: int = c.GRID_SEEDS[0]) -> list[Run]:
    """Every setting with one seed."""
    return [
        Run(method=method, pairs=pairs, learning_rate=rate, strength=strength, seed=seed)
        for rate, strength in itertools.product(c.length.learning_rates, method.strengths)
    ]


def finalists(method: c.Method, pairs: c.Pairs) -> list[Run]:
    """The best settings with the second seed."""
    best = sorted(grid(method, pairs), key=lambda run: _cell([run]).sureness, reverse=True)
    return [replace(run, seed=c.GRID_SEEDS[1]) for run in best[: c.FINALISTS]]


def wanting(rows: list[tuple[c.Method, c.Pairs]]) -> list[tuple[c.Method, c.Pairs]]:
    """Rows of whose grid nothing is known."""
    return [row for row in rows if title(*row) not in known_grids()]


def title(method: c.Method, pairs: c.Pairs) -> str:
    """A row's name among grids."""
    return f"{method.name}, {pairs.name}"


@cache
def known_grids() -> dict[str, list[Cell]]:
    """The grids of the document, if their settings are to be taken."""
    if c.length.own_grids or not c.length.document.exists():
        return {}
    found = json.loads(c.length.document.read_text())["grid"]
    return {
        name: [Cell(**{**each, "win_rates": tuple(each["win_rates"])}) for each in row] for name, row in found.items()
    }


def cells(method: c.Method, pairs: c.Pairs) -> list[Cell]:
    """The grid in numbers, the document's or that of finished runs; those with both seeds come first, the best of all
    first.
    """
    if (known := known_grids().get(title(method, pairs))) is not None:
        return known
    both = [_cell([replace(run, seed=c.GRID_SEEDS[0]), run]) for run in finalists(method, pairs)]
    seen = {(cell.learning_rate, cell.strength) for cell in both}
    rest = [_cell([run]) for run in grid(method, pairs) if (run.learning_rate, run.strength) not in seen]
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


def tested(method: c.Method, pairs: c.Pairs) -> list[Run]:
    """The runs of the main table: the chosen setting, every test seed."""
    best = cells(method, pairs)[0]
    chosen = Run(
        method=method, pairs=pairs, learning_rate=best.learning_rate, strength=best.strength, seed=c.length.seeds[0]
    )
    return [replace(chosen, seed=seed) for seed in c.length.seeds]


def same_calls(pairs: c.Pairs) -> dict[str, list[Run]]:
    """Finished runs prolonged to the network calls of InPO's cache and training.

    Caches cost what `inpo plan` counts for them. A trained record costs three calls for each of its images, a backward
    pass counts as two; SFT trains one side.
    """
    images = 2 * c.NUM_PAIRS
    saved = images * (_calls(c.CLEAN, pairs) - _calls(c.NOISE, pairs))
    rest = saved + c.length.steps * c.length.batch * 2 * 3
    found = {}
    for method in c.SAME_CALLS:
        steps = int(rest / (c.length.batch * (1 if method is c.SFT else 2) * 3))
        runs = [run for run in tested(method, pairs) if run.seed in c.FEWER_SEEDS]
        found[f"{method.name}, {steps} steps"] = [replace(run, longer=steps) for run in runs]
    return found


def _calls(cache: c.Cache, pairs: c.Pairs) -> float:
    return network_calls(cache.folder(pairs), c.length.base)


def points() -> dict[str, list[Run]]:
    """Few pairs with many points or many pairs with few, own pairs, with the setting of plain InPO."""
    found = [run for run in tested(c.INPO, c.OWN) if run.seed in c.FEWER_SEEDS]
    return {method.name: [replace(run, method=method) for run in found] for method in c.POINTS}


def online() -> dict[str, list[Run]]:
    """Loops without a cache, on both kinds of pairs."""
    return {
        f"{loop.name} | {pairs.name} | {flips}": [
            replace(run, online=loop, flips=flips) for run in tested(loop.method, pairs) if run.seed in c.FEWER_SEEDS
        ]
        for pairs in c.MAIN
        for loop in c.ONLINE
        if loop.name not in c.length.without
        for flips in loop.flips
    }


def answer() -> dict[str, list[Run]]:
    """Few methods on every kind of pairs, on some with more turned labels, with the setting of a main table."""
    return {
        f"{method.name} | {pairs.name} | {flips}": [
            replace(run, pairs=pairs, flips=flips)
            for run in tested(method, c.tuned_on(pairs))
            if run.seed in c.FEWER_SEEDS
        ]
        for pairs in c.KINDS
        for flips in (c.FLIPS if pairs in c.TURNED else c.FLIPS[:1])
        for method in c.ANSWER
        if method in c.methods(c.OWN)
    }


def dpo_of(run: Run) -> Run:
    """DPO's run that this one is compared with: the same pairs, labels and seed, by the setting of its own grid."""
    theirs = tested(c.DPO, c.tuned_on(run.pairs))[0]
    return replace(theirs, pairs=run.pairs, flips=run.flips, seed=run.seed)
