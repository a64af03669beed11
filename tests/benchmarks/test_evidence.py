import json
from dataclasses import replace

import pytest

from benchmarks.evidence import choice
from benchmarks.evidence import conditions as c


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


def test_grids_of_ones_own_take_nothing_from_the_document(length, monkeypatch):
    monkeypatch.setattr(c, "length", replace(length, own_grids=True))
    assert choice.wanting(c.rows()) == c.rows()
