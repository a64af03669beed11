import json
from dataclasses import replace

import pytest
from scipy import stats

from benchmarks.evidence import choice
from benchmarks.evidence import conditions as c
from benchmarks.evidence import results as r
from benchmarks.evidence.__main__ import joined


@pytest.fixture(params=[c.SHORT, c.FLOW], ids=["unet", "flow"])
def length(request, monkeypatch):
    monkeypatch.setattr(c, "length", request.param)
    choice.known_grids.cache_clear()
    yield request.param
    choice.known_grids.cache_clear()


def test_the_document_has_the_settings_of_all_rows(length):
    """Or `make evidence` would begin with grids, which take longer than its tables."""
    assert choice.wanting(c.rows()) == []
    for method, pairs in c.rows():
        (setting,) = {(run.learning_rate, run.strength) for run in choice.tested(method, pairs)}
        table = json.loads(length.document.read_text())["tables"][f"main, {pairs.name}"][method.name]
        assert setting == (table["learning_rate"], table["strength"])


def test_the_main_tables_say_what_the_document_has(length):
    """Figure for figure; all rows with the same seeds."""
    said = (c.SHORT.document.parent / "evidence.md").read_text()
    unets, flows = said.split("## On a flow")
    tables = json.loads(length.document.read_text())["tables"]
    for title in ("main, own", "main, rendered-1", "same calls", "points"):
        if title in tables:
            assert r.rows_table(tables[title]) in (unets if length is c.SHORT else flows)
    for _, pairs in c.rows():
        (seeds,) = {tuple(row["seeds"]) for row in tables[f"main, {pairs.name}"].values()}
        assert seeds in (length.seeds, length.seeds + c.MORE_SEEDS)


def test_fewer_seeds_of_a_known_row_do_not_take_its_place():
    def row(seeds, rate=1e-5):
        return {"seeds": [*range(seeds)], "learning_rate": rate, "strength": 40.0, "steps": 80}

    known = {"main": {"few": row(5), "all": row(5), "other rate": row(5), "not made": row(5)}}
    made = {"main": {"new": row(3), "few": row(3), "all": row(5), "other rate": row(3, 2e-5)}, "more": {"one": row(2)}}
    found = joined(known, made)
    assert found["main"]["few"] is known["main"]["few"]
    assert found["main"]["not made"] is known["main"]["not made"]
    for name in ("new", "all", "other rate"):
        assert found["main"][name] is made["main"][name]
    assert found["more"] == made["more"]
    assert joined(known, {}) == known


def test_rows_are_held_against_the_document_seed_by_seed():
    def row(seeds, values, rate=1e-5):
        figures = {name: {"win_rate": {"seeds": values}, "gain": {"seeds": values}} for name in c.SCORERS}
        head_to_head = {name: {"seeds": values} for name in c.SCORERS}
        setting = {"learning_rate": rate, "strength": 40.0, "steps": 80}
        return {"seeds": seeds, "base": figures, "dpo": head_to_head, **setting}

    known = {"same": row([1, 2, 3], [0.5, 0.6, 0.7]), "other rate": row([1], [0.1])}
    made = {"same": row([2, 4], [0.6, 9.0]), "other rate": row([1], [0.9], 2e-5), "new": row([1], [0.9])}
    assert r.difference(known, made) == "1 of 3 rows are in the document; their figures differ by 0 at most."
    made["same"] = row([2, 4], [0.85, 9.0])
    assert r.difference(known, made) == "1 of 3 rows are in the document; their figures differ by 0.25 at most."
    assert r.difference({}, made).startswith("0 of 3")


def test_more_seeds_halve_an_interval():
    def half(seeds):
        return stats.t.ppf(0.975, len(seeds) - 1) / len(seeds) ** 0.5

    assert half(c.SHORT.seeds + c.MORE_SEEDS) <= half(c.SHORT.seeds) / 2
    assert not {*c.SHORT.seeds, *c.MORE_SEEDS} & {*c.GRID_SEEDS}


def test_grids_of_ones_own_take_nothing_from_the_document(length, monkeypatch):
    monkeypatch.setattr(c, "length", replace(length, own_grids=True))
    assert choice.wanting(c.rows()) == c.rows()
