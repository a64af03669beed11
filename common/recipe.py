"""Recipes: TOML files with sections [model] [data] [precompute] [sample] [train] [evaluate] [round], parsed into frozen
models.

Each stage owns the model of its own section; [model] and [data] are shared and live here. A flag on the command line
wins over the recipe, the recipe over the default. The resolved configuration is saved beside the output; what differs
from the defaults is printed.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)
from pydantic.fields import FieldInfo

from inpo.common.choices import PairsFrom
from inpo.common.errors import UsageError
from inpo.common.paths import settled
from inpo.common.printable import shown
from inpo.common.text import read_text

if TYPE_CHECKING:
    import inpo.common.models
    import inpo.common.pairs

SECTIONS = ("model", "data", "precompute", "sample", "train", "evaluate", "round")
_NAMED = ", ".join(f"[{name}]" for name in SECTIONS)
_OPTIONS = {
    "model_config_dir": "--model-config",
    "caches": "--cache",
    "scorers": "--scorer",
    "address": "--ray-address",
    "workers": "--ray-workers",
}
"""Options that are not their setting's name with dashes."""
_TOML_WORDS = {"tuple_type": "a list, in brackets"}
"""{type of an error: what pydantic calls by a word of Python's}."""

Location = Annotated[str, AfterValidator(settled), PlainSerializer(shown, return_type=str, when_used="json")]
"""A path, an address or a hub id. Written down, an address is without its secrets."""


def _columns(value: object) -> object:
    from inpo.common.pairs.columns import parse_columns

    return parse_columns(value)


def _text_first(value: object, validate: ValidatorFunctionWrapHandler) -> object:
    # A Path would have made a dot of a blank, and one slash of an address's two.
    return validate(settled(value) if isinstance(value, str) else value)


ColumnNames = Annotated[dict[str, str], BeforeValidator(_columns)]
LocalPath = Annotated[Path, AfterValidator(settled), WrapValidator(_text_first)]


class Section(BaseModel):
    """Base of every section: frozen; unknown keys, infinity and NaN refused.

    The text below a field is its only wording: command lines show it too (common/options.py).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
    panels: ClassVar[Mapping[str, str]] = {}
    """{first field of a group: the group's heading in --help}."""
    most_used: ClassVar[frozenset[str]] = frozenset()
    """Fields that --help shows before all groups: about a dozen of a command's."""
    recipe_only: ClassVar[frozenset[str]] = frozenset()
    """Fields without an option."""
    bound: ClassVar[Mapping[str, str]] = {}
    """{field: the one whose value it belongs to}: a recipe's does not go with another value that a flag gives."""

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        """`steps = true` is a slip, and would be one step."""
        kinds = str(cls.model_fields[info.field_name or ""].annotation)
        parts = value if isinstance(value, list | tuple) else [value]
        if "bool" not in kinds and any(isinstance(part, bool) for part in parts):
            raise ValueError("a number or a text is expected, not true or false")
        return value

    def without_effect(self) -> Mapping[str, str]:
        """{setting that does nothing as the others stand: what it would need}; whether it was given is not asked."""
        return {}

    def effective(self) -> Self:
        """The same, with what does nothing at its default."""
        fields = type(self).model_fields
        return self.model_copy(update={name: fields[name].default for name in self.without_effect()})


def option_name(setting: str, field: FieldInfo | None = None) -> str:
    """The option of a setting, for instance --model-config."""
    return _OPTIONS.get(setting, f"--{((field and field.alias) or setting).replace('_', '-')}")


class ModelSection(Section):
    """[model]: which model is inverted, trained and compared against."""

    panels: ClassVar = {"model": "Model"}
    most_used: ClassVar = frozenset({"model"})
    bound: ClassVar = {"revision": "model"}

    model: Location | None = None
    """A pipeline folder, a hub id, or one .safetensors file."""
    variant: str | None = None
    """Weights variant, for instance fp16; unset: the plain weights."""
    revision: str | None = None
    """Of a hub id: a branch, a tag or a commit; unset: its main branch."""
    model_config_dir: Location | None = None
    """For a single file: the pipeline folder that has its configurations; unset: found by what its weights look like.
    """
    vae: Location | None = None
    """A replacement VAE: its folder or hub id; unset: the pipeline's own."""

    def open(self) -> "inpo.common.models.Model":
        # diffusers takes seconds to import, and most commands that read a recipe open no model.
        from inpo.common.models import open_model

        if self.model is None:
            raise UsageError(
                "No model given.", where="--model", fix="pass --model, or set model in [model] of the recipe"
            )
        return open_model(
            self.model, variant=self.variant, model_config=self.model_config_dir, vae=self.vae, revision=self.revision
        )


class DataSection(Section):
    """[data]: where the pairs come from and where the cache lies."""

    panels: ClassVar = {"pairs": "Data"}
    most_used: ClassVar = frozenset({"pairs", "columns", "cache"})

    pairs: Location | None = None
    """Where the pairs are: tars (file, folder, or a pattern such as pairs-{0000..0003}.tar), parquet files, or a folder
    with pairs.jsonl, .json, .csv or .tsv; a local path, a URL, or a data set of the hub as owner/name, which may have
    :config, @revision and /split behind it."""
    columns: ColumnNames | None = None
    """Which column is what, as ROLE=COLUMN,ROLE=COLUMN, for instance win=good,lose=bad; `inpo data columns` shows what
    is there; unset: those of known names."""
    pairs_from: PairsFrom = "all"
    """What of a ranking is compared: every two images, neighbours in its order, or its two ends."""
    allow_remote: bool = False
    """A list of pairs may name images outside its own folder: elsewhere on this machine, or on other hosts."""
    cache: Location | None = None
    """The cache: a folder, or s3:// or gs://."""

    def open(self, *, with_noise: bool = False) -> "inpo.common.pairs.PairSource":
        """The pair source, and if asked for with the images' own noise. Raises as `open_source` does."""
        from inpo.common.pairs import open_source  # Pillow and numpy, which most commands do without

        return open_source(
            self.need("pairs"),
            columns=self.columns,
            pairs_from=self.pairs_from,
            allow_remote=self.allow_remote,
            with_noise=with_noise,
        )

    def need(self, name: str) -> str:
        """The value of `name`, or UsageError saying how to give it."""
        value: str | None = getattr(self, name)
        if value is None:
            raise UsageError(
                f"No {name} given.", where=f"--{name}", fix=f"pass --{name}, or set {name} in [data] of the recipe"
            )
        return value


SectionType = TypeVar("SectionType", bound=Section)


class Recipe(dict[str, dict[str, Any]]):
    """A recipe's sections as plain dicts, and the file they come from, which messages name."""

    path: Path | None = None


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {file.stem: file for file in sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))}


def read_recipe(path: Path | None) -> Recipe:
    """The recipe's sections; none without a recipe. A name without a file of that name is a shipped recipe's.

    Raises UsageError for a bad file or section.
    """
    if path is None:
        return Recipe()
    if not path.is_file():
        path = shipped_recipes().get(str(path), path)
    fix = f"check --recipe: a TOML file, or the name of a shipped recipe ({', '.join(shipped_recipes())})"
    text = read_text(path, what="The recipe cannot be read.", error=UsageError, fix=fix)
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError("The recipe is not valid TOML.", where=path, got=str(error), fix="correct that line") from None
    for name, section in document.items():
        if not isinstance(section, dict):
            raise UsageError(
                f"The setting {name!r} stands outside the recipe's sections.",
                where=path,
                expected=f"every setting below one of {_NAMED}",
                got=f"{name} = {section!r}",
                fix="move it below its section's name",
            )
        if name not in SECTIONS:
            close = get_close_matches(name, SECTIONS, n=1)
            raise UsageError(
                f"Unknown section [{name}] in the recipe.",
                where=path,
                expected=_NAMED,
                got=f"[{name}]",
                fix=f"did you mean [{close[0]}]?" if close else "rename it",
            )
    recipe = Recipe(document)
    recipe.path = path
    return recipe


def resolve(
    kind: type[SectionType],
    section: str,
    recipe: Mapping[str, Mapping[str, Any]],
    flags: Mapping[str, Any],
    *,
    may_idle: bool = False,
) -> SectionType:
    """One section's settings: defaults, then the recipe's values, then every flag that is not None.

    Raises UsageError for a bad value, and unless `may_idle` for a flag that does nothing.
    """
    told, given = recipe.get(section, {}), {name: value for name, value in flags.items() if value is not None}
    dropped = {name for name, owner in kind.bound.items() if owner in given and given[owner] != told.get(owner)}
    values = {**{name: value for name, value in told.items() if name not in dropped}, **given}
    try:
        settings = kind.model_validate(values)
        if not may_idle:
            refuse_idle([settings], flags)
        return settings
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or section
        file = getattr(recipe, "path", None) or "the recipe"
        if first["type"] == "extra_forbidden":
            known = [field.alias or each for each, field in kind.model_fields.items()]
            close = get_close_matches(name, known, n=1)
            raise UsageError(
                f"Unknown setting {name!r} in [{section}].",
                where=f"[{section}] of {file}",
                expected=", ".join(known),
                got=name,
                fix=f"did you mean {close[0]}?" if close else "correct the name",
            ) from None
        setting = str(first["loc"][0]) if first["loc"] else section
        is_flag = flags.get(setting) is not None
        # pydantic words a range as a sentence, our own checks say what there is instead.
        rule = first["msg"].removeprefix("Input should be ")
        is_range = rule != first["msg"]
        rule = _TOML_WORDS.get(first["type"], rule)
        raise UsageError(
            f"Bad value for {name}." if is_range else f"Bad value for {name}: {rule.removeprefix('Value error, ')}.",
            where=option_name(setting) if is_flag else f"[{section}] of {file}",
            expected=rule if is_range else None,
            got=repr(first.get("input")),
            fix="correct the value; --help says what each option means",
        ) from None


def refuse_idle(several: Sequence[Section], flags: Mapping[str, Any]) -> None:
    """Raise UsageError for the first flag, not its default, that does nothing in any of several settings of one kind. A
    recipe may have it, for other flags."""
    idle = [settings.without_effect() for settings in several]
    for name, needed in idle[0].items():
        field, value = type(several[0]).model_fields[name], getattr(several[0], name)
        if all(name in each for each in idle) and flags.get(name) is not None and value != field.default:
            option = option_name(name, field)
            raise UsageError(
                f"{option} does nothing here.",
                where=option,
                expected=needed,
                got=value,
                fix="leave it out, or change that",
            )


_DEFAULTS = "# defaults:"


def to_toml(sections: Mapping[str, BaseModel], *, differing: bool = False) -> str:
    """The resolved configuration as a recipe that would reproduce it: in each section what is not the default, a
    comment, and the defaults; unset values are left out. `differing`: without the defaults, for the screen.
    """
    lines: list[str] = []
    for name, section in sections.items():
        values = section.model_dump(mode="json", by_alias=True, exclude_none=True)
        chosen = section.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)
        lines += [f"[{name}]", *(f"{key} = {_toml_value(value)}" for key, value in chosen.items())]
        defaults = [] if differing else [f"{key} = {_toml_value(values[key])}" for key in values if key not in chosen]
        lines += [_DEFAULTS, *defaults, ""] if defaults else [""]
    return "\n".join(lines)


def split_toml(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what differs from the defaults, the defaults), by section, of a text that `to_toml` wrote: a setting is a line
    there. Raises tomllib.TOMLDecodeError for what is no TOML, and where a setting of another text takes more lines."""
    chosen: list[str] = []
    defaults: list[str] = []
    part = chosen
    for line in text.split("\n"):
        if line.startswith("["):
            chosen.append(line)
            defaults.append(line)
            part = chosen
        elif line == _DEFAULTS:
            part = defaults
        else:
            part.append(line)
    return tomllib.loads("\n".join(chosen)), tomllib.loads("\n".join(defaults))


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML wants escaped too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(inner) for inner in value) + "]"
    return repr(value)
