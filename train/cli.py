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
) -> None:
    """Train from a cache: one network in memory, no reference model, no VAE, no text encoder.

    Run the same command again to resume from the last checkpoint.
    """
    from inpo.train.run import run_train

    flags = dict(given[TrainSettings])
    raise typer.Exit(run_train(recipe, given[ModelSection], flags.pop("caches", None), flags, resume=resume))


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
