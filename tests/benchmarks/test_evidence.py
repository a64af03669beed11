import json
from dataclasses import replace

import pytest
from scipy import stats

from benchmarks.evidence import choice
from benchmarks.evidence import conditions as c
from benchmarks.evidence import results as r
from benchmarks.evidence.__main__ import WIDER, joined


@pytest.fixture(params=[c.SHORT, c.FLOW], ids=["unet", "flow"])
def length(request, monkeypatch):
    monkeypatch.setattr(c, "length", request.param)
    choice.known_grids.cache_clear()
    yield request.param
    choice.known_grids.cache_clear()


def test_the_document_has_the_settings_of_all_rows(length):
    """Or `make evidence` would begin with grids, which take longer than its tables."""
    assert choice.wanting(c.rows()) == []
    for row in c.rows():
        (setting,) = {(run.learning_rate, run.strength) for run in choice.tested(row)}
        table = json.loads(length.document.read_text())["tables"][f"main, {row.pairs.name}"][row.method.name]
        assert setting == (table["learning_rate"], table["strength"])


def test_the_tables_say_what_the_document_has(length):
    """Figure for figure; all rows of a main table with the same seeds, others, but the wider grids', with five."""
    said = (c.SHORT.document.parent / "evidence.md").read_text()
    unets, flows = said.split("## On a flow")
    document = json.loads(length.document.read_text())
    tables, errors = document["tables"], document["mean_reference_error"]
    for title, rows in tables.items():
        made = r.answer_table(rows, errors) if title == "answer" else r.rows_table(rows)
        assert made in (unets if length is c.SHORT else flows), title
    for pairs in c.MAIN:
        (seeds,) = {tuple(row["seeds"]) for row in tables[f"main, {pairs.name}"].values()}
        assert seeds in (length.seeds, length.seeds + c.MORE_SEEDS)
    for title in tables.keys() - {f"main, {pairs.name}" for pairs in c.MAIN}:
        expected = c.SEEDS + (c.MORE_SEEDS if title == WIDER else ())
        assert {tuple(sorted(row["seeds"])) for row in tables[title].values()} == {expected}, title


def row(seeds, values, rate=1e-5, against_dpo=True):
    figures = {name: {kind: r.over_seeds(values) for kind in ("win_rate", "gain")} for name in c.SCORERS}
    head_to_head = {name: r.over_seeds(values) for name in c.SCORERS} if against_dpo else None
    setting = {"learning_rate": rate, "strength": 40.0, "steps": 80}
    return {"seeds": seeds, "base": figures, "dpo": head_to_head, **setting}


def test_seeds_join_those_of_the_document():
    known = {"main": {"more": row([1, 2, 3], [0.5, 0.6, 0.7]), "dpo": row([1, 2], [0.5, 0.6], against_dpo=False)}}
    made = {"main": {"more": row([9, 7, 2], [0.1, 0.2, 0.3]), "dpo": row([7, 8], [0.1, 0.2], against_dpo=False)}}
    found = joined(known, made)["main"]
    assert found["more"] == row([1, 2, 3, 7, 9], [0.5, 0.3, 0.7, 0.2, 0.1])
    assert found["dpo"] == row([1, 2, 7, 8], [0.5, 0.6, 0.1, 0.2], against_dpo=False)
    assert joined(known, {}) == known
    assert joined({}, made) == made


def test_rows_of_another_setting_take_the_place_of_the_documents():
    known = {"main": {"other rate": row([1, 2], [0.5, 0.6]), "not made": row([1, 2], [0.5, 0.6])}}
    made = {"main": {"new": row([1, 2], [0.1, 0.2]), "other rate": row([7, 8], [0.3, 0.4], 2e-5)}, "next": {}}
    found = joined(known, made)
    assert found["main"] == made["main"] | {"not made": known["main"]["not made"]}
    assert found["next"] == {}


def test_rows_are_held_against_the_document_seed_by_seed():
    known = {"same": row([1, 2, 3], [0.5, 0.6, 0.7]), "other rate": row([1], [0.1])}
    made = {"same": row([2, 4], [0.6, 9.0]), "other rate": row([1], [0.9], 2e-5), "new": row([1], [0.9])}
    assert (
        r.difference(known, made) == "1 of 3 rows are in the document; 6 figures of the same seeds differ by 0 at most."
    )
    made["same"] = row([2, 4], [0.85, 9.0])
    assert (
        r.difference(known, made)
        == "1 of 3 rows are in the document; 6 figures of the same seeds differ by 0.25 at most."
    )
    assert r.difference({"same": row([3], [0.7])}, made) == "1 of 3 rows are in the document; no seed is in both."
    assert r.difference({}, made) == "0 of 3 rows are in the document; no seed is in both."


def test_more_seeds_halve_an_interval():
    def half(seeds):
        return stats.t.ppf(0.975, len(seeds) - 1) / len(seeds) ** 0.5

    assert half(c.SHORT.seeds + c.MORE_SEEDS) <= half(c.SHORT.seeds) / 2
    assert not {*c.SHORT.seeds, *c.MORE_SEEDS} & {*c.GRID_SEEDS}


def test_grids_of_ones_own_take_nothing_from_the_document(length, monkeypatch):
    monkeypatch.setattr(c, "length", replace(length, own_grids=True))
    assert choice.wanting(c.rows()) == c.rows()
