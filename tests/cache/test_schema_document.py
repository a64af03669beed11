"""cache_schema.md and the code say the same, and its examples run."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from pydantic import BaseModel

from inpo.common.cache import (
    ARRAYS,
    SCHEMA_VERSION,
    Commit,
    InverterIdentity,
    Manifest,
    ShardSource,
    TextCommit,
    open_cache,
)
from inpo.common.cache.commits import AnyCommit
from inpo.common.cache.committed import CommittedArrays
from inpo.common.cache.schema import ConditionSpec, LevelTables
from inpo.common.cache.specs import TEXT
from inpo.common.conditions import Condition
from inpo.common.families import FAMILIES

DOCUMENT = (Path(__file__).parents[2] / "cache_schema.md").read_text()
GOLDEN = Path(__file__).parent / "golden" / "v2"


def table(first_column: str) -> list[list[str]]:
    """The cells of the table whose header starts with this column."""
    lines = DOCUMENT.splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split(" | ")])
    return rows


def test_the_arrays_are_those_of_the_code():
    written = [
        [
            spec.path,
            spec.dtype,
            ", ".join(spec.axes),
            spec.chunking,
            ", ".join(spec.profiles),
            spec.option or "",
            spec.meaning,
        ]
        for spec in ARRAYS
    ]
    assert table("path") == written


def test_the_arrays_of_texts_are_those_of_the_code():
    first, conditions = table("text path")
    assert first == [TEXT.path, TEXT.dtype, ", ".join(TEXT.axes), TEXT.meaning]
    assert conditions[0] == "<condition>"


def test_the_conditions_are_those_of_the_families():
    written = [
        [family.name, spec.array(name).path, spec.dtype, ", ".join(spec.array(name).axes)]
        for family in FAMILIES.values()
        for name, spec in family.conditions.items()
    ]
    assert [row[:4] for row in table("family")] == written


def json_type(properties: dict[str, object]) -> str:
    options = properties.get("anyOf", [properties])
    kinds = {option.get("type", "object") for option in options} - {"null"}
    assert len(kinds) == 1
    return kinds.pop()


@pytest.mark.parametrize(
    ("column", "model"),
    [
        ("manifest field", Manifest),
        ("levels field", LevelTables),
        ("condition field", ConditionSpec),
        ("inverter field", InverterIdentity),
        ("commit field", Commit),
        ("source field", ShardSource),
    ],
)
def test_the_fields_are_those_of_the_code(column, model):
    rows = table(column)
    assert [row[:2] for row in rows] == fields_of(model)
    assert all(len(row) == 3 and row[2] for row in rows)


def fields_of(model: type[BaseModel]) -> list[list[str]]:
    return [[name, json_type(field)] for name, field in model.model_json_schema()["properties"].items()]


def test_the_fields_of_a_commit_of_texts_are_those_of_the_code():
    shared = len(AnyCommit.model_fields)
    assert fields_of(TextCommit)[:shared] == [row[:2] for row in table("commit field")][:shared]
    assert [row[:2] for row in table("text commit field")] == fields_of(TextCommit)[shared:]


def test_the_layout_names_every_place_that_the_code_writes_to():
    layout = set(re.findall(r"^    CACHE/([\w.-]+)", DOCUMENT, re.MULTILINE))
    root = Path(__file__).parents[2]
    sources = [
        file for stage in ("common", "precompute", "inspection", "evaluation") for file in (root / stage).rglob("*.py")
    ]
    calls = re.findall(r"""(?:put_new|move)\(\s*(.+)""", "\n".join(file.read_text() for file in sources))
    places = {place for call in calls for place in re.findall(r"""f"([a-z]+)/""", call)}
    assert {"commits", "configurations", "quarantine"} <= places <= layout
    assert {entry.name for cache in GOLDEN.iterdir() for entry in cache.iterdir()} <= layout


def test_the_version_is_that_of_the_code():
    assert DOCUMENT.startswith(f"# The cache: schema version {SCHEMA_VERSION}\n")


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)


@pytest.mark.parametrize("name", ["full", "lean", "compact", "grouped"])
def test_every_example_runs_and_reads_what_we_read(tmp_path, name):
    shutil.copytree(GOLDEN / name, tmp_path / name)
    shard = open_cache(str(tmp_path / name)).shards["0-00000"]
    win = shard.sides()[1, 0]
    target = CommittedArrays.read_stored(shard, "target")  # of a compact cache, the multiples
    assert np.array_equal(target, shard.read("target")) == (name != "compact")
    find, with_zarr, told, with_tensorstore, with_xarray, lean = examples()

    scope: dict[str, object] = {"root": str(tmp_path / name)}
    exec(find, scope)
    assert scope["groups"] == [shard.location]
    exec(with_zarr, scope)
    assert np.array_equal(scope["target"], target)
    assert np.array_equal(scope["record"], target[win, 0])
    assert scope["pair_ids"] == list(shard.read("pair/id"))
    group = shard.groups()[1]
    exec(told, scope)
    assert scope["caption"] == shard.prompts()[group]
    texts, row = shard.read("group/prompt")[group]
    own = shard.cache.texts.need(shard.commit.texts[texts]).read_stored("embedding")[row]
    assert np.array_equal(scope["embedding"][: len(own)], own)
    assert scope["embedding"].shape == Condition.of(shard, np.array([win]))["embedding"].shape[1:]
    assert not scope["embedding"][len(own) :].any()
    exec(with_tensorstore, scope)
    assert np.array_equal(scope["record"], target[win, 0])
    exec(lean, scope)
    assert scope["x_t"].tobytes() == shard.read("x_t").tobytes()
    pytest.importorskip("xarray")
    exec(with_xarray, scope)
    assert np.array_equal(scope["errors"], shard.read("reference_error")[shard.sides()[:, 0]])
