"""What is said of an error is a sentence: it begins with a capital letter and ends with a full stop."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from inpo.common import errors

ROOT = Path(__file__).parents[2]
STAGES = ("common", "data", "evaluation", "inspection", "precompute", "rounds", "toyworld", "train")
KINDS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.InpoError)}
AS_IT_IS_WRITTEN = ("alphas_cumprod ", "diffusers ", "kohya's ", "x0, ", "xarray ")
"""Names, which keep their small letter where a sentence begins with them."""


def parts(what: ast.expr) -> Iterator[tuple[str | None, str | None]]:
    """How each text begins and ends that this argument may be; None where a value stands there."""
    match what:
        case ast.Constant(value=str(text)):
            yield text, text
        case ast.JoinedStr(values=values):
            first, last = (each.value if isinstance(each, ast.Constant) else None for each in (values[0], values[-1]))
            yield first, last
        case ast.IfExp(body=body, orelse=orelse):
            yield from parts(body)
            yield from parts(orelse)


@pytest.mark.parametrize("stage", STAGES)
def test_every_error_says_a_sentence(stage: str) -> None:
    calls = [
        (f"{file.relative_to(ROOT)}:{node.lineno}", node.args[0])
        for file in sorted((ROOT / stage).rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS and node.args
    ]
    assert len(calls) > 3, "errors are raised by other names: this test no longer sees them"
    small = [
        where
        for where, what in calls
        for first, last in parts(what)
        if (first is not None and first[:1].islower() and not first.startswith(AS_IT_IS_WRITTEN))
        or not (last or "").endswith((".", "?"))
    ]
    assert not small
