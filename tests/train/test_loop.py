"""A run from cache to pipeline: what it writes and that it learns."""

import gc
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_first_line_comes_before_any_update(run: Callable[..., Path]) -> None:
    output = run(steps=4)
    first, *rest = lines(output)
    assert first["step"] == 0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert [line["step"] for line in rest] == [2, 4]
    for line in lines(output):
        assert {"step", "loss", "implicit_accuracy", "margin", "learning_rate", "pairs_per_second"} <= line.keys()


@pytest.mark.parametrize(("held_out", "is_said"), [(1e-6, True), (0.0, False)])
def test_a_share_of_so_few_pairs_that_none_is_held_out_is_said(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str], held_out: float, is_said: bool
) -> None:
    run(steps=1, held_out=held_out)
    assert ("a larger --held-out" in capsys.readouterr().err) is is_said


def test_what_the_caller_has_frozen_stays_frozen_and_nothing_else(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the count that tests/conftest.py remembers
    gc.unfreeze()
    run(steps=1, held_out=0.0)
    assert gc.get_freeze_count() == 0
    gc.collect()
    gc.freeze()
    frozen = gc.get_freeze_count()
    run(steps=1, held_out=0.0)
    assert 0 < gc.get_freeze_count() <= frozen
