"""The figures between the tables of docs/evidence.md and docs/choosing.md: each is one of the documents' seeds."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain, combinations, permutations
from typing import Any, NamedTuple

import numpy as np
import pytest
from scipy import stats

from benchmarks.evidence import conditions as c

FIGURE = r"[+-]?\d\.\d{3} ± \d\.\d{3}"
BOTH = rf"{FIGURE} / {FIGURE}"
FOLDER = c.SHORT.document.parent


class Place(NamedTuple):
    """Where a row stands."""

    table: str
    pairs: str
    turned: str


Values = dict[int, tuple[float, float]]
"""By seed, what the two scorers say."""


def rows(document: dict[str, Any]) -> Iterator[tuple[str, Place, dict[str, Any]]]:
    for title, table in document["tables"].items():
        kind, _, pairs = title.partition(", ")
        for name, row in table.items():
            method, *said = name.split(" | ")
            yield method, Place(kind, *(said or (pairs or "own", "5"))), row


def values(row: dict[str, Any], of: str) -> Values:
    each = [row["dpo"][name] if of == "dpo" else row["base"][name][of] for name in c.SCORERS]
    return dict(zip(row["seeds"], zip(*(found["seeds"] for found in each), strict=True), strict=True))


def written(found: list[tuple[float, float]]) -> Iterator[str]:
    """As the text has it: each scorer for itself, and both; differences have signs."""
    array = np.array(found)
    half = stats.t.ppf(0.975, len(array) - 1) * array.std(0, ddof=1) / len(array) ** 0.5
    for sign in ("", "+"):
        one, two = (f"{mean:{sign}.3f} ± {width:.3f}" for mean, width in zip(array.mean(0), half, strict=True))
        yield from (one, two, f"{one} / {two}")


def subsets(places: dict[Place, Values]) -> Iterator[list[tuple[float, float]]]:
    """Every choice of rows, with all their runs taken as one sample."""
    for count in range(1, len(places) + 1):
        for chosen in combinations(places.values(), count):
            yield list(chain.from_iterable(each.values() for each in chosen))


def known(document: dict[str, Any]) -> Iterator[str]:
    """Everything that can be said of gains, wins over DPO, and differences of gains over the seeds that both have."""
    gains: dict[tuple[str, str], dict[Place, Values]] = defaultdict(dict)
    wins: dict[tuple[str, str], dict[Place, Values]] = defaultdict(dict)
    for method, place, row in rows(document):
        gains[method, place.table][place] = values(row, "gain")
        if row["dpo"]:
            wins[method, place.table][place] = values(row, "dpo")
        yield from written(list(values(row, "win_rate").values()))
        yield from written(list(values(row, "gain").values()))
    for places in wins.values():
        for found in subsets(places):
            yield from written(found)
    for ours, theirs in permutations(gains.values(), 2):
        apart = {}
        for place, mine in ours.items():
            for other, less in theirs.items():
                seeds = [seed for seed in mine if seed in less]
                if place[1:] == other[1:] and len(seeds) > 1:
                    pairs = [(mine[seed], less[seed]) for seed in seeds]
                    apart[place] = {s: (a[0] - b[0], a[1] - b[1]) for s, (a, b) in zip(seeds, pairs, strict=True)}
        for found in subsets(apart):
            yield from written(found)


@pytest.fixture(scope="module")
def figures():
    documents = [json.loads(each.document.read_text()) for each in (c.SHORT, c.FLOW)]
    return {figure for document in documents for figure in known(document)}


@pytest.mark.parametrize("name", ["evidence.md", "choosing.md"])
def test_every_figure_with_an_interval_can_be_computed_again(name, figures):
    text = re.sub(r"\s+", " ", (FOLDER / name).read_text())
    both, alone = re.findall(BOTH, text), re.findall(FIGURE, re.sub(BOTH, "", text))
    assert len(both) > 40
    assert [figure for figure in (*both, *alone) if figure not in figures] == []
