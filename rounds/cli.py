"""`inpo sample` and `inpo round`."""

from typing import Annotated

import typer

from inpo.common.options import Given, RecipeOption, help_text, options
from inpo.common.paths import home
from inpo.common.recipe import DataSection, ModelSection, resolve
from inpo.precompute.cli import stoppable
from inpo.precompute.settings import RayOptions
from inpo.rounds.settings import RoundSettings, SampleSettings


@options(ModelSection, SampleSettings, RayOptions)
def sample(
    given: Given,
    cache: Annotated[
        str | None, typer.Option(help=help_text(DataSection, "cache"), show_default="none", callback=home)
    ] = None,
    recipe: RecipeOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print configuration and plan, then stop.", show_default="off")
    ] = False,
) -> None:
    """Make images with the model, rank them by a scorer, and write a cache from the sampler's own path.

    Run the same command again to resume: committed shards are never made twice.
    """
    from inpo.rounds.sample import configure_sample, run_sample

    resolved = configure_sample(recipe, given[ModelSection], {"cache": cache}, given[SampleSettings])
    ray_options = resolve(RayOptions, "ray", {}, given[RayOptions])
    raise typer.Exit(stoppable(lambda: run_sample(resolved, recipe, ray_options=ray_options, dry_run=dry_run)))


@options(RoundSettings)
def round_command(given: Given, recipe: RecipeOption = None) -> None:
    """Sample, train and evaluate on held-out prompts, again and again, each time from the model of the round before.

    Run the same command again to resume, or with more --rounds to go on.
    """
    from inpo.common.processes import leave
    from inpo.rounds.round import resolve_rounds, run_rounds

    raise typer.Exit(stoppable(lambda: leave(run_rounds(resolve_rounds(recipe, given[RoundSettings])))))
