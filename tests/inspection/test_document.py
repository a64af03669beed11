"""docs/inspect.md is true: its Python runs, its commands and options exist, its pictures are there."""

import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from inpo.common.cache import open_cache
from inpo.inspection.cli import app

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "inspect.md").read_text(encoding="utf-8")


def test_the_snippets_run_and_give_what_the_cache_holds(states, tmp_path, monkeypatch, capsys):
    pytest.importorskip("xarray")
    shutil.copytree(states("healthy"), tmp_path / "runs" / "demo" / "cache")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr's and xarray's own, on strings without a final v3 specification
        for code in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL):
            exec(code, scope)
        wins = scope["wins"].values
    cache = open_cache("runs/demo/cache")
    shard = cache.shards[scope["commit_file"].stem]
    sides = shard.sides()
    assert "5 pairs, 10 records, ddim" in capsys.readouterr().out
    assert np.array_equal(scope["x_t"], cache.shards["s0"].read("x_t")[:4])
    assert np.array_equal(scope["delta_of_first_win"], shard.read("delta")[sides[0, 0]])
    assert scope["prompt_of_first_pair"] == shard.prompts()[shard.groups()[0]] == "a red cat"
    assert np.array_equal(wins, shard.read("x0")[sides[:, 0]])


def test_every_command_has_its_section_and_every_option_named_exists():
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert set(re.findall(r"^## (\w+)$", TEXT, flags=re.MULTILINE)) == commands
    for command, rest in re.findall(r"^    \$ inpo inspect (\w+) (.*)$", TEXT, flags=re.MULTILINE):
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
        for option in re.findall(r"--[a-z-]+", re.sub(r'".*?"', "", rest)):
            assert option in shown, (command, option)


def test_the_pictures_are_there_and_small():
    pictures = re.findall(r"\]\((images/[\w.-]+)\)", TEXT)
    assert len(pictures) == 6
    assert all((DOCS / picture).stat().st_size < 100_000 for picture in pictures)
