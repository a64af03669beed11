"""cache_schema.md and the code say the same, and its examples run."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from inpo.common.cache import ARRAYS, SCHEMA_VERSION, Commit, InverterIdentity, Manifest, ShardSource, open_cache
from inpo.common.cache.schema import ConditionSpec, LevelTables
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
    written = [[name, json_type(field)] for name, field in model.model_json_schema()["properties"].items()]
    rows = table(column)
    assert [row[:2] for row in rows] == written
    assert all(len(row) == 3 and row[2] for row in rows)


def test_the_layout_names_every_place_that_the_code_writes_to():
    layout = set(re.findall(r"^    CACHE/([\w.]+)", DOCUMENT, re.MULTILINE))
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


def test_every_example_runs_and_reads_what_we_read(tmp_path):
    for name in ("full", "lean"):
        shutil.copytree(GOLDEN / name, tmp_path / name)
    cache = open_cache(str(tmp_path / "full"))
    shard = cache.shards["0-00000"]
    find, with_zarr, with_tensorstore, with_xarray, lean = examples()

    scope: dict[str, object] = {"root": str(tmp_path / "full")}
    exec(find, scope)
    assert scope["groups"] == [shard.location]
    exec(with_zarr, scope)
    assert np.array_equal(scope["target"], shard.read("target"))
    assert np.array_equal(scope["record"], shard.read("target")[0, 1])
    assert scope["pair_ids"] == list(shard.read("pair_id"))
    exec(with_tensorstore, scope)
    assert np.array_equal(scope["record"], shard.read("target")[0, 1])
    pytest.importorskip("xarray")
    exec(with_xarray, scope)
    assert np.array_equal(scope["errors"], shard.read("reference_error")[:, :, 0])

    scope = {"root": str(tmp_path / "lean")}
    exec(find, scope)
    exec(with_zarr, scope)
    exec(lean, scope)
    assert scope["x_t"].tobytes() == shard.read("x_t").tobytes()
