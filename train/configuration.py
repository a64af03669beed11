"""What a run is asked for: its settings from recipe and flags, and the model and caches that they name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inpo.common.cache import Cache
from inpo.common.cache.buckets import open_caches
from inpo.common.errors import UsageError
from inpo.common.log import note
from inpo.common.models import Model
from inpo.common.recipe import DataSection, ModelSection, Section, read_recipe, refuse_idle, resolve, to_toml
from inpo.train.objectives import OBJECTIVES
from inpo.train.records import Needs
from inpo.train.requirements import check_installed, check_needs, check_objective, check_schedule
from inpo.train.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A run's configuration and what it names."""

    settings: TrainSettings
    output: Path
    model: Model
    given: Sequence[Sequence[Cache]]
    """Of each --cache: the one that is there, or those of its buckets."""
    sections: Mapping[str, Section]
    """[model] and [data]."""

    @property
    def caches(self) -> list[Cache]:
        return [cache for caches in self.given for cache in caches]

    @property
    def toml(self) -> str:
        return to_toml({**self.sections, "train": self.settings})

    def with_batch_size(self, pairs: int) -> "Resolved":
        """The same, where the batch size was to be found."""
        return replace(self, settings=self.settings.model_copy(update={"batch_size": pairs}))

    def check(self) -> Needs:
        """Refuse before anything is loaded what the settings ask of the installation, of each other and of the caches.
        Returns what is read."""
        check_installed(self.settings)
        # In a recipe too: what it says would not be made, and its line before the first step would say that it is.
        refuse_idle([self.settings], dict.fromkeys(("lora_alpha", "lora_targets", "warmup_steps"), True))
        check_objective(self.settings)
        check_schedule(self.settings)
        return check_needs(self.caches, OBJECTIVES[self.settings.objective])


def resolve_run(
    recipe: Path | None,
    model_flags: Mapping[str, Any],
    caches: list[str] | None,
    flags: Mapping[str, Any],
    *,
    may_idle: bool = False,
) -> Resolved:
    """A run's configuration from recipe and flags. Raises UsageError for what does not go together, and unless
    `may_idle` for a flag that does nothing."""
    sections = read_recipe(recipe)
    model_section = resolve(ModelSection, "model", sections, model_flags)
    data = resolve(DataSection, "data", sections, {"cache": caches[0]} if caches else {})
    # One cache is [data]'s; several are this run's own.
    flags = {**flags, "caches": caches and (caches if caches[1:] else [])}
    settings = resolve(TrainSettings, "train", sections, flags, may_idle=may_idle)
    settings = _without_turned_off(settings, sections.get("train", {}), flags)
    if settings.output is None:
        raise UsageError("No output given.", where="--output", fix="pass --output, or set output in [train]")
    locations = settings.caches or (data.need("cache"),)
    given = [open_caches(location, on_empty=_note_empty) for location in locations]
    _refuse_twice([cache for caches in given for cache in caches])
    return Resolved(
        settings=settings,
        output=settings.output,
        model=model_section.open(),
        given=given,
        sections={"model": model_section, "data": data},
    )


def _without_turned_off(settings: TrainSettings, recipe: Mapping[str, Any], flags: Mapping[str, Any]) -> TrainSettings:
    """Without what a recipe says of a thing that a flag turns off: the alpha of LoRA layers with --lora-rank 0."""
    given = {name: recipe[name] for name, value in flags.items() if value is not None and name in recipe}
    idle = settings.without_effect().keys() - settings.model_copy(update=given).without_effect().keys()
    return settings.model_copy(update={name: TrainSettings.model_fields[name].default for name in idle})


def _refuse_twice(caches: Sequence[Cache]) -> None:
    """Raise UsageError for a shard that two caches have: links, other addresses and copies have other locations, and
    no two shards were ever written as one attempt."""
    seen: dict[tuple[str, str], Cache] = {}
    for cache in caches:
        for shard in cache:
            first = seen.setdefault((shard.name, shard.commit.attempt), cache)
            if first is not cache:
                raise UsageError(
                    "A cache is given twice: its pairs would count twice.",
                    where="--cache",
                    expected="each cache once, under one of its names",
                    got=f"shard {shard.name} in {first.location} and in {cache.location}",
                    fix="leave one out",
                )


def _note_empty(bucket: str) -> None:
    note(
        f"{bucket} has no committed pair and is left out; if its precompute was cut short, run the same command again "
        f"(`inpo inspect summary {bucket}` shows what was skipped)"
    )
