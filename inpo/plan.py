"""`inpo plan`: what a recipe's two stages would cost."""

from typing import Annotated

import typer

from inpo.common.options import Given, RecipeOption, options
from inpo.common.recipe import DataSection, ModelSection, resolve
from inpo.precompute.settings import PrecomputeSettings, RayOptions


@options(ModelSection, DataSection, PrecomputeSettings, RayOptions)
def plan(
    given: Given,
    recipe: RecipeOption = None,
    gpus: Annotated[int, typer.Option(min=1, help="Devices that work side by side.")] = 1,
    device_memory: Annotated[
        float | None,
        typer.Option(
            min=0.1, help="GiB of a device, to find the largest batches for.", show_default="this machine's GPU"
        ),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Time a few network calls here to estimate hours.", show_default="off")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.", show_default="off")] = False,
) -> None:
    """What a precompute run will cost: shards, network calls, bytes, device hours; and what it and a training run, as
    the recipe's train section has it, will hold on a device. Refuses if the disk is short.
    """
    from functools import partial

    from inpo.precompute.estimate import run_plan
    from inpo.train.memory import train_needs

    code = run_plan(
        recipe,
        given[ModelSection],
        given[DataSection],
        given[PrecomputeSettings],
        ray_options=resolve(RayOptions, "ray", {}, given[RayOptions]),
        gpus=gpus,
        gibibytes=device_memory,
        calibrate=calibrate,
        as_json=as_json,
        beside=partial(train_needs, recipe, num_processes=gpus),
    )
    raise typer.Exit(code)
