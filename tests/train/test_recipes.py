"""Recipes: what a run saves is one, and what the shipped ones say and advise is taken."""

import re
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from typer.testing import CliRunner

import inpo.train.run
from inpo.cli import app
from inpo.common.recipe import read_recipe, resolve, to_toml
from inpo.evaluation.settings import EvaluateSettings
from inpo.precompute.settings import PrecomputeSettings
from inpo.rounds.settings import RoundSettings, SampleSettings
from inpo.train.settings import TrainSettings

RECIPES = Path(__file__).parents[2] / "recipes"


def test_a_saved_configuration_is_a_recipe(tmp_path: Path) -> None:
    flags = {
        "output": tmp_path,
        "except": tmp_path / "list",
        "caches": ["a", "b"],
        "sample_prompts": ['a "b"'],
        "sample_every": 1,
    }
    settings = resolve(TrainSettings, "train", {}, flags)
    (tmp_path / "recipe.toml").write_text(to_toml({"train": settings}))
    assert resolve(TrainSettings, "train", read_recipe(tmp_path / "recipe.toml"), {}) == settings


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda recipe: recipe.stem)
def test_every_section_of_a_recipe_is_valid(recipe: Path) -> None:
    sections = read_recipe(recipe)
    kinds = {"precompute": PrecomputeSettings, "sample": SampleSettings, "evaluate": EvaluateSettings}
    for name, kind in kinds.items():
        resolve(kind, name, sections, {})
    trained, rounds = resolve(TrainSettings, "train", sections, {}), resolve(RoundSettings, "round", sections, {})
    assert (trained.output is None) == ("round" in sections)
    assert (rounds.output is None) == ("round" not in sections)


def _advised() -> list[str]:
    """Every command that trains in the comments of the recipes, and of the files beside them."""
    found: set[str] = set()
    for file in sorted(RECIPES.iterdir()):
        comments = "\n".join(line.lstrip("# ") for line in file.read_text().splitlines() if line.startswith("#"))
        found |= set(re.findall(r"\binpo (train --recipe recipes/.*)", comments.replace("\\\n", "")))
    return sorted(found)


@pytest.mark.parametrize("command", _advised())
def test_what_a_recipe_advises_is_not_refused(
    world: Any, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(RECIPES.parent)
    begun = []
    monkeypatch.setattr(inpo.train.run, "_train", lambda resolved, *_, **__: begun.append(resolved.settings) or True)
    here = ["--model", str(world.model.folder), "--cache", cache, "--output", str(tmp_path / "run")]
    done = CliRunner().invoke(app, [*command.split(), *here], catch_exceptions=False)
    assert done.exit_code == 0
    (settings,) = begun
    assert settings.lora_rank or settings.lora_alpha is None


def test_the_file_for_one_machine_is_one_that_accelerate_reads() -> None:
    config = load_config_from_file(str(RECIPES / "8gpu.yaml"))
    assert (config.distributed_type, config.num_processes, config.mixed_precision) == ("MULTI_GPU", 8, "no")
