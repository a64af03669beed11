"""A sampling run from resolved settings to its exit code."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inpo.common.cache import CacheWriter, open_cache
from inpo.common.cache.store import digest
from inpo.common.errors import DataError, UsageError
from inpo.common.pairs import PairSource
from inpo.common.recipe import DataSection, ModelSection, read_recipe, resolve
from inpo.common.scorer import load_scorer, scorer_names
from inpo.evaluation.prompts import read_prompts
from inpo.precompute.configuration import Configuration, check_ray
from inpo.precompute.run import run_work
from inpo.precompute.settings import RayOptions
from inpo.precompute.tasks import ShardTask
from inpo.precompute.works import Work
from inpo.rounds.pictures import SampleTars
from inpo.rounds.prompts import prompt_source
from inpo.rounds.settings import SampleSettings
from inpo.rounds.worker import SAMPLES


@dataclass(frozen=True, kw_only=True)
class SampleWork(Work):
    """A cache of the model's own samples."""

    identity: Mapping[str, Any]
    """What the images depend on beside the manifest."""

    @property
    def why_no_pair(self) -> str:
        return "raise --per-prompt, lower --gap, or choose another --scorer"

    def foreign(self, committed: set[str]) -> dict[str, DataError]:
        """None: the prompts are compared with those of the first run in any case."""
        return {}

    def claim(self, writer: CacheWriter, committed: set[str]) -> None:
        SampleTars(writer.store).claim(self.identity, has_shards=bool(committed))

    def warnings(self, writer: CacheWriter, committed: set[str]) -> list[str]:
        """Shards whose images are lost."""
        cache = open_cache(self.cache, allow_empty=True)
        tars = SampleTars(writer.store)
        where, lost = tars.store.location, tars.recover(cache.commits)
        return [f"the images of committed shard {name} are not in {where}; its records are whole" for name in lost]


def configure_sample(
    recipe: Path | None, model_flags: Mapping[str, Any], data_flags: Mapping[str, Any], flags: Mapping[str, Any]
) -> Configuration:
    """Flags win over the recipe, the recipe over defaults. Raises UsageError for a bad value of any."""
    sections = read_recipe(recipe)
    return Configuration(
        model_section=resolve(ModelSection, "model", sections, model_flags),
        data=resolve(DataSection, "data", sections, data_flags),
        settings=resolve(SampleSettings, "sample", sections, flags),
        section="sample",
    )


def run_sample(resolved: Configuration, recipe: Path | None, *, ray_options: RayOptions, dry_run: bool) -> int:
    """Sample, or only say what it would cost. Returns the exit code, as precompute's; 1 too if no two images of any
    prompt have scores that differ."""
    settings = resolved.settings
    assert isinstance(settings, SampleSettings)
    resolved.data.need("cache")
    check_ray(settings, ray_options)
    source, identity = sample_source(settings)
    model = resolved.model_section.open()
    tasks = [
        ShardTask(name=shard.name, location=source.place, input_shard=shard, start=0, stop=shard.num_rows)
        for shard in source.shards
    ]
    work = SampleWork(
        resolved=resolved,
        source=source,
        tasks=tasks,
        images=SAMPLES,
        calls_per_image=settings.calls_per_image,
        identity=identity,
    )
    code = run_work(work, model, [], recipe, ray_options=ray_options, dry_run=dry_run)
    return 1 if code is None else code


def sample_source(settings: SampleSettings) -> tuple[PairSource, dict[str, Any]]:
    """(the prompts in shards, what the images depend on beside the manifest).

    Raises UsageError where prompts or scorer are not given, DataError for prompts that cannot be read.
    """
    for value, option, what in (
        (settings.prompts, "--prompts", "prompts"),
        (settings.scorer, "--scorer", f"scorer: {', '.join(scorer_names())}"),
    ):
        if value is None:
            raise UsageError(
                f"No {option.removeprefix('--')} given.",
                where=option,
                expected=what,
                fix=f"pass {option}, or set it in [sample] of the recipe",
            )
    assert settings.prompts is not None
    assert settings.scorer is not None
    load_scorer(settings.scorer)
    prompts = read_prompts(settings.prompts)
    source = prompt_source(
        settings.prompts,
        prompts,
        per_prompt=settings.per_prompt,
        pairs_per_prompt=settings.pairs_per_prompt,
        limit=settings.limit,
    )
    identity = {
        "prompts": digest("\0".join(prompts).encode()),
        "num_prompts": len(prompts),
        "per_prompt": settings.per_prompt,
        "scorer": settings.scorer,
        "pairs_from": settings.pairs_from,
        "gap": settings.gap,
    }
    return source, identity
