"""The glossary, as far as a machine can hold it: names in the code, which are also those of the options."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = ("common", "data", "evaluation", "inspection", "precompute", "rounds", "toyworld", "train")
ONE_FAMILYS = ("common/families/", "common/testing.py", "toyworld/")
"""Where a component goes by the name that its family gives it."""
GLOSSARY = (ROOT / "docs/glossary.md").read_text()


def rows(table: str) -> list[tuple[str, str]]:
    return re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", table, flags=re.MULTILINE)[1:]


WORDS, BANNED = map(rows, GLOSSARY.split("Not in names", 1))


def trees(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield str(file.relative_to(ROOT)), parsed(file)


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@cache
def names(tree: ast.Module) -> frozenset[str]:
    return frozenset(every_name(tree))


def every_name(tree: ast.Module) -> Iterator[str]:
    """Everything that a file gives a name to; of attributes those of `self`: others have their names from elsewhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                yield node.attr


@cache
def words(name: str) -> list[str]:
    """x_t and x0 are words; InputShard is two."""
    return [word.lower() for word in re.findall(r"x_t|x0_t|x0|[A-Z]?[a-z0-9]+|[A-Z]+", name)]


def said(words_: str) -> list[str]:
    return [word.strip("` ") for word in words_.split(",")]


@pytest.mark.parametrize(("banned", "instead"), BANNED)
def test_no_name_has_another_word_for_it(banned: str, instead: str) -> None:
    found = {
        (file, name)
        for file, tree in trees(*STAGES, "benchmarks")
        for name in names(tree)
        for word in words(name)
        if word.removesuffix("s") in said(banned) and not (banned == "unet" and file.startswith(ONE_FAMILYS))
    }
    assert not found, f"say {instead}"


def test_every_word_of_the_glossary_is_one_of_the_code() -> None:
    known = {"_".join(words(name)) for _, tree in trees(*STAGES) for name in names(tree)}
    every = "|".join(sorted(known))
    for row, _ in WORDS:
        for word in said(row):
            assert re.search(rf"(^|_|\|){re.escape(word.replace(' ', '_'))}s?($|_|\|)", every), word


def test_a_class_has_a_name_of_its_own() -> None:
    """Two of one name are one word with two meanings. A constraint, Annotated, says of a field what it may hold."""
    found: dict[str, set[str]] = defaultdict(set)
    for file, tree in trees(*STAGES):
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].add(file)
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name, value = node.targets[0].id, ast.unparse(node.value)
                if re.match(r"[A-Z][a-z]", name) and not value.startswith("Annotated["):
                    found[name].add(value)  # the same alias may stand twice
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


def test_no_axis_is_called_a_step() -> None:
    """Records are counted by `record`; an optimiser has steps."""
    found = defaultdict(set)
    for file, tree in trees(*STAGES, "benchmarks", "tests"):
        for node in ast.walk(tree):
            if not isinstance(node, ast.Subscript) or not isinstance(node.value, ast.Name):
                continue
            shaped = re.fullmatch(r"(Float|Int|UInt|Bool|Shaped)\d*", node.value.id)
            if shaped and "'" in ast.unparse(node):
                for axis in ast.unparse(node).split("'")[1].split():
                    found[axis.strip("*#")].add(file)
    assert found["record"]
    assert not found["step"]
