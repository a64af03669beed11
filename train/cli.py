"""`inpo train` and `inpo export`."""

from pathlib import Path
from typing import Annotated

import typer

from inpo.common.choices import DtypeName
from inpo.common.options import Given, RecipeOption, options
from inpo.common.paths import home
from inpo.common.recipe import ModelSection
from inpo.train.settings import TrainSettings


@options(ModelSection, TrainSettings)
def train(
    given: Given,
    recipe: RecipeOption = None,
    resume: Annotated[str, typer.Option(help="auto, never, or a checkpoint folder.", callback=home)] = "auto",
    sweep: Annotated[
        Path | None,
        typer.Option(
            help="TOML file of several runs, trained one after another (docs/objectives.md).",
            show_default="one run",
            callback=home,
        ),
    ] = None,
    sweep_scorer: Annotated[
        list[str],
        typer.Option(
            help="Scorer of a sweep's last samples, by name, as in `inpo evaluate score`; repeatable.",
            show_default="none",
        ),
    ] = [],  # noqa: B006
) -> None:
    """Train from a cache: one network in memory, no reference model, no VAE, no text encoder.

    Run the same command again to resume from the last checkpoint.
    """
    from inpo.common.errors import UsageError
    from inpo.train.run import run_train

    flags = dict(given[TrainSettings])
    caches = flags.pop("caches", None)
    if sweep is None:
        if sweep_scorer:
            raise UsageError(
                "There is no sweep to score.", where="--sweep-scorer", fix="pass --sweep FILE, or leave it out"
            )
        raise typer.Exit(run_train(recipe, given[ModelSection], caches, flags, resume=resume))
    from inpo.train.sweep import run_sweep

    if resume not in ("auto", "never"):
        raise UsageError("A sweep has no one checkpoint.", where="--resume", expected="auto or never", got=resume)
    raise typer.Exit(run_sweep(sweep, recipe, given[ModelSection], caches, flags, scorers=sweep_scorer, resume=resume))


def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Output folder of a run, or a pipeline folder.", callback=home)
    ],
    single_file: Annotated[Path, typer.Option(help="The .safetensors file to write.", callback=home)],
    dtype: Annotated[DtypeName, typer.Option(help="Dtype of the weights.")] = "float16",
) -> None:
    """Write a trained pipeline as one file in the original Stable Diffusion layout, for the wider ecosystem."""
    from inpo.train.export import export_single_file

    print(export_single_file(run, single_file, dtype=dtype))
