"""Every option, argument and setting that is a place, of every command, comes in one spelling: ~ is expanded, file: is
a path, blanks are refused."""

import os
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from inpo.cli import app
from inpo.common.cache.store import CacheStore
from inpo.common.errors import CacheMissing, UsageError
from inpo.common.options import Given, options
from inpo.common.paths import home, settled
from inpo.common.recipe import DataSection, ModelSection, Section, read_recipe, resolve
from inpo.evaluation.settings import EvaluateSettings
from inpo.precompute.settings import PrecomputeSettings
from inpo.train.settings import TrainSettings

SECTIONS: tuple[type[Section], ...] = (ModelSection, DataSection, PrecomputeSettings, TrainSettings, EvaluateSettings)
TEXTS = (
    "crop dtype engine extra format inverter labels lora_targets objective optimizer pair_id profile address "
    "sample_prompts schedule scheduler scorer scorers set_name shift split tracker vae_latent variant where "
    "license project push_to_hub batch_size repository run_name sweep_scorer agree "
    "revision resolution buckets columns pairs_from images"
).split()
"""Settings and options that are text and no place."""
SETTING_OF = {"model_config": "model_config_dir", "cache": "caches", "except_": "except_"}
"""Options that have another name than their setting."""


def parameters(application: typer.Typer = app) -> Iterator[tuple[str, str, Any]]:
    """(command, parameter, typer's description of it) for each parameter that holds text or a path."""
    for command in application.registered_commands:
        function: Callable[..., Any] = command.callback  # type: ignore[assignment]
        for name, hint in typing.get_type_hints(function, include_extras=True).items():
            if typing.get_origin(hint) is typing.Annotated and _is_text(hint.__origin__):
                info = hint.__metadata__[0]
                assert ("Path" in str(hint.__origin__)) == (info.parser is not None), (function.__name__, name)
                yield function.__name__, name, info
    for group in application.registered_groups:
        yield from parameters(group.typer_instance)  # type: ignore[arg-type]


def _is_text(annotation: object) -> bool:
    return "str" in str(annotation) or "Path" in str(annotation)


def expanded_settings() -> set[str]:
    """Names of all settings whose value comes back expanded."""
    found = set()
    for section in SECTIONS:
        for name, field in section.model_fields.items():
            for value in ("~/x", ("~/x",)):
                try:
                    made = getattr(section.model_validate({field.alias or name: value}), name)
                except ValueError:
                    continue
                if str(Path.home() / "x") in str(made):
                    found.add(name)
    return found


def test_every_option_that_is_a_place_expands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    settings = expanded_settings()
    found = list(parameters())
    assert len({command for command, _, _ in found}) >= 15
    for command, name, info in found:
        if name in TEXTS:
            assert info.callback is not home, (command, name)
        elif info.callback is None and info.parser is None:
            assert SETTING_OF.get(name, name) in settings, (command, name)
        else:
            read = info.callback or info.parser
            assert str(read("~/x")) == "/home/somebody/x", (command, name)
            for blank in ("", " "):  # Path("") is the working folder
                with pytest.raises((UsageError, typer.BadParameter), match="this is blank"):
                    read(blank)


def test_every_setting_that_is_text_is_a_place_or_known_not_to_be() -> None:
    texts = {name for section in SECTIONS for name, field in section.model_fields.items() if _is_text(field.annotation)}
    assert {"pairs", "cache", "model", "output", "prompts"} <= texts
    assert texts - expanded_settings() <= set(TEXTS)


def test_a_recipes_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    recipe = tmp_path / "r.toml"
    recipe.write_text('[data]\ncache = "~/c"\npairs = "file://~/p"\n[model]\nmodel = "~"\nvae = "./~"\n')
    sections = read_recipe(recipe)
    data = resolve(DataSection, "data", sections, {})
    assert (data.cache, data.pairs) == ("/home/somebody/c", "/home/somebody/p")
    model = resolve(ModelSection, "model", sections, {})
    assert (model.model, model.vae) == ("/home/somebody", "./~")
    with pytest.raises(UsageError, match="no home folder for ~nobody-of-this-name"):
        resolve(DataSection, "data", sections, {"cache": "~nobody-of-this-name/x"})


def test_what_is_no_home_stays_and_what_cannot_be_expanded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    for place in (
        "./~",
        "a/~/b",
        "s3://b/~",
        "x~",
        "-",
        "file:",
        "a/file:///b",
        "zip://a::file:///b",
        "owner/name:config",
    ):
        assert settled(place) == place
    assert home(None) is None
    assert settled(Path("~")) == Path("/home/somebody")
    with pytest.raises(UsageError, match="no home folder for ~nobody-of-this-name"):
        home("~nobody-of-this-name/x")


@pytest.mark.parametrize("name", ["pairs", "cache"])
def test_a_name_that_no_document_can_hold_is_refused(name: str) -> None:
    """A file system's names are bytes; manifests, commits and recipes are UTF-8."""
    place = os.fsdecode(b"/data/caf\xe9")
    with pytest.raises(UsageError, match="not UTF-8") as refused:
        resolve(DataSection, "data", {}, {name: place})
    assert refused.value.where == f"--{name}"
    with pytest.raises(UsageError, match="not UTF-8"):
        home(Path(place))


@pytest.mark.parametrize("address", ["s3://bucket/run", "gs://bucket/run", "hf://datasets/a/b", "https://host/run"])
def test_an_address_where_a_path_on_this_machine_is_needed_makes_no_folder_of_its_name(address: str) -> None:
    with pytest.raises(UsageError, match="this is an address"):
        resolve(TrainSettings, "train", {}, {"output": address})
    with pytest.raises(UsageError, match="this is an address"):
        home(Path(address))
    assert home(address) == address  # a text is a place anywhere
    assert home(Path("a:b/c")) == Path("a:b/c")


def test_a_value_of_another_kind_is_refused_in_words_of_toml() -> None:
    with pytest.raises(UsageError, match=r"(?s)Bad value for timestep_range.*expected: a list, in brackets"):
        resolve(PrecomputeSettings, "precompute", {"precompute": {"timestep_range": "10:20"}}, {})


def test_a_null_in_a_path_is_refused() -> None:
    with pytest.raises(UsageError, match="no null"):
        resolve(TrainSettings, "train", {}, {"only": "a\0b"})


@pytest.mark.parametrize("place", ["file:///a/b#%20", "file:/a/b#%20", "FILE:///a/b#%20", "/a/b#%20"])
def test_a_file_on_this_machine_has_one_spelling(place: str) -> None:
    data = resolve(DataSection, "data", {"data": {"pairs": place}}, {"cache": place})
    settings = resolve(TrainSettings, "train", {}, {"caches": [place]})
    with pytest.raises(CacheMissing) as missing:
        CacheStore(place)
    assert {data.cache, data.pairs, *settings.caches, home(place), str(missing.value.where)} == {"/a/b#%20"}


@pytest.mark.parametrize("place", ["", "  ", "\t\n", "file://", "file://a/b", "s3:/bucket/a"])
def test_what_names_no_place_is_refused(place: str) -> None:
    """As a path it would be the folder that is worked in, or make one here that is called s3:."""
    for section, name in ((DataSection, "cache"), (DataSection, "pairs"), (ModelSection, "model")):
        with pytest.raises(UsageError, match=f"Bad value for {name}"):
            resolve(section, "data", {}, {name: place})
    with pytest.raises(UsageError, match="Bad value for output"):
        resolve(TrainSettings, "train", {"train": {"output": place}}, {})
    with pytest.raises(UsageError, match="cannot be used"):
        home(place)
    with pytest.raises(UsageError, match="cannot be used"):
        CacheStore(place)


def test_a_blank_path_of_a_command_line_is_no_folder() -> None:
    made = typer.Typer()

    @made.command()
    @options(TrainSettings, only=("output",))
    def command(given: Given) -> None:
        resolve(TrainSettings, "train", {}, given[TrainSettings])

    assert CliRunner().invoke(made, ["--output", "."]).exit_code == 0
    refused = CliRunner().invoke(made, ["--output", ""]).exception
    assert isinstance(refused, UsageError)
    assert (refused.where, refused.got) == ("--output", "''")
