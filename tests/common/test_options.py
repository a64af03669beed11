"""Options are told once: each field has one, its help is the field's text, and settings write their own flags."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BeforeValidator
from typer.testing import CliRunner

from inpo.cli import app
from inpo.common.choices import InverterName
from inpo.common.errors import command
from inpo.common.inversion import INVERTERS
from inpo.common.options import Given, flags, options
from inpo.common.recipe import DataSection, ModelSection, Section, option_name, resolve
from inpo.evaluation.settings import EvaluateSettings
from inpo.precompute.settings import PrecomputeSettings, RayOptions
from inpo.rounds.settings import RoundSettings, SampleSettings
from inpo.train.objectives import OBJECTIVES
from inpo.train.settings import ObjectiveName, TrainSettings

SECTIONS = (ModelSection, DataSection, PrecomputeSettings, RayOptions, TrainSettings, EvaluateSettings)
RECIPE_ONLY = {"crop"}
"""Fields that no command line can give."""
COMMANDS = {
    "precompute": (ModelSection, DataSection, PrecomputeSettings, RayOptions),
    "plan": (ModelSection, DataSection, PrecomputeSettings, RayOptions),
    "train": (ModelSection, TrainSettings),
    "sample": (ModelSection, SampleSettings, RayOptions),
    "round": (RoundSettings,),
    "evaluate generate": (ModelSection, EvaluateSettings),
    "inspect drift": (ModelSection,),
}


class Words(Section):
    """Every kind of field."""

    count: int = 10
    """How many; 0: none."""
    share: float = 0.02
    """A share."""
    name: str | None = None
    """A name, even [bold]; unset: the first."""
    file: Path | None = None
    """A file."""
    on: bool = True
    """A switch."""
    kind: Literal["one", "two"] = "one"
    """A kind."""
    span: tuple[int, int] | None = None
    """A span."""
    several: tuple[str, ...] = ()
    """Several."""
    hidden: int = 0
    """Recipe only."""

    recipe_only = frozenset({"hidden"})


def shown(command: str) -> str:
    result = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"})
    assert result.exit_code == 0, result.output
    options_on = result.output[result.output.index("─ Options ─") :]
    return " ".join(options_on.replace("│", " ").split())


@cache
def taken(kind: type[Section]) -> tuple[typer.Typer, list[Any]]:
    """A command with this section's options, and the list that it puts what it was given into."""
    caught: list[Any] = []
    made = typer.Typer()

    @made.command()
    @options(kind)
    def command(given: Given) -> None:
        caught.append(given[kind])

    return made, caught


def parsed(kind: type[Section], words: list[str], recipe: dict[str, Any] | None = None) -> Section:
    """What a command with this section's options makes of `words`."""
    made, caught = taken(kind)
    caught.clear()
    result = CliRunner().invoke(made, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return resolve(kind, "section", {"section": recipe or {}}, caught[0])


@pytest.mark.parametrize(("command", "sections"), COMMANDS.items())
def test_every_field_has_an_option_whose_help_is_its_text_with_default_and_choices(
    command: str, sections: tuple[type[Section], ...]
) -> None:
    text = shown(command)
    for section in sections:
        left_out = section.recipe_only | ({"scorers"} if command == "evaluate generate" else set())
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name} says nothing"
            option = option_name(name, field)
            assert (f" {option} " in text) == (name not in left_out), option
            if name in left_out:
                continue
            wording = " ".join(field.description.split()).partition("; unset: ")[0].rstrip(".")
            here = text[text.index(f" {option} ") :]
            assert wording in here[: len(wording) + 120], option
            assert "<>" not in here[: len(wording) + 120], f"{option} shows no type"
            default = here[here.index(wording) :].partition("[default: ")
            assert " --" not in default[0], f"{option} shows no default"
            if isinstance(field.default, int | float | str) and not isinstance(field.default, bool):
                assert default[2].startswith(f"{field.default}]"), option
            for choice in get_args(field.annotation) if get_origin(field.annotation) is Literal else ():
                assert choice in default[0], option


def test_every_default_of_none_says_what_it_means_or_is_none() -> None:
    text = shown("precompute")
    assert "[default: (3 for ab2 and fireflow, else 0)]" in text
    assert text.count("[default: (none)]") < text.count("[default: ")


def test_the_closed_sets_are_those_of_the_code() -> None:
    assert set(get_args(InverterName)) == set(INVERTERS)
    assert set(get_args(ObjectiveName)) == set(OBJECTIVES)


def test_plan_takes_all_that_precompute_takes() -> None:
    words = {word for word in shown("precompute").split() if word.startswith("--")} - {"--dry-run"}
    assert words <= set(shown("plan").split())


def strategy(annotation: Any, constraints: list[Any]) -> st.SearchStrategy[Any]:
    """Values of a field's type, within its bounds."""
    bounds = {
        name: getattr(each, name) for each in constraints for name in ("ge", "gt", "le", "lt") if hasattr(each, name)
    }
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if any(isinstance(each, BeforeValidator) for each in constraints):
        return st.one_of(st.just("auto"), st.integers(1, 2**40))
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return st.integers(-(2**40) if low is None else low, 2**40 if high is None else high - ("lt" in bounds))
    if annotation is float:
        return st.floats(
            0.0 if low is None else low,
            0.99 if high is None else high,
            exclude_min="gt" in bounds,
            exclude_max="lt" in bounds,
        )
    if annotation is Path:
        return text_strategy().map(Path)
    if get_origin(annotation) is tuple:
        inner = get_args(annotation)
        if inner[-1] is Ellipsis:
            return st.lists(strategy(inner[0], []), min_size=1, max_size=3).map(tuple)
        return st.tuples(*(strategy(each, []) for each in inner))
    return text_strategy()


def text_strategy() -> st.SearchStrategy[str]:
    text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0~"), min_size=1, max_size=12)
    return text.filter(lambda each: each.strip() and ":/" not in each)  # blanks and addresses are no paths


WORDS_OR_NUMBERS = {
    "shift": st.one_of(st.sampled_from(["auto", "none"]), st.floats(1e-6, 1e5).map(str)),
    "timestep_range": st.sampled_from([(0, 1), (3, 2**40)]),
    "resolution": st.sampled_from(["512", "96x64"]),
    "buckets": st.sampled_from(["sdxl", "5"]),
    "columns": st.sampled_from([{"win": "a b", "lose": "x"}, {"prompt": "=", "votes_win": "Ja!"}]),
}
"""Fields whose text follows a rule of their own."""


@st.composite
def values_of(draw: st.DrawFn, kind: type[Section]) -> dict[str, Any]:
    """Values for some fields of a section."""
    values = {}
    for name, field in kind.model_fields.items():
        if name in kind.recipe_only or draw(st.booleans()):
            continue
        inner = [each for each in get_args(field.annotation) if each is not type(None)]
        is_optional = type(None) in get_args(field.annotation)
        own = WORDS_OR_NUMBERS.get(name)
        plain = strategy(inner[0] if is_optional else field.annotation, field.metadata)
        values[field.alias or name] = draw(plain if own is None else own)
    return values


@pytest.mark.parametrize("kind", [*SECTIONS, Words])
@settings(max_examples=30)
@given(data=st.data())
def test_flags_give_the_settings_again_through_a_shell(kind: type[Section], data: st.DataObject) -> None:
    # What does nothing as the others stand is refused as a flag (tests/common/test_recipe.py).
    chosen = kind.model_validate(data.draw(values_of(kind))).effective()
    assert parsed(kind, shlex.split(command(*flags(chosen)))[1:]) == chosen


def test_flags_are_what_is_not_the_default() -> None:
    assert flags(Words()) == []
    chosen = Words(count=0, share=1e-7, on=False, kind="two", span=(1, 2), several=("a", "b c"), hidden=3)
    assert flags(chosen) == [
        *("--count", "0", "--share", "1e-07", "--no-on", "--kind", "two", "--span", "1", "2"),
        *("--several", "a", "--several", "b c"),
    ]


def test_a_flag_wins_over_the_recipe_even_with_the_default_and_no_flag_leaves_it() -> None:
    recipe = {"count": 6, "on": False, "several": ["r"], "name": "r"}
    assert parsed(Words, [], recipe) == Words(**recipe)
    given = parsed(Words, ["--count", "10", "--on", "--name", ""], recipe)
    assert (given.count, given.on, given.name, given.several) == (10, True, "", ("r",))


@pytest.mark.parametrize(
    ("command", "first", "others"),
    [
        ("train", ["--model", "--cache", "--output", "--objective", "--steps"], ["--adam-eps", "--variant"]),
        ("precompute", ["--model", "--pairs", "--cache", "--inverter"], ["--tolerance", "--allow-remote"]),
        ("evaluate generate", ["--model", "--prompts", "--guidance"], ["--compile", "--inpaint"]),
    ],
)
def test_about_a_dozen_options_come_first(command: str, first: list[str], others: list[str]) -> None:
    text = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*command.split(), "--help"]).output
    panels = re.split(r"╭─ (?=[A-Z])", text)
    used = next(panel for panel in panels if panel.startswith("Most used"))
    options = re.findall(r"^│ +(--[a-z-]+)", used, flags=re.MULTILINE)
    assert {*first} <= {*options}
    assert not {*others} & {*options}
    assert 7 <= len(options) <= 14
    own = [panel for panel in panels if re.match("Options|Arguments", panel)]
    assert panels.index(used) == len(own) + 1


def commands(group: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(words, command) of each command, however deep."""
    for name, each in group.commands.items():
        yield from commands(each, (*words, name)) if hasattr(each, "commands") else [((*words, name), each)]


def test_help_cuts_no_name_and_no_word_on_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)  # asked of the environment once, by whoever came first
    for words, each in commands(typer.main.get_command(app)):
        text = CliRunner().invoke(app, [*words, "--help"]).output
        names = {name for option in each.params for name in (*option.opts, *option.secondary_opts) if name[0] == "-"}
        assert names <= set(text.split()), words
        assert "…" not in text, words
        assert max(map(len, text.splitlines())) <= 80, words


def test_help_eats_no_word_of_a_command() -> None:
    """Brackets in a docstring would be taken for markup."""
    for words, each in commands(typer.main.get_command(app)):
        text = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*words, "--help"]).output
        said = " ".join((each.callback.__doc__ or "").partition("\n\n")[0].split())
        assert said, words
        assert said in " ".join(text.split()), words
