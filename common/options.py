"""Command-line options told once: made from the fields of the settings, and written back from their values.

    @options(ModelSection, TrainSettings)
    def train(given: Given, *, resume: ...) -> None:

is a Typer command with an option for every field. A field's text is its help; "; unset: ..." at the end of the text
says what a default of None means, and is shown as the default.
"""

import inspect
import types
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from inpo.common.paths import local_path
from inpo.common.recipe import Section, option_name

Given = Mapping[type[Section], dict[str, Any]]
"""{section: {setting: value}} of what stood on the command line; nothing else, so that the recipe keeps its say."""


def path_option(*names: str, help: str, show_default: str | bool = True) -> Any:
    """typer.Option for a path on this machine."""
    return typer.Option(*names, help=help, show_default=show_default, parser=local_path, metavar="<path>")


RecipeOption = Annotated[Path | None, path_option(help="TOML recipe; flags win over it.", show_default="none")]

_MOST_USED = "Most used"


def options(
    *sections: type[Section], only: Collection[str] = (), without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make `body(given, **its own parameters)` a command with an option for each field of `sections`.

    Args:
        only: the fields that become options; empty: all that a command line can have.
        without: fields that do not.
    """
    chosen = {
        section: [name for name in fields_with_option(section) if (not only or name in only) and name not in without]
        for section in sections
    }

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        @wraps(body)
        def run(context: Any, **values: Any) -> None:
            given: dict[type[Section], dict[str, Any]] = {}
            for section, names in chosen.items():
                asked = {name: values.pop(name) for name in names}
                given[section] = {
                    section.model_fields[name].alias or name: value
                    for name, value in asked.items()
                    if _is_given(context, name)
                }
            body(given, **values)

        own = list(inspect.signature(body, eval_str=True).parameters.values())[1:]
        made = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for section, names in chosen.items()
            for name in names
            for annotation, default in [_parameter(section, name)]
        ]
        context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
        signature = inspect.Signature([context, *parameters, *made])
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in signature.parameters.values()}
        return run

    return decorate


def fields_with_option(section: type[Section]) -> list[str]:
    """The names of a section's fields that have an option, in its order."""
    return [name for name in section.model_fields if name not in section.recipe_only]


def flags(*sections: Section) -> list[str]:
    """The arguments that give these settings: whatever is not the default. `options` reads them back."""
    words: list[str] = []
    for section in sections:
        for name in fields_with_option(type(section)):
            field, value = type(section).model_fields[name], getattr(section, name)
            if value == field.default:
                continue
            if _reader(field) is not None:
                value = section.model_dump(mode="json", include={name})[name]
            option = option_name(name, field)
            if isinstance(value, bool):
                words.append(option if value else f"--no-{option.removeprefix('--')}")
            elif _is_list(_bare(field)):
                words += [word for each in value for word in (option, _word(each))]
            else:
                words += [option, *map(_word, value if isinstance(value, tuple) else (value,))]
    return words


def _word(value: object) -> str:
    """A value as one would type it, with all its digits."""
    if isinstance(value, dict):
        return ",".join(f"{name}={each}" for name, each in value.items())
    short = f"{value:g}" if isinstance(value, float) else ""
    return short if short and float(short) == value else str(value)


def help_text(section: type[Section], name: str) -> str:
    """A field's text, for the command line; "unset: ..." is left out of it."""
    text, _ = _text(section.model_fields[name])
    return text.replace("[", "\\[")  # rich would take "[evaluate]" for markup


def _parameter(section: type[Section], name: str) -> tuple[Any, Any]:
    """Annotation and default of the Typer parameter for a field."""
    field = section.model_fields[name]
    kind, default = _bare(field), field.default
    text, (_, unset) = help_text(section, name), _text(field)
    option, metavar = option_name(name, field), None
    shown: bool | str = unset if default is None else True
    if get_origin(kind) is dict:
        kind, metavar = str, "<role=column,...>"
    if kind is Path:  # the settings make one of the text: a Path would take a blank for the working folder
        kind, metavar = str, "<path>"
    if kind is bool:
        shown = "on" if default else "off"
    inner = _plain(get_args(kind)[0]) if _is_list(kind) else kind
    if get_origin(inner) is Literal:
        text, metavar = f"{text} ({', '.join(get_args(inner))})", "<name>"
        if inner is not kind:  # Typer has no lists of choices; the settings check them
            inner = str
    if _is_list(kind):
        kind, default = list[inner], list(default)
        metavar, shown = metavar or f"<{inner.__name__}>", shown if default else unset
    elif get_origin(kind) is tuple:
        metavar = " ".join(f"<{each.__name__}>" for each in get_args(kind))
    reader = _reader(field)
    if reader is not None:
        kind, default = str, default if default is None else str(default)
        told = get_args(reader.json_schema_input_type)  # none of a reader of plain text
        words = [each.__name__ if isinstance(each, type) else get_args(each)[0] for each in told]
        metavar = f"<{'|'.join(words)}>" if words else None
    names = (f"{option}/--no-{option.removeprefix('--')}",) if kind is bool else (option,)
    panel = _panel(section, name)
    made = typer.Option(*names, help=text, show_default=shown, metavar=metavar, rich_help_panel=panel)
    return Annotated[kind | None if default is None else kind, made], default


def _is_given(context: Any, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _text(field: FieldInfo) -> tuple[str, str]:
    """(what a field is, what its default of None means)."""
    text, _, unset = " ".join((field.description or "").split()).partition("; unset: ")
    return text.rstrip("."), unset.rstrip(".") or "none"


def _panel(section: type[Section], name: str) -> str | None:
    """The heading of the last group that begins at this field or before it, or that of the options used most."""
    if name in section.most_used:
        return _MOST_USED
    panel = None
    for each in section.model_fields:
        panel = section.panels.get(each, panel)
        if each == name:
            break
    return panel


def _bare(field: FieldInfo) -> Any:
    """The field's type, without `| None`."""
    kind = field.annotation
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(each for each in get_args(kind) if each is not type(None))
    return _plain(kind)


def _plain(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _reader(field: FieldInfo) -> BeforeValidator | None:
    """What reads a field whose words on the command line are not its values."""
    return next((each for each in field.metadata if isinstance(each, BeforeValidator)), None)


def _is_list(kind: Any) -> bool:
    return get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis
